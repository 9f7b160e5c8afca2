"""Going on from a checkpoint of another layout: other replicas, shards or ZeRO stages, in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron.config.schema import Config
from megatron.training.trainer import CannotStart, train
from tests.megatron.training.running import MakeConfig, figures, losses_of, tiny_config, train_on

PLAIN = {"hidden_dropout": 0.0}
TOLERANCE = {"fp32": 1e-6, "bfloat16": 2e-3}
TWO: dict[str, dict[str, object]] = {
    "two replicas": {},
    "two replicas, ZeRO 1": {"zero_stage": 1},
    "two replicas, ZeRO 2": {"zero_stage": 2},
    "two replicas, ZeRO 3": {"zero_stage": 3},
    "two shards": {"model_parallel_size": 2},
    "two shards, ZeRO 1, cut sequence": {"model_parallel_size": 2, "sequence_parallel": True, "zero_stage": 1},
    "two stages": {"pipe_parallel_size": 2, "pipe_partition_method": "uniform"},
    "two stages cut otherwise": {"pipe_parallel_size": 2, "pipe_partition_method": "type:transformer|linear"},
    "two stages, ZeRO 1": {"pipe_parallel_size": 2, "pipe_partition_method": "parameters", "zero_stage": 1},
}
"""Layouts of two processes."""


def on_two(prefix: str, save: Path, way: dict[str, object], **checkpoint: object) -> Config:
    replicas = 1 if {"model_parallel_size", "pipe_parallel_size"} & way.keys() else 2
    return tiny_config(
        prefix,
        save,
        world_size=2,
        parallel=way,
        model=PLAIN,
        batch={"train_micro_batch_size_per_gpu": 4 // replicas, "data_parallel_size": replicas},
        checkpoint={"save": str(save), **checkpoint},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    alone: Config
    """One process from the first step to the last."""
    whole: dict[str, Config]
    """Two processes from the first step to the last."""
    from_one: dict[str, Config]
    """Two processes from the third step of the one."""
    from_others: dict[str, Config]
    """Two processes from the third step of two that were spread otherwise: the next of `TWO`."""


@pytest.fixture(scope="module")
def runs(token_prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("rearranged")
    alone = tiny_config(token_prefix, folder / "alone", model=PLAIN)
    (folder / "one").mkdir()
    train_on([alone], ranks=1, folder=folder / "one")
    names = list(TWO)
    whole = {name: on_two(token_prefix, folder / name, way) for name, way in TWO.items()}
    from_one = {name: on_two(token_prefix, folder / f"{name} from one", way, load=alone.checkpoint.save, iteration=3) for name, way in TWO.items()}
    from_others = {
        name: on_two(token_prefix, folder / f"{name} from another", way, load=whole[names[place - 1]].checkpoint.save, iteration=3)
        for place, (name, way) in enumerate(TWO.items())
    }
    train_on([*whole.values(), *from_one.values(), *from_others.values()], ranks=2, folder=folder)
    return Runs(alone=alone, whole=whole, from_one=from_one, from_others=from_others)


def assert_second_half(second: Config, whole: Config, *, rel: float) -> None:
    """``second`` went on from the third step as ``whole`` did."""
    assert losses_of(second) == pytest.approx(losses_of(whole)[3:], rel=rel)
    assert figures(second, "train/grad_norm") == pytest.approx(figures(whole, "train/grad_norm")[3:], rel=10 * rel)
    assert figures(second, "train/learning_rate") == figures(whole, "train/learning_rate")[3:]


@pytest.mark.parametrize("name", TWO)
def test_two_processes_go_on_from_one(runs: Runs, name: str) -> None:
    assert_second_half(runs.from_one[name], runs.alone, rel=TOLERANCE["fp32"])


@pytest.mark.parametrize("name", TWO)
def test_two_processes_go_on_from_two_that_were_spread_otherwise(runs: Runs, name: str) -> None:
    assert_second_half(runs.from_others[name], runs.alone, rel=TOLERANCE["fp32"])


@pytest.mark.parametrize("name", TWO)
def test_one_process_goes_on_from_two(runs: Runs, make_config: MakeConfig, tmp_path: Path, name: str) -> None:
    checkpoint = {"save": str(tmp_path / "second"), "load": runs.whole[name].checkpoint.save, "iteration": 3}
    second = make_config(model=PLAIN, checkpoint=checkpoint)
    train(second)
    assert_second_half(second, runs.alone, rel=TOLERANCE["fp32"])


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0), (2, 3), (3, 0), (3, 1), (0, 3)])
@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_another_zero_stage_goes_on(make_config: MakeConfig, tmp_path: Path, before: int, after: int, precision: str) -> None:
    """With dropout: the random generators go on too."""
    whole = make_config(zero_stage=before, precision=precision)
    train(whole)
    checkpoint = {"save": str(tmp_path / "second"), "load": whole.checkpoint.save, "iteration": 3}
    second = make_config(zero_stage=after, precision=precision, checkpoint=checkpoint)
    train(second)
    assert_second_half(second, whole, rel=TOLERANCE[precision])


@pytest.mark.parametrize(
    "optimizer",
    [{"type": "sgd"}, {"type": "sgd", "momentum": 0.9}, {"type": "adagrad"}, {"type": "lion"}, {"type": "adam", "params": {"amsgrad": True}}],
    ids=str,
)
@pytest.mark.parametrize(("before", "after"), [(0, 1), (3, 0)])
def test_every_optimizers_state_goes_on(make_config: MakeConfig, tmp_path: Path, optimizer: dict[str, object], before: int, after: int) -> None:
    """SGD without momentum has none."""
    whole = make_config(zero_stage=before, optimizer=optimizer)
    train(whole)
    checkpoint = {"save": str(tmp_path / "second"), "load": whole.checkpoint.save, "iteration": 3}
    second = make_config(zero_stage=after, optimizer=optimizer, checkpoint=checkpoint)
    train(second)
    assert_second_half(second, whole, rel=TOLERANCE["fp32"])


def test_optimizer_state_without_names_is_a_sentence(make_config: MakeConfig, tmp_path: Path) -> None:
    """As an older version saved it."""
    whole = make_config()
    train(whole)
    folder = Path(str(whole.checkpoint.save)) / "global_step3"
    (path,) = folder.glob("mp_rank_*_model_states.pt")
    saved = torch.load(path, weights_only=False)
    del saved["parameter_names"]
    torch.save(saved, path)
    second = make_config(zero_stage=1, checkpoint={"save": str(tmp_path / "second"), "load": whole.checkpoint.save, "iteration": 3})
    with pytest.raises(CannotStart, match="no optimizer state whose parameters have names"):
        train(second)

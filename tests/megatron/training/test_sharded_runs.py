"""Whole runs on two tensor-parallel processes, beside the same runs on one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron.config.schema import Config
from megatron.inference.loading import load_model
from megatron.parallel.shards import split
from megatron.training.trainer import train
from megatron.training.weights import engine_state
from tests.megatron.training.running import MakeConfig, figures, losses_of, same_weights, tiny_config, train_on, weights_of
from tools.ckpts.convert_neox_to_hf import convert

LOGGED = {"log_interval": 1, "log_param_norm": True, "log_grad_norm": True, "log_grad_pct_zeros": True}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
PLAIN = {"hidden_dropout": 0.0}
WAYS = {
    "shards": {},
    "cut sequence": {"sequence_parallel": True},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2, cut sequence": {"zero_stage": 2, "sequence_parallel": True},
}
RESUMED = {
    "shards": ("fp32", {}),
    "ZeRO 1 in bfloat16, cut sequence": ("bfloat16", {"zero_stage": 1, "sequence_parallel": True}),
}


def sharded(prefix: str, save: Path, parallel: dict[str, object], **changes: object) -> Config:
    """The tiny run on two tensor-parallel processes."""
    return tiny_config(
        prefix,
        save,
        parallel={"model_parallel_size": 2, **parallel},
        batch={"train_micro_batch_size_per_gpu": 4, "data_parallel_size": 1},
        runtime={"world_size": 2},
        logging=LOGGED,
        **changes,  # type: ignore[arg-type]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    plain: dict[str, Config]
    """Without dropout, so that they are those of one process."""
    whole: dict[str, Config]
    second_half: dict[str, Config]
    tuned: Config
    """From the weights that one process saved."""
    alone: Config


@pytest.fixture(scope="module")
def runs(token_prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All in one start of the two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    place = partial(sharded, token_prefix)
    first = {"checkpoint_factor": 3, "extra_save_iters": (0,)}
    alone = tiny_config(token_prefix, folder / "alone", model=PLAIN, logging=LOGGED, checkpoint={"save": str(folder / "alone"), **first})
    (folder / "one").mkdir()
    train_on([alone], ranks=1, folder=folder / "one")
    plain = {
        name: place(folder / f"plain {name}", way, model=PLAIN, checkpoint={"save": str(folder / f"plain {name}"), **first})
        for name, way in WAYS.items()
    }
    whole, second_half = {}, {}
    for name, (precision, way) in RESUMED.items():
        make = partial(place, parallel=way, precision=precision, model=DROPOUT)
        whole[name] = make(folder / f"whole {name}")
        save = folder / f"second {name}"
        second_half[name] = make(save, checkpoint={"save": str(save), "load": whole[name].checkpoint.save, "iteration": 3})
    checkpoint = {"save": str(folder / "tuned"), "load": alone.checkpoint.save, "finetune": True, "extra_save_iters": (0,)}
    tuned = place(folder / "tuned", {}, training={"train_iters": 1}, checkpoint=checkpoint)
    train_on([*plain.values(), *whole.values(), *second_half.values(), tuned], ranks=2, folder=folder)
    return Runs(plain=plain, whole=whole, second_half=second_half, tuned=tuned, alone=alone)


@pytest.mark.parametrize("name", WAYS)
def test_two_shards_train_as_one_process_does(runs: Runs, name: str) -> None:
    """Gradients are clipped in the first steps, by a norm that counts every number once."""
    assert max(figures(runs.alone, "train/grad_norm")) > 1
    for figure in ("train/lm_loss", "train/grad_norm", "validation/lm_loss", "test/lm_loss", "runtime/kv_ratio"):
        assert figures(runs.plain[name], figure) == pytest.approx(figures(runs.alone, figure), rel=1e-5)
    expected, found = (torch.cat([value.flatten() for value in weights_of(run, 6).values()]) for run in (runs.alone, runs.plain[name]))
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("name", ["shards", "ZeRO 1"])
def test_statistics_are_of_whole_parameters(runs: Runs, name: str) -> None:
    for figure in ("word_embeddings.weight", "attention.dense.bias", "mlp.linear1.weight", "input_layernorm.weight"):
        layer = "sequential.0" if figure.startswith("word") else "sequential.2"
        for kind in ("parameter_norms", "gradient_norms", "pct_grad_zeros"):
            key = f"{kind}/{layer}.{figure}"
            assert figures(runs.plain[name], key) == pytest.approx(figures(runs.alone, key), rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize("name", WAYS)
def test_they_begin_with_the_same_bits(runs: Runs, name: str) -> None:
    assert same_weights(weights_of(runs.plain[name], 0), weights_of(runs.alone, 0))


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_sharded_run_equals_an_uninterrupted_one_bit_for_bit(runs: Runs, name: str) -> None:
    assert losses_of(runs.second_half[name]) == losses_of(runs.whole[name])[3:]
    assert same_weights(weights_of(runs.second_half[name], 6), weights_of(runs.whole[name], 6))


def test_every_shard_has_a_file_in_gpt_neoxs_layout(runs: Runs) -> None:
    """The row biases of the parallel residual add up over the files."""
    step = Path(str(runs.plain["shards"].checkpoint.save)) / "global_step6"
    files = [torch.load(step / f"mp_rank_{rank:02}_model_states.pt", weights_only=False) for rank in range(2)]
    whole = weights_of(runs.plain["shards"], 6)
    for name, value in whole.items():
        for rank, piece in enumerate(split(name, value, runs.plain["shards"].model, ranks=2)):
            assert torch.equal(files[rank]["module"][name], piece), name
    assert whole["sequential.2.attention.dense.bias"].abs().min() > 0
    assert not files[1]["module"]["sequential.2.attention.dense.bias"].any()
    assert engine_state(step)["args"]["model_parallel_size"] == 2  # type: ignore[index]


def test_shards_take_the_weights_of_one_process_and_the_other_way_round(runs: Runs, make_config: MakeConfig, tmp_path: Path) -> None:
    assert same_weights(weights_of(runs.tuned, 0), weights_of(runs.alone, 6))
    saved = str(runs.plain["ZeRO 1"].checkpoint.save)
    checkpoint = {"save": str(tmp_path), "load": saved, "no_load_optim": True, "extra_save_iters": (7,)}
    alone = make_config(model=PLAIN, training={"train_iters": 6}, checkpoint=checkpoint)
    assert train(alone).iteration == 6
    loaded = load_model(make_config(checkpoint={"load": saved}), torch.device("cpu")).model.state_dict()
    assert same_weights(dict(loaded), weights_of(runs.plain["ZeRO 1"], 6))


def test_both_convert_to_the_same_transformers_folder(runs: Runs, tmp_path: Path) -> None:
    folders = []
    for config in (runs.alone, runs.plain["shards"]):
        folders.append(tmp_path / str(len(folders)))
        convert(config, input_dir=Path(str(config.checkpoint.save)) / "global_step0", output_dir=folders[-1], save_tokenizer=False)
    one, two = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert one == two

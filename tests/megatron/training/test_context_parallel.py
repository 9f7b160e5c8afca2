"""Whole runs whose samples are shared by two processes: the losses, evaluations and weights of one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config.deepspeed import deepspeed_config
from megatron.config.schema import Config
from megatron.training.trainer import train
from tests.megatron.training.running import figures, losses_of, same_weights, tiny_config, train_on, weights_of, without_launcher

RANKS = 2


def configs_of(prefix: str, folder: Path, *, pieces: int) -> dict[str, Config]:
    """The same runs on one process, or cut into ``pieces``."""

    def run(name: str, *, zero_stage: int = 0, precision: str = "fp32", **changes: dict[str, Any]) -> Config:
        groups: dict[str, dict[str, Any]] = {
            "runtime": {"world_size": pieces},
            "parallel": {"zero_stage": zero_stage, "context_parallel_size": pieces},
            "model": {"hidden_dropout": 0.0},
            "logging": {"log_interval": 2, "steps_per_print": 1000, "char_level_ppl": True},
        }
        return tiny_config(prefix, folder / f"{name}{pieces}".replace(" ", "-"), precision=precision, **groups | changes)

    stopped = run("ZeRO 1", zero_stage=1)
    again = {"load": stopped.checkpoint.save, "save": str(folder / f"resumed{pieces}"), "checkpoint_factor": 3, "iteration": 3}
    return {
        "ZeRO 0": run("ZeRO 0"),
        "ZeRO 1": stopped,
        "ZeRO 2": run("ZeRO 2", zero_stage=2),
        "ZeRO 3": run("ZeRO 3", zero_stage=3),
        "bf16": run("bf16", zero_stage=1, precision="bfloat16"),
        "resumed": run("resumed", zero_stage=1, checkpoint=again),
        "dropout": run("dropout", model={"hidden_dropout": 0.1}, checkpoint={"save": str(folder / f"dropout{pieces}"), "checkpoint_factor": 6}),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    whole: dict[str, Config]
    cut: dict[str, Config]


@pytest.fixture(scope="module")
def runs(token_prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """On one process, and cut into pieces."""
    folder = tmp_path_factory.mktemp("context")
    whole, cut = (configs_of(token_prefix, folder, pieces=pieces) for pieces in (1, RANKS))
    train_on(list(cut.values()), ranks=RANKS, folder=folder)
    with without_launcher():
        for name in ("ZeRO 0", "bf16"):
            train(whole[name])
    return Runs(whole=whole, cut=cut)


COMPARED = ("train/lm_loss", "train/grad_norm", "validation/lm_loss", "validation/lm_loss_char_lvl_ppl", "test/lm_loss")
COUNTED = ("runtime/kept_ratio", "runtime/kv_ratio")


@pytest.mark.parametrize("name", ["ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3"])
def test_pieces_train_as_one_process_does(name: str, runs: Runs) -> None:
    for figure in COMPARED:
        assert figures(runs.cut[name], figure) == pytest.approx(figures(runs.whole["ZeRO 0"], figure), rel=2e-6)
    for figure in COUNTED:
        assert figures(runs.cut[name], figure) == figures(runs.whole["ZeRO 0"], figure)
    assert len(losses_of(runs.cut[name])) == 6


def test_pieces_train_in_bf16_within_its_rounding(runs: Runs) -> None:
    for figure in COMPARED:
        assert figures(runs.cut["bf16"], figure) == pytest.approx(figures(runs.whole["bf16"], figure), rel=2**-8)


def test_a_resumed_run_goes_on_bit_for_bit(runs: Runs) -> None:
    assert losses_of(runs.cut["resumed"]) == losses_of(runs.cut["ZeRO 1"])[3:]
    assert same_weights(weights_of(runs.cut["resumed"], 6), weights_of(runs.cut["ZeRO 1"], 6))


def test_each_piece_drops_at_random_of_its_own(runs: Runs) -> None:
    assert runs.cut["dropout"].checkpoint.save is not None
    states = torch.load(Path(runs.cut["dropout"].checkpoint.save) / "global_step6" / "random_states.pt", weights_only=True)
    assert not torch.equal(states[0]["torch"], states[1]["torch"])


def test_deepspeed_counts_pieces_as_data_parallel_devices(runs: Runs) -> None:
    config = runs.cut["ZeRO 1"]
    assert deepspeed_config(config)["train_batch_size"] == RANKS * config.batch.train_batch_size

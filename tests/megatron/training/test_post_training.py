"""The paper's third setting: a full-attention checkpoint goes on as SepLLM, from its own folder or by way of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.config.loader import load_config
from megatron.config.schema import Config
from megatron.data.indexed import IndexedDatasetWriter
from megatron.training.trainer import train
from sepllm.pattern import AttentionPattern
from tests.megatron.training.running import REPOSITORY, figures, losses_of, without_launcher
from tools.ckpts import convert_hf_to_neox, convert_neox_to_hf
from tools.ckpts.neox_files import ParallelSizes
from tools.ckpts.saved_config import run_config

TINY = REPOSITORY / "configs" / "local"
FULL_STEPS, SPARSE_STEPS = 30, 20
SEPARATORS = (46, 44, 63, 33, 59, 58, 32, 9, 10)


def tiny_run(save: Path, prefix: str, *, method: str, steps: int, **changes: object) -> Config:
    """configs/local/tiny on the text at ``prefix``, evaluated at its end."""
    overrides: dict[str, object] = {
        "data_path": prefix,
        "save": str(save),
        "checkpoint_factor": 1000,
        "train_iters": steps,
        "eval_interval": steps,
        "optimizer.params.lr": 5e-3,
        "zero_optimization.stage": 0,
    }
    return load_config([TINY / "tiny.yml", TINY / f"tiny-{method}.yml"], overrides=overrides | changes, world_size=1, device="cpu")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sources of this project as bytes."""
    path = tmp_path_factory.mktemp("text") / "sources"
    with IndexedDatasetWriter(path, np.uint16) as writer:
        for source in sorted((REPOSITORY / "sepllm").rglob("*.py")):
            writer.add_document([*source.read_bytes(), 0])
    return str(path)


@pytest.fixture(scope="module")
def full(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A full-attention model after 30 steps."""
    config = tiny_run(tmp_path_factory.mktemp("full") / "save", prefix, method="full", steps=FULL_STEPS)
    with without_launcher():
        train(config)
    return config


def last_test_loss(config: Config) -> float:
    return figures(config, "test/lm_loss")[-1]


@pytest.mark.parametrize("policy", [{}, {"warmup": 0.0, "optimizer.params.lr": 2.5e-3}], ids=["whole schedule", "descent only"])
def test_a_full_attention_checkpoint_goes_on_as_sepllm(full: Config, prefix: str, tmp_path: Path, policy: dict[str, object]) -> None:
    config = tiny_run(tmp_path / "save", prefix, method="sepllm", steps=SPARSE_STEPS, load=full.checkpoint.save, finetune=True, **policy)
    train(config)
    losses = losses_of(config)
    assert len(losses) == SPARSE_STEPS
    assert losses[0] < losses_of(full)[0] - 1  # it begins with what full attention has learned
    assert last_test_loss(config) < last_test_loss(full) * 1.02


def test_by_way_of_transformers_the_same_training_follows_bit_for_bit(full: Config, prefix: str, tmp_path: Path) -> None:
    step = Path(str(full.checkpoint.save)) / f"global_step{FULL_STEPS}"
    files = [TINY / "tiny.yml", TINY / "tiny-full.yml"]
    folder = convert_neox_to_hf.convert(
        run_config(step, config_files=files), input_dir=step, output_dir=tmp_path / "hf", architecture="neox", save_tokenizer=False
    ).directory
    convert_hf_to_neox.convert(folder, tmp_path / "imported", sizes=ParallelSizes(tensor=2, pipeline=2))
    runs = [
        tiny_run(tmp_path / name, prefix, method="sepllm", steps=5, load=source, finetune=True)
        for name, source in {"own": full.checkpoint.save, "imported": str(tmp_path / "imported")}.items()
    ]
    for config in runs:
        train(config)
    assert losses_of(runs[0]) == losses_of(runs[1])
    assert all(config.attention.prefill == AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=(16, 16)) for config in runs)

"""Small configurations as files: the keys every one needs, plus those that a test is about."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.config.loader import ConfigError, LoadedConfig, load_config_with_notes

BASE: dict[str, object] = {
    "num-layers": 4,
    "hidden-size": 64,
    "num-attention-heads": 4,
    "seq-length": 128,
    "max-position-embeddings": 128,
    "pos-emb": "rotary",
    "optimizer": {"type": "Adam", "params": {"lr": 1.0e-3}},
    "train_micro_batch_size_per_gpu": 2,
    "train-iters": 100,
    "tokenizer-type": "CharLevelTokenizer",
}

Resolve = Callable[..., LoadedConfig]
Mistakes = Callable[..., tuple[str, ...]]


@pytest.fixture
def resolve(tmp_path: Path) -> Resolve:
    """``resolve({"key": value}, without=["key"], world_size=1, overrides={})`` with the base keys underneath."""

    def run(keys: dict[str, object] | None = None, *, without: tuple[str, ...] = (), world_size: int = 1, **options: object) -> LoadedConfig:
        content = {key: value for key, value in {**BASE, **(keys or {})}.items() if key not in without}
        path = tmp_path / "run.yml"
        path.write_text("{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()) + "\n}")
        return load_config_with_notes([path], world_size=world_size, device="cpu", **options)  # type: ignore[arg-type]

    return run


@pytest.fixture
def mistakes(resolve: Resolve, tmp_path: Path) -> Mistakes:
    """The mistakes of a configuration that must not resolve, without the folder of the file."""

    def run(keys: dict[str, object] | None = None, **options: object) -> tuple[str, ...]:
        with pytest.raises(ConfigError) as caught:
            resolve(keys, **options)
        return tuple(line.replace(f"{tmp_path}/", "") for line in caught.value.mistakes)

    return run

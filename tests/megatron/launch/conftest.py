"""A small run's YAML, and its resolved configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.config.loader import load_config
from megatron.config.schema import Config

LOCAL = Path(__file__).parents[3] / "configs" / "local"
TINY = (LOCAL / "tiny.yml", LOCAL / "tiny-sepllm.yml")


@pytest.fixture
def tiny() -> Callable[..., Config]:
    """The tiny model with some keys changed."""

    def load(*, world_size: int = 1, **overrides: object) -> Config:
        return load_config(TINY, overrides=overrides, world_size=world_size, device="cpu")

    return load

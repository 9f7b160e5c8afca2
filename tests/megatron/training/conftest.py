"""A model of two layers on random bytes, small enough to be trained many times in a test."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import IndexedDatasetWriter
from tests.megatron.training.running import MakeConfig, tiny_config, without_launcher


@pytest.fixture(scope="session")
def token_prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of a token file of 200 short documents of bytes."""
    prefix = tmp_path_factory.mktemp("tokens") / "bytes"
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(200):
            writer.add_document([*random.integers(32, 127, int(random.integers(20, 200))).tolist(), 0])
    return str(prefix)


@pytest.fixture
def make_config(token_prefix: str, tmp_path: Path) -> MakeConfig:
    """`tiny_config`, saving below ``tmp_path``."""
    return partial(tiny_config, token_prefix, tmp_path / "save")


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with without_launcher():
        yield

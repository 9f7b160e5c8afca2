"""What a run reads, wherever its data lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.data.block_cache import BlockCache
from megatron.training.trainer import train
from tests.megatron.training.running import MakeConfig, losses_of


def test_a_run_on_remote_data_equals_one_on_local_data(
    make_config: MakeConfig, token_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = BlockCache(folder=tmp_path / "cache", limit_bytes=4000, block_bytes=1000)
    monkeypatch.setattr(BlockCache, "of_user", lambda limit_gb=10.0: cache)
    losses = []
    for name, prefix, num_workers in (("local", token_prefix, 0), ("remote", f"file://{token_prefix}", 2)):
        data = {"data_path": prefix, "num_workers": num_workers}
        config = make_config(data=data, checkpoint={"save": str(tmp_path / name)})
        train(config)
        losses.append(losses_of(config))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    assert list((cache.folder / "blocks").glob("*/*/*"))
    assert len(list((cache.folder / "indices").rglob("*.npy"))) == 9

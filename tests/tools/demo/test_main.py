from __future__ import annotations

import pytest

from megatron.launch import resources
from tools.demo.__main__ import devices, has_gpu


@pytest.mark.parametrize(("visible", "ranks"), [(None, 2), ("3", 1), ("0,1,2", 2)])
def test_the_demo_takes_no_gpu_that_is_hidden_from_it(visible: str | None, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "count_gpus", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices(2) == ["--set", f"num_gpus={ranks}", "--set", f"train_micro_batch_size_per_gpu={2 // ranks}"]
    assert has_gpu()


def test_where_all_gpus_are_hidden_it_runs_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "count_gpus", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not has_gpu()

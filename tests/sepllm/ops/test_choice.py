from __future__ import annotations

import pytest

from sepllm.ops import choice, extension


@pytest.mark.parametrize(
    ("environment", "device", "is_native"),
    [
        (None, "cpu", True),
        (None, "cuda", False),  # until a test has passed there
        ("native", "cpu", True),
        ("native", "cuda", True),
        ("reference", "cpu", False),
        ("reference", "cuda", False),
    ],
)
def test_environment_decides_for_auto(environment: str | None, device: str, is_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "why_unavailable", lambda: None)
    monkeypatch.delenv("SEPLLM_OPS", raising=False)
    if environment is not None:
        monkeypatch.setenv("SEPLLM_OPS", environment)
    assert choice.is_native("auto", device) is is_native
    assert choice.is_native("native", device)
    assert not choice.is_native("reference", device)


def test_auto_is_plain_torch_where_nothing_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEPLLM_OPS", raising=False)
    monkeypatch.setattr(extension, "why_unavailable", lambda: "no compiler")
    assert not choice.is_native("auto", "cpu")

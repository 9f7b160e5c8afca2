"""What is timed on a GPU, with a device that only notes what it is asked to do."""

from __future__ import annotations

import pytest
import torch

from tools.bench.problem import Inputs
from tools.bench.stopwatch import Stopwatch


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a GPU is asked to do, in order."""
    events: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            events.append("event")

        def synchronize(self) -> None:
            events.append("waited")

        def elapsed_time(self, _end: Event) -> float:
            return 2.0

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, dtype, device: empty(8, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: events.append("head start"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("idle"))
    return events


@pytest.mark.parametrize(("hides_launching", "before"), [(True, "head start"), (False, "idle")])
def test_launching_is_timed_only_where_it_is_asked_for(hides_launching: bool, before: str, asked: list[str]) -> None:
    watch = Stopwatch(torch.device("cuda"), hides_launching=hides_launching)
    inputs = Inputs.leaves(*torch.ones(4, 1, 2, 1, 2))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        asked.append("call")
        return q * k * v

    elapsed = watch.time(attention, inputs, has_backward=False)
    assert asked == [before, "event", "call", "event", "waited"]
    assert elapsed.forward_s == 0.002

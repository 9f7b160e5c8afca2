"""Seconds of one attention call, forward and backward, on a CPU or a GPU."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from tools.bench.gate import Attention
from tools.bench.problem import Inputs

FLUSH_BYTES = 2**28
"""Written before each call on a GPU, so that none finds its inputs in the cache: several times the L2 of any."""
HEAD_START_CYCLES = 2_000_000
"""A GPU sleeps this long (about 1 ms) before each call, so that launching is not what is timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Elapsed:
    forward_s: float
    total_s: float | None
    """With the backward; None where there is none."""


class Stopwatch:
    def __init__(self, device: torch.device, *, hides_launching: bool = True) -> None:
        """``hides_launching``: a GPU gets a call when all its kernels are (about) launched; else it waits for each of them."""
        self._is_cuda, self._hides_launching = device.type == "cuda", hides_launching
        self._flushed = torch.empty(FLUSH_BYTES if self._is_cuda else 0, dtype=torch.int8, device=device)

    def time(self, attention: Attention, inputs: Inputs, *, has_backward: bool) -> Elapsed:
        """One call. Without a backward it runs as inference does, and otherwise the forward is that of a training step."""
        if has_backward:
            return self._time(attention, inputs)
        with torch.no_grad():
            start = self._mark(is_first=True)
            attention(inputs.q.detach(), inputs.k.detach(), inputs.v.detach())
            return Elapsed(forward_s=self._between(start, self._mark()), total_s=None)

    def _time(self, attention: Attention, inputs: Inputs) -> Elapsed:
        leaves = (inputs.q, inputs.k, inputs.v)
        start = self._mark(is_first=True)
        out = attention(*leaves)
        middle = self._mark()
        torch.autograd.grad(out, leaves, inputs.out_gradient)
        end = self._mark()
        total_s = self._between(start, end)
        return Elapsed(forward_s=self._between(start, middle), total_s=total_s)

    def _mark(self, *, is_first: bool = False) -> float | torch.cuda.Event:
        if not self._is_cuda:
            return time.perf_counter()
        if is_first:
            self._flushed.zero_()
            torch.cuda._sleep(HEAD_START_CYCLES) if self._hides_launching else torch.cuda.synchronize()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        if isinstance(start, float) or isinstance(end, float):
            assert isinstance(start, float) and isinstance(end, float)  # noqa: PT018
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3

"""Contenders timed side by side: one process, round robin, and ratios taken inside each round.

Times of different rounds differ with the clock frequency and the neighbours of a shared machine; two contenders of one round have both in
common. So a ratio is the median of the ratios of all rounds, and the same contender run twice says how far such a ratio can be trusted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")
MIN_ROUNDS, MAX_ROUNDS = 5, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How much one contender is faster than another, over the rounds of one run."""

    median: float
    low: float
    """10 % of the rounds were below."""
    high: float
    """10 % of the rounds were above."""

    @classmethod
    def of(cls, slower: Sequence[float], faster: Sequence[float]) -> Ratio:
        """``slower / faster``, round by round."""
        low, median, high = np.percentile(np.divide(slower, faster), [10, 50, 90]).tolist()
        return cls(median=median, low=low, high=high)

    def is_within(self, spread: Ratio) -> bool:
        """Whether this is no further from 1 than one contender run twice, whose ratio is ``spread``."""
        furthest = max(spread.high, 1 / spread.low)
        return 1 / furthest <= self.median <= furthest


def interleave(contenders: Mapping[str, Callable[[], T]], *, rounds: int) -> dict[str, list[T]]:
    """What each contender returned in each round: all of them once, in order, then all of them again."""
    results: dict[str, list[T]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            results[name].append(run())
    return results


def rounds_for(one_round: Callable[[], object], *, budget_s: float, fewest: int = MIN_ROUNDS) -> int:
    """How many rounds fit into ``budget_s`` seconds, by the time of one; never fewer than ``fewest``."""
    start = time.perf_counter()
    one_round()
    return int(min(max(budget_s / (time.perf_counter() - start), fewest), MAX_ROUNDS))


def least_s(run: Callable[[], object], *, repeats: int = 5) -> float:
    """Fewest of the seconds that ``run`` takes: what the machine can do when nobody disturbs it."""
    elapsed = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        elapsed.append(time.perf_counter() - start)
    return min(elapsed)


def median_s(run: Callable[[], object], *, repeats: int = 5) -> float:
    """Median of the seconds that ``run`` takes, after one call that does not count."""
    run()
    elapsed = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        elapsed.append(time.perf_counter() - start)
    return float(np.median(elapsed))


def clock_s(device: torch.device) -> float:
    """The time when all that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

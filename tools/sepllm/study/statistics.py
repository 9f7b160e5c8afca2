"""What a few seeds can tell apart.

The replicates are the seeds: each draws its own initial weights and order of the data, and every method starts from just these. So methods
are compared by their differences inside a seed, and the interval of a difference is Student's t over the seeds. It speaks about other
seeds, with this text; how much the held-out rows matter is a bootstrap over the rows, apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats  # type: ignore[import-untyped]

CONFIDENCE = 0.95
RESAMPLES = 10_000

BySeed = Mapping[int, float]
"""A figure of one method for each seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def sign(self) -> Literal[-1, 0, 1]:
        """Of every number inside; 0 where the interval holds 0, that is, where nothing is separated."""
        return -1 if self.high < 0 else 1 if self.low > 0 else 0


def t_interval(differences: ArrayLike, *, confidence: float = CONFIDENCE) -> Interval:
    """Mean of a few independent differences, with Student's interval for what it would be of many."""
    values = np.asarray(differences, dtype=np.float64)
    if values.size < 2:
        raise ValueError(f"An interval over seeds needs at least 2 of them, and got {values.size}: give more --seeds.")
    half = float(stats.t.ppf((1 + confidence) / 2, values.size - 1)) * float(values.std(ddof=1)) / np.sqrt(values.size)
    mean = float(values.mean())
    return Interval(mean=mean, low=mean - half, high=mean + half)


def pooled_half_width(losses: Mapping[str, BySeed]) -> float:
    """Of the interval of a typical pair: what a difference must exceed to be separated by these seeds."""
    pairs = [paired(losses[a], losses[b]) for a, b in combinations(losses, 2)]
    return float(np.sqrt(np.mean([interval.half_width**2 for interval in pairs])))


def bootstrap_interval(differences: ArrayLike, *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of the differences of many rows, with the middle share of the means of rows drawn again with replacement."""
    values = np.asarray(differences, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(values.size, size=(resamples, values.size))
    low, high = np.quantile(values[drawn].mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high))


def paired(first: BySeed, second: BySeed) -> Interval:
    """``first`` minus ``second``, seed by seed."""
    if set(first) != set(second):
        raise ValueError(f"Differences are taken inside a seed, but the seeds are {sorted(first)} and {sorted(second)}: run both with the same.")
    return t_interval([first[seed] - second[seed] for seed in sorted(first)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a method stands among the others by what the intervals separate, and no further."""

    method: str
    mean: float
    ahead_of: tuple[str, ...]
    behind: tuple[str, ...]
    not_separated: tuple[str, ...]

    @property
    def rank(self) -> int:
        """1 more than the methods that are separated from it and better."""
        return 1 + len(self.behind)


def ranking(losses: Mapping[str, BySeed]) -> list[Place]:
    """Every method with those that it is ahead of (lower loss), behind, and not separated from. By rank, then by mean."""
    signs = {(a, b): paired(losses[a], losses[b]).sign for a, b in permutations(losses, 2)}

    def others(method: str, sign: int) -> tuple[str, ...]:
        return tuple(other for other in losses if other != method and signs[method, other] == sign)

    places = [
        Place(
            method=method,
            mean=float(np.mean(list(by_seed.values()))),
            ahead_of=others(method, -1),
            behind=others(method, 1),
            not_separated=others(method, 0),
        )
        for method, by_seed in losses.items()
    ]
    return sorted(places, key=lambda place: (place.rank, place.mean))


def row_differences(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> list[float]:
    """Of each held-out row: the mean over the seeds of its loss under the first method less that under the second. ``[seeds][rows]`` each."""
    difference = np.asarray(first) - np.asarray(second)
    return difference.mean(0).tolist()

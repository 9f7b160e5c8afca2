"""The learning rate as a pure function of the step: warmup, then a descent to a floor.

GPT-NeoX changed what the same keys mean twice. v1 (until August 2023) measures the descent over the whole schedule and is
cut at the floor; v2 (until May 2026) measures it between the warmup and the end; v3 also makes the first step move.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.config.schema import ScheduleConfig

EXPONENTIAL_RATE = 0.693
"""ln 2 as GPT-NeoX rounds it: the exponential style halves the rate over its descent."""


@dataclass(frozen=True, slots=True)
class LearningRate:
    """The rate of one schedule at any step.

    >>> LearningRate(ScheduleConfig(lr=1e-3, min_lr=1e-4, lr_decay_style="cosine", lr_decay_iters=143_000)).at(0)
    """

    config: ScheduleConfig

    @property
    def warmup_steps(self) -> float:
        """Steps of linear warmup; not rounded, as in GPT-NeoX."""
        return self.config.warmup * self.config.lr_decay_iters

    def at(self, step: int) -> float:
        """The rate after ``step`` applied optimizer steps; update k (from 1) is made with ``at(k - 1)``."""
        if self.config.lr_schedule_version == "v1":
            return self._at_v1(step)
        peak, end, warmup = self.config.lr, self.config.lr_decay_iters, self.warmup_steps
        if warmup > 0 and step <= warmup:
            first = 1 if self.config.lr_schedule_version == "v3" else 0
            return min(peak * max(first, step) / warmup, peak)  # of a warmup shorter than a step GPT-NeoX makes many times the peak
        length = end - warmup
        if length <= 0:
            return peak if self.config.lr_decay_style == "constant" else max(_descended(self.config, 1, 1), self.config.min_lr)
        return max(_descended(self.config, min(step - warmup, length), length), self.config.min_lr)

    def _at_v1(self, step: int) -> float:
        """Pythia's schedule: steps stop counting at ``end - warmup``, and the descent is spread over ``end``."""
        peak, end, warmup = self.config.lr, self.config.lr_decay_iters, self.warmup_steps
        counted = min(step, end - warmup)
        if warmup > 0 and step <= warmup:
            return peak * counted / warmup
        gone = counted - warmup
        if self.config.lr_decay_style == "cosine":
            return max(peak / 2 * (1 + math.cos(math.pi * gone / end)), self.config.min_lr)
        return max(_descended(self.config, gone, end), self.config.min_lr)


def _descended(config: ScheduleConfig, gone: float, length: float) -> float:
    """The rate ``gone`` steps into a descent of ``length`` steps, before the floor."""
    match config.lr_decay_style:
        case "constant":
            return config.lr
        case "linear":
            return config.lr * (length - gone) / length
        case "cosine":
            return config.min_lr + (config.lr - config.min_lr) / 2 * (1 + math.cos(math.pi * gone / length))
        case "exponential":
            return config.lr * math.exp(-EXPONENTIAL_RATE * gone / length)

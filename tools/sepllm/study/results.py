"""What one run of the study leaves: a JSON file, which is also how the study knows that the run is done."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import TypeAdapter

from megatron.config.loader import config_to_json
from megatron.config.schema import Config

Axis = Literal["step", "flops", "cpu_s"]
SCHEMA = 1
"""Raised when what a run measures changes, so that older files are not mixed with newer ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The model after so many steps."""

    step: int
    flops: float
    """Executed by the steps so far."""
    cpu_s: float
    """Processor time of the steps so far, seconds."""
    loss: float
    """Of the validation rows, nats per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One method from one seed."""

    method: str
    seed: int
    fingerprint: str
    """Of the configuration that ran."""
    parameters: int
    tokens: int
    """Trained on."""
    kept_ratio: float
    """Pairs computed over causal pairs, of all training steps."""
    kv_ratio: float
    """Keys that the last query of a row reads over all keys, of all training steps."""
    cores: tuple[str, ...]
    """Which attention core computed each layer."""
    median_step_cpu_s: float
    median_step_s: float
    """By the clock: what else ran on the machine is in it."""
    train_losses: tuple[float, ...]
    """Of every step."""
    curve: tuple[Point, ...]
    row_losses: tuple[float, ...]
    """Of each test row, after the last step. Nats per token."""
    place_losses: tuple[float, ...]
    """Of the test rows by place: the mean of each equal stretch of a row, from its start on."""

    @property
    def test_loss(self) -> float:
        """Mean over the test rows, which are equally long."""
        return float(np.mean(self.row_losses))

    def loss_at(self, value: float, axis: Axis) -> float:
        """Validation loss where the run had come to ``value``, on straight lines between the points; ValueError before the first."""
        places = [getattr(point, axis) for point in self.curve]
        if not places[0] <= value <= places[-1] * (1 + 1e-9):
            raise ValueError(f"{self.method} was measured from {places[0]:g} to {places[-1]:g} of {axis}, not at {value:g}.")
        return float(np.interp(value, places, [point.loss for point in self.curve]))

    def cost_of(self, loss: float, axis: Axis) -> float | None:
        """How much of ``axis`` it took to bring the validation loss down to ``loss``; None: it never was."""
        for before, after in zip((None, *self.curve), self.curve, strict=False):
            if after.loss <= loss:
                return _crossing(before, after, loss, axis)
        return None

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> RunResult:
        return TypeAdapter(cls).validate_json(path.read_bytes())


def fingerprint(config: Config) -> str:
    """Twelve letters that stand for the configuration and for what is measured of its run."""
    return hashlib.sha256(f"{SCHEMA} {config_to_json(config)}".encode()).hexdigest()[:12]


def _crossing(before: Point | None, after: Point, loss: float, axis: Axis) -> float:
    """Where the straight line between two points comes down to ``loss``."""
    end = float(getattr(after, axis))
    if before is None:
        return end
    start = float(getattr(before, axis))
    return start + (end - start) * (before.loss - loss) / (before.loss - after.loss)

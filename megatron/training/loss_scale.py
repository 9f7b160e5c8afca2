"""fp16's loss scale, with which the loss is multiplied before the backward pass, and three things that DeepSpeed 0.19 does wrong about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_POSITION = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What moves of a dynamic scaler, with and without ZeRO. The rest are settings."""


def loss_scale(engine: DeepSpeedEngine) -> float | None:
    """What the loss is multiplied with before the backward pass. fp16 only."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


def scale_gradients(loss: Tensor, engine: DeepSpeedEngine) -> None:
    """The backward pass of ``loss`` will start from the loss scale.

    Without ZeRO DeepSpeed forgets to multiply with it, and divides by it all the same. Whatever it multiplied with is replaced, so that a
    version that remembers does no harm.
    """
    scale = loss_scale(engine)
    if scale is not None and not engine.zero_optimization():
        start = scale / engine.gradient_accumulation_steps()
        loss.register_hook(lambda gradient: torch.full_like(gradient, start))


def grow_after_steps(engine: DeepSpeedEngine) -> None:
    """From now on the loss scale grows when the gradients have been divided by it.

    DeepSpeed lets it grow before, so that the gradients of that step were divided by twice the scale that they had been multiplied with.
    """
    if not engine.fp16_enabled():
        return
    wrapper = engine.optimizer
    update, take_step = wrapper._update_scale, wrapper.step

    def shrink(has_overflow: bool) -> None:
        if has_overflow:
            update(True)

    def step() -> None:
        take_step()
        if not wrapper.overflow:
            update(False)

    wrapper._update_scale, wrapper.step = shrink, step


@contextmanager
def kept_scaling(engine: DeepSpeedEngine) -> Iterator[None]:
    """What is loaded inside tells a dynamic loss scale where it has come to; how it moves, or what a fixed one is, stays this run's.

    DeepSpeed takes the settings from the checkpoint too.
    """
    if not engine.fp16_enabled():
        yield
        return
    name = _scaler_name(engine)
    own = copy(getattr(engine.optimizer, name))
    yield
    loaded = getattr(engine.optimizer, name)
    setattr(engine.optimizer, name, own)
    if engine.zero_optimization():
        engine.optimizer.dynamic_loss_scale = own.dynamic
    if _is_dynamic(loaded):
        go_on_scaling(engine, vars(loaded))


def go_on_scaling(engine: DeepSpeedEngine, came_to: Mapping[str, float]) -> None:
    """The loss scale goes on from where a dynamic one had come to, if it is dynamic itself. ``came_to``: what is known of `_POSITION`."""
    scaler = getattr(engine.optimizer, _scaler_name(engine))
    if not _is_dynamic(scaler):
        return
    for name in _POSITION:
        if name in came_to and hasattr(scaler, name):
            setattr(scaler, name, came_to[name])
    scaler.cur_scale = max(scaler.cur_scale, scaler.min_scale if hasattr(scaler, "min_scale") else scaler.min_loss_scale)
    if hasattr(scaler, "cur_hysteresis"):
        scaler.cur_hysteresis = min(scaler.cur_hysteresis, scaler.delayed_shift)


def _scaler_name(engine: DeepSpeedEngine) -> str:
    """Of the attribute of the optimizer's wrapper: an object of its own with ZeRO, a record without."""
    return "loss_scaler" if engine.zero_optimization() else "loss_scale_config"


def _is_dynamic(scaler: Any) -> bool:
    return bool(scaler.dynamic if hasattr(scaler, "dynamic") else scaler.dynamic_loss_scale)

"""fp16's loss scale, with which the loss is multiplied before the backward pass, and two things that DeepSpeed 0.19 does wrong about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


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

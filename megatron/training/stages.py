"""Micro-batches through the stages of a pipeline: what a DeepSpeed engine of several stages asks beyond one that has the whole model.

The first stage reads ids, the last labels; those between read nothing. What has to be the same shape for a whole run, the packed layout,
is agreed on before micro-batches set off: a list of far keys longer than any before makes all stages exchange shapes anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron.data.batch import Batch
from megatron.parallel.collectives import from_last_stage, largest_of_stages
from megatron.parallel.mesh import Mesh
from sepllm.layout import TokenLayout

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

Fed = tuple[Tensor | tuple[()], tuple[Tensor, Tensor] | tuple[()]]
"""What DeepSpeed hands to the first stage and to the last."""


def trained_losses(engine: PipelineEngine, batches: Iterator[Batch], mesh: Mesh, *, before_update: Callable[[], None]) -> Tensor:
    """One optimizer step; the losses of its micro-batches, in order, on every stage. ``[micro-batches]`` float32."""
    count = engine.gradient_accumulation_steps()
    fed = _fed(engine, _read(batches, mesh, count=count), mesh)
    with _noticed(engine, before_update):
        engine.train_batch(fed)
    return _of_last_stage(engine.fwd_outputs, mesh, count=count)


@torch.no_grad()
def evaluated_losses(engine: PipelineEngine, batches: Iterator[Batch], mesh: Mesh, *, count: int) -> Tensor:
    """The losses of ``count`` micro-batches, in order, on every stage. ``[count]`` float32.

    As many at a time as a training step has, so that the first stage never holds more.
    """
    losses = []
    for first in range(0, count, engine.gradient_accumulation_steps()):
        at_once = min(engine.gradient_accumulation_steps(), count - first)
        fed = _fed(engine, _read(batches, mesh, count=at_once), mesh)
        own = engine.eval_batch(fed, reduce_output=None, bcast_loss=False, num_micro_batches=at_once)
        losses.append(_of_last_stage(own, mesh, count=at_once))
    return torch.cat(losses)


def logits_of(engine: PipelineEngine, layout: TokenLayout, mesh: Mesh, *, vocabulary: int) -> Tensor:
    """Logits after each token of the layout, on every stage, ``[B, S, V]`` float32. Its number of rows may be any."""
    engine.reset_activation_shape()
    engine.total_loss = None  # to which DeepSpeed adds whatever the last stage returns
    packed = layout.pack(far_capacity=engine.module.far_capacity)
    own = engine.eval_batch(iter([(packed, ())]), compute_loss=False, reduce_output=None, bcast_loss=False, num_micro_batches=1)
    engine.reset_activation_shape()
    is_last = mesh.pipe.rank == mesh.pipe.size - 1
    return from_last_stage(own[0].float() if is_last else torch.empty(*layout.ids.shape, vocabulary, device=mesh.device), mesh)


def _read(batches: Iterator[Batch], mesh: Mesh, *, count: int) -> list[Batch]:
    """The next micro-batches, where this stage has a use for them."""
    return list(islice(batches, count)) if mesh.pipe.rank in (0, mesh.pipe.size - 1) else []


def _fed(engine: PipelineEngine, batches: Sequence[Batch], mesh: Mesh) -> Iterator[Fed]:
    """The micro-batches as DeepSpeed's engine takes them, all of one shape, on which the stages have agreed."""
    stage = engine.module
    capacity = largest_of_stages(max((batch.layout.far_capacity for batch in batches), default=0), mesh)
    if capacity > stage.far_capacity:
        stage.far_capacity = capacity
        engine.reset_activation_shape()
    if mesh.pipe.rank == 0:
        return ((batch.layout.pack(far_capacity=stage.far_capacity), ()) for batch in batches)
    return (((), (batch.labels, batch.loss_mask)) for batch in batches)


def _of_last_stage(losses: Sequence[Tensor] | None, mesh: Mesh, *, count: int) -> Tensor:
    is_last = mesh.pipe.rank == mesh.pipe.size - 1
    return from_last_stage(torch.stack([*(losses or ())]).float() if is_last else torch.empty(count, device=mesh.device), mesh)


@contextmanager
def _noticed(engine: PipelineEngine, before_update: Callable[[], None]) -> Iterator[None]:
    """Inside, ``before_update`` is called when all gradients are there and neither clipped nor applied. DeepSpeed has no hook at that place."""
    update = engine._take_model_step

    def noticed(lr_kwargs: object) -> None:
        before_update()
        update(lr_kwargs)

    engine._take_model_step = noticed
    try:
        yield
    finally:
        del engine._take_model_step

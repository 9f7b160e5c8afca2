"""One training step: the micro-batches through the model, and one update by the DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron.data.batch import Batch
from megatron.optim.build import set_learning_rate
from megatron.parallel.collectives import mean_over_context, mean_over_data_parallel
from megatron.parallel.mesh import Mesh
from megatron.parallel.parameters import norm_over_shards
from megatron.training import stages
from megatron.training.loss_scale import loss_scale, scale_gradients
from megatron.training.pieces import Piece, own_piece
from megatron.training.ratios import Ratios

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step did."""

    loss: float
    """Mean over the micro-batches of all replicas."""
    micro_losses: tuple[float, ...]
    """Of this replica's micro-batches, in order."""
    grad_norm: float | None
    """Before clipping. None where DeepSpeed was told not to compute it."""
    is_skipped: bool
    """The gradients overflowed (fp16) and the weights stayed as they were."""
    loss_scale: float | None
    """fp16 only."""
    ratios: Ratios
    """How sparse this replica's attention was."""


def train_step(
    engine: DeepSpeedEngine,
    batches: Iterator[Batch],
    mesh: Mesh,
    *,
    lr: float,
    before_update: Callable[[DeepSpeedEngine], None] | None = None,
) -> StepReport:
    """One optimizer step over the next ``gradient_accumulation_steps`` micro-batches.

    ``before_update`` sees the engine when the last gradients are there and the weights have not moved.
    """
    set_learning_rate(engine.optimizer, lr)
    counted = Counted(batches)
    norm: float | None = None
    scale: float | None = None

    def note() -> None:
        nonlocal norm, scale
        norm, scale = own_gradient_norm(engine, mesh), loss_scale(engine)
        if before_update is not None:
            before_update(engine)

    through = stages.trained_losses if mesh.pipe.size > 1 else trained_losses
    micro_losses = through(engine, counted, mesh, before_update=note)
    return StepReport(
        loss=float(mean_over_data_parallel(micro_losses.mean(), mesh)),
        micro_losses=tuple(micro_losses.tolist()),
        grad_norm=norm if norm is not None else engine_gradient_norm(engine, scale=scale),
        is_skipped=not engine.was_step_applied(),
        loss_scale=loss_scale(engine),
        ratios=counted.ratios,
    )


def trained_losses(engine: DeepSpeedEngine, batches: Iterator[Batch], mesh: Mesh, *, before_update: Callable[[], None]) -> Tensor:
    """Forward, backward and update of a model that each process has whole; the losses of its micro-batches, in order."""
    engine.train()
    losses: list[Tensor] = []
    for _ in range(engine.gradient_accumulation_steps()):
        loss = batch_loss(engine, own_piece(next(batches), mesh))
        scale_gradients(loss, engine)
        engine.backward(loss)
        losses.append(loss.detach())
        if engine.is_gradient_accumulation_boundary():
            before_update()
        engine.step()
    return mean_over_context(torch.stack(losses), mesh)


class Counted:
    """An iterator of micro-batches that knows how sparse the attention of those that passed is."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.ratios = Ratios()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self.ratios += Ratios.of(batch.layout)
        return batch


def batch_loss(engine: DeepSpeedEngine, batch: Batch | Piece) -> Tensor:
    """Mean loss of the micro-batch's unmasked tokens, a scalar. Of a piece: what has this mean over all pieces of the micro-batch."""
    loss: Tensor = engine(batch.ids, batch.layout, labels=batch.labels, loss_mask=batch.loss_mask)
    return loss * batch.weight.to(loss.dtype) if isinstance(batch, Piece) else loss


def own_gradient_norm(engine: DeepSpeedEngine, mesh: Mesh) -> float | None:
    """Norm of the whole model's reduced gradients where the engine runs a bare torch optimizer (fp32 without ZeRO) and keeps no norm; else None."""
    if engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled():
        return None
    gradients = [(parameter, parameter.grad) for parameter in engine.module.parameters() if parameter.grad is not None]
    return float(norm_over_shards(gradients, shards=mesh.tensor, along=mesh.model))


def engine_gradient_norm(engine: DeepSpeedEngine, *, scale: float | None) -> float | None:
    """The norm that DeepSpeed computed in its step. Only with ZeRO has it taken the loss ``scale`` out."""
    norm = engine.get_global_grad_norm()
    if norm is None:
        return None
    return float(norm) if engine.zero_optimization() or scale is None else float(norm) / scale

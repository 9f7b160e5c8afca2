"""A micro-batch as a process takes it that shares its samples with others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.data.batch import Batch
from megatron.parallel.context import ContextLayout
from megatron.parallel.mesh import Axis, Mesh


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some columns of a `Batch`; ``[B, T]`` where it has ``[B, S]``."""

    ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    layout: ContextLayout
    weight: Tensor
    """What the mean loss of this piece is multiplied with, so that the mean over the pieces is the batch's. float64"""

    @classmethod
    def of(cls, batch: Batch, context: Axis) -> Piece:
        """This process's piece of a batch on the CPU."""
        layout = ContextLayout.of(batch.layout, context)
        mask = batch.loss_mask[:, layout.columns]
        return cls(
            ids=batch.ids[:, layout.columns],
            labels=batch.labels[:, layout.columns],
            loss_mask=mask,
            layout=layout,
            weight=mask.double().sum() * context.size / batch.loss_mask.double().sum().clamp(min=1),
        )

    def to(self, device: torch.device | str) -> Piece:
        """The same piece on another device (the copy does not wait for it)."""
        ids, labels, mask, weight = (x.to(device, non_blocking=True) for x in (self.ids, self.labels, self.loss_mask, self.weight))
        return Piece(ids=ids, labels=labels, loss_mask=mask, layout=self.layout.to(device), weight=weight)


def own_piece(batch: Batch, mesh: Mesh) -> Batch | Piece:
    """What this process computes of the batch, on its device: all of it, unless others have pieces of the same samples."""
    return (batch if mesh.context.size == 1 else Piece.of(batch, mesh.context)).to(mesh.device)

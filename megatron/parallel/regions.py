"""Crossings between what all shards have alike and what each has a part of, with their gradients (arXiv 1909.08053, 2205.05198).

                forward                                    backward
    copied      the same tensor, read by every shard       the shards' gradients summed
    summed      the shards' parts summed                   the same gradient for every part
    cut         this shard's piece of the sequence         the pieces of all shards put together
    gathered    the pieces of all shards put together      the shards' gradients summed, of which this one takes its piece
    summed_cut  the shards' parts summed, of which this    the pieces of all shards put together
                one takes its piece of the sequence

A sequence is cut along axis 1 of ``[B, T, D]``. Collectives are torch's functional ones: they start at once, `wait` ends them, and
`torch.compile` traces them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.parallel.mesh import Axis


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParallel:
    """How the layers of a model are cut. By default they are not."""

    axis: Axis = Axis()
    """The shards of every layer."""
    is_sequence_cut: bool = False
    """Between the sharded layers, each shard holds the activations of its own piece of the sequence only (`sequence_parallel`)."""

    @property
    def size(self) -> int:
        return self.axis.size

    @property
    def rank(self) -> int:
        return self.axis.rank

    @property
    def group(self) -> str:
        """The name by which torch's functional collectives know the shards; empty where there is one."""
        return self.axis.group.group_name if self.axis.group is not None and self.size > 1 else ""

    def local(self, count: int) -> int:
        """Of ``count`` heads, rows or columns, those of one shard."""
        assert count % self.size == 0, f"{self.size} shards cannot share {count} alike"
        return count // self.size

    def own(self, whole: Tensor, *, dim: int) -> Tensor:
        """This shard's piece of a tensor that all have, along ``dim``. Its gradient stays here."""
        return whole if self.size == 1 else whole.chunk(self.size, dim)[self.rank]

    def entered(self, x_BTD: Tensor) -> Tensor:
        """What the replicated, or cut, activation is on the inside of a sharded layer: all tokens."""
        if self.size == 1:
            return x_BTD
        return _Gathered.apply(x_BTD, self.group, self.size) if self.is_sequence_cut else _Copied.apply(x_BTD, self.group)

    def left(self, part_BTD: Tensor) -> Tensor:
        """The shards' parts summed: of all tokens, or of this shard's piece of the sequence."""
        if self.size == 1:
            return part_BTD
        return _SummedCut.apply(part_BTD, self.group, self.size) if self.is_sequence_cut else _Summed.apply(part_BTD, self.group)

    def total(self, x: Tensor) -> Tensor:
        """The sum over the shards of numbers that each goes on to compute something of its own with."""
        return x if self.size == 1 else _Copied.apply(_Summed.apply(x, self.group), self.group)


def start_sum(x: Tensor, group: str) -> Tensor:
    """The sum over the group of every process's ``x``, once `wait` has returned."""
    return torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group)


def start_gather(piece: Tensor, group: str, size: int) -> Tensor:
    """The pieces of all, one after another along a new first axis, once `wait` has returned. ``[size, *piece.shape]``."""
    return torch.ops._c10d_functional.all_gather_into_tensor(piece.contiguous(), size, group).view(size, *piece.shape)


def start_sum_cut(x_BTD: Tensor, group: str, size: int) -> Tensor:
    """This process's piece of the sequence of the sum over the group, once `wait` has returned. ``[B, T / size, D]``."""
    pieces = x_BTD.unflatten(1, (size, -1)).movedim(1, 0).contiguous()
    return torch.ops._c10d_functional.reduce_scatter_tensor(pieces.flatten(0, 1), "sum", size, group)


def wait(started: Tensor) -> Tensor:
    """``started``, complete."""
    return torch.ops._c10d_functional.wait_tensor(started)


def joined_pieces(gathered: Tensor) -> Tensor:
    """``[B, size * T, D]`` of the gathered pieces ``[size, B, T, D]``."""
    return gathered.movedim(0, 1).flatten(1, 2)


def gather(piece_BTD: Tensor, group: str, size: int) -> Tensor:
    """The pieces of all shards put together along the sequence."""
    return joined_pieces(wait(start_gather(piece_BTD, group, size)))


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: str) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        return wait(start_sum(gradient, ctx.group)), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: Tensor, group: str) -> Tensor:  # type: ignore[no-untyped-def]
        return wait(start_sum(part, group))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        return gradient, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, piece_BTD: Tensor, group: str, size: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group, ctx.size = group, size
        return gather(piece_BTD, group, size)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        return wait(start_sum_cut(gradient, ctx.group, ctx.size)), None, None


class _SummedCut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part_BTD: Tensor, group: str, size: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group, ctx.size = group, size
        return wait(start_sum_cut(part_BTD, group, size))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        return gather(gradient, ctx.group, ctx.size), None, None

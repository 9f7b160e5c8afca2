"""Matrices of which each shard holds a part: rows (column parallel) or columns (row parallel), under the names of `nn.Linear`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.parallel.regions import TensorParallel, gather, joined_pieces, start_gather, start_sum, start_sum_cut, wait
from sepllm.ops.linear import bias_gradient, linear, weight_gradient


class ColumnLinear(nn.Linear):
    """A shard of the output features. ``[B, T, in] -> [B, T, out / shards]``; a cut sequence is gathered first."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, parallel: TensorParallel) -> None:
        super().__init__(in_features, parallel.local(out_features), bias=bias)
        self.parallel = parallel

    def forward(self, x: Tensor) -> Tensor:
        return column_product(x, self.weight, self.bias, self.parallel)


class RowLinear(nn.Linear):
    """A shard of the input features. ``[B, T, in / shards]`` to this shard's part of ``[B, T, out]``, or to the sum of all parts.

    ``is_part``: the caller sums, with other parts. The bias belongs to the sum, and the first shard's part brings it: the other shards
    hold one of minus zeros, which no gradient moves, so that GPT-NeoX, which adds up those of all shards, reads the same.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, parallel: TensorParallel, is_part: bool) -> None:
        super().__init__(parallel.local(in_features), out_features, bias=bias)
        self.parallel = parallel
        self.is_part = is_part

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel.size == 1 or self.is_part:
            return self.product(x, self.bias if self.parallel.rank == 0 else None)
        whole = self.parallel.left(self.product(x, None))
        return whole if self.bias is None else whole + self.bias

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias`` of this shard's features."""
        return linear(x, self.weight, bias)


def column_product(x: Tensor, weight: Tensor, bias: Tensor | None, parallel: TensorParallel) -> Tensor:
    """``x @ weight.T + bias`` of the rows that this shard holds; of all tokens, also where ``x`` is this shard's piece of the sequence.

    In the backward pass the shards' gradients of ``x`` are summed while that of the weight is computed. What is kept for it is ``x`` as it
    came: a cut sequence is gathered once more instead.
    """
    if parallel.size == 1:
        return linear(x, weight, bias)
    product = _GatheredProduct if parallel.is_sequence_cut else _CopiedProduct
    return product.apply(x, weight, bias, parallel.group, parallel.size)


class _CopiedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, group: str, size: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        of_input = start_sum(linear(gradient, weight.t()), ctx.group)
        of_weight, of_bias = _of_parameters(gradient, x, has_bias=ctx.needs_input_grad[2])
        return wait(of_input), of_weight, of_bias, None, None


class _GatheredProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, piece: Tensor, weight: Tensor, bias: Tensor | None, group: str, size: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(piece, weight)
        ctx.group, ctx.size = group, size
        return linear(gather(piece, group, size), weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        piece, weight = ctx.saved_tensors
        gathered = start_gather(piece, ctx.group, ctx.size)
        of_whole = linear(gradient, weight.t())
        x = joined_pieces(wait(gathered))
        of_piece = start_sum_cut(of_whole, ctx.group, ctx.size)
        of_weight, of_bias = _of_parameters(gradient, x, has_bias=ctx.needs_input_grad[2])
        return wait(of_piece), of_weight, of_bias, None, None


def _of_parameters(gradient: Tensor, x: Tensor, *, has_bias: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of a weight and its bias."""
    return weight_gradient(gradient, x), bias_gradient(gradient) if has_bias else None

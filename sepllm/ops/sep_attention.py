"""Attention over key ranges as an operator: C++ for CPUs (csrc/sep_attention_cpu.cpp), and its definition in plain torch.

A query reads the keys ``index[c]`` for ``far_lo <= c < far_hi`` and the keys ``band_lo <= j < band_hi``, which are disjoint, under one
softmax. The kernels do the work of these pairs only, forward and backward, and allocate nothing of size T x S.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sepllm.ops import attention_reference, choice
from sepllm.ops.attention_reference import Adjustment, Bias

STANDARD, RAW, NORMALISED = range(3)
"""The kinds of softmax as the operator counts them."""


class Ranges(NamedTuple):
    """What each query reads, int32. Bounds never decrease with the query."""

    far_keys: Tensor
    """``[B, M]``: key of each far column, ascending."""
    far_lo: Tensor
    """``[B, T]``, like the others."""
    far_hi: Tensor
    band_lo: Tensor
    band_hi: Tensor


def sep_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Ranges,
    *,
    scale: float,
    bias: Bias | None = None,
    adjustment: Adjustment | None = None,
    impl: str = "native",
) -> tuple[Tensor, Tensor]:
    """``out [B, T, N, H]`` of q's dtype, and ``lse [B, N, T]`` fp32 (fp64 for fp64): the base-2 logarithm of the sum of exponentials.

    ``q [B, T, N, H]``, ``k`` and ``v`` ``[B, S, K, H]``: float32, float64, bfloat16 or float16 on a CPU; heads may be grouped. A query that
    reads nothing gives 0 and inf. Differentiable in q, k and v, not in ``lse``; the gradient is the same to the bit from run to run with
    the same number of threads. ``impl="reference"`` is `attention_reference.attention`.
    """
    if impl == "reference":
        return attention_reference.attention(q, k, v, read_mask(ranges, k.shape[1]), scale=scale, bias=bias, adjustment=adjustment)
    if impl != "native":
        raise ValueError(f"impl is {impl!r}: use native or reference.")
    register()
    extremes = (adjustment.extremes if adjustment is not None else None) or (None, None)
    out, lse, _, _ = torch.ops.sepllm.sep_attention(q, k, v, *ranges, *(bias or (None, None, None)), *extremes, scale, *_kind(adjustment))
    return out, lse


def read_mask(ranges: Ranges, num_keys: int) -> Tensor:
    """``[B, T, S]`` bool: which keys each query reads."""
    keys, columns = (torch.arange(size, device=ranges.far_keys.device) for size in (num_keys, ranges.far_keys.shape[1]))
    band = (keys >= ranges.band_lo[..., None]) & (keys < ranges.band_hi[..., None])
    far = (columns >= ranges.far_lo[..., None]) & (columns < ranges.far_hi[..., None])
    return band.int().scatter_add(2, ranges.far_keys[:, None].expand_as(far).long(), far.int()).bool()


def _kind(adjustment: Adjustment | None) -> tuple[int, float, float]:
    if adjustment is None:
        return STANDARD, 0.0, 0.0
    return NORMALISED if adjustment.is_normalised else RAW, adjustment.numerator_bias, adjustment.denominator_bias


@choice.once_loaded
def register() -> None:
    torch.library.register_fake("sepllm::sep_attention", _fake)
    torch.library.register_fake("sepllm::sep_attention_backward", _fake_backward)
    torch.library.register_autograd("sepllm::sep_attention", _backward, setup_context=_save)


NUM_TENSORS = 13
"""Of the operator's arguments: q, k, v, five of the ranges, three of the bias, two of the extremes."""


def _fake(q: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    softmax = rest[NUM_TENSORS]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    sums = (q.shape[0], q.shape[2], q.shape[1])
    extremes = (*sums, 2 if softmax == NORMALISED else 0)
    return q.new_empty(q.shape), q.new_empty(sums, dtype=wide), q.new_empty(extremes, dtype=wide), q.new_empty(extremes, dtype=torch.int32)


def _fake_backward(_grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:  # type: ignore[no-untyped-def]
    ctx.numbers = inputs[NUM_TENSORS:]
    ctx.save_for_backward(*inputs[:NUM_TENSORS], *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    nothing = (None,) * (NUM_TENSORS - 3 + len(ctx.numbers))
    if grad_out is None:
        return (None, None, None, *nothing)
    choice.refuse_second_derivative("sep_attention")
    return (*torch.ops.sepllm.sep_attention_backward(grad_out, *ctx.saved_tensors, *ctx.numbers), *nothing)

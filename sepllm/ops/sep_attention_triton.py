"""Attention over far columns and a band as Triton kernels for NVIDIA GPUs (sm_80 and newer): one online softmax, no S x S memory.

A query reads two contiguous ranges of a *table* of key rows: entries ``0 .. M`` are the far columns, entries ``M .. M + S`` the keys
themselves. Tiles of entries that every query of a block reads skip all masking; the edges are masked by the bounds. Rows are fetched
through the table inside the kernels, from any strided view, so nothing is gathered or transposed beforehand.

    forward         a block of queries    edges, then full tiles                           out, lse
    dq              a block of queries    the same tiles again                             dq, delta
    dk, dv (far)    a tile of far columns the queries that read it, one interval each      fp32, compact
    dk, dv (keys)   a tile of keys        the queries whose band holds it, + compact far   dk, dv

The self-adjust softmax takes one more sum of values per query forward, and its extremes with the first keys that attain them; backward
these keys are owed a gradient by their queries, which the same loops pay.

Nothing is added by atomics: the same inputs give the same bits. ``TRITON_INTERPRET=1`` at import runs the kernels on CPU tensors.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sepllm.ops.attention_reference import Adjustment, Bias
from sepllm.ops.sep_attention_kernels import INTERPRETED, NORMALISED, RAW, STANDARD, _forward_kernel, _key_gradient_kernel, _query_gradient_kernel
from sepllm.ops.sep_attention_tiles import INTERPRETER, Tile, Tiles, tiles

LARGEST_HEAD = 256


class Tables(NamedTuple):
    """What the kernels know of who reads what, all int32. ``C = M + S`` table entries: far columns, then keys."""

    bounds: Tensor
    """``[B, 4, T]``: each query's far range and band, as ``low, high, low, high`` in entries of the table."""
    rows: Tensor
    """``[B, C]``: the key of each entry; -1 where no query reads the entry."""
    readers: Tensor
    """``[B, 2, C]``: the queries ``first <= t < last`` that read each entry: exact, as no bound ever decreases."""
    far_column: Tensor
    """``[B, S]``: the far column of each key that is read as one, else -1."""


def make_tables(index: Tensor, far_lo: Tensor, far_hi: Tensor, band_lo: Tensor, band_hi: Tensor, *, num_keys: int) -> Tables:
    """`Tables` of some ranges, in O((T + M + S) log T) on their device, without waiting for it.

    ``index [B, M]``: the key of each far column. Query ``t`` reads the far columns ``far_lo <= c < far_hi`` and the keys
    ``band_lo <= j < band_hi``, ``[B, T]`` each; none of the four decreases with the query.
    """
    batch, num_far = index.shape
    far_readers = _readers(far_lo, far_hi, num_far)
    band_readers = _readers(band_lo, band_hi, num_keys)
    is_far_read = far_readers[:, 0] < far_readers[:, 1]
    keys = torch.arange(num_keys, dtype=torch.int32, device=index.device)
    rows = [torch.where(is_far_read, index, -1), torch.where(band_readers[:, 0] < band_readers[:, 1], keys, -1)]
    far_column = torch.full((batch, num_keys + 1), -1, dtype=torch.int32, device=index.device)  # the last takes what is not read
    columns = torch.arange(num_far, dtype=torch.int32, device=index.device).expand(batch, num_far)
    far_column.scatter_(1, torch.where(is_far_read, index, num_keys).long(), columns)
    return Tables(
        bounds=torch.stack([far_lo, far_hi, band_lo + num_far, band_hi + num_far], 1).int(),
        rows=torch.cat(rows, 1).int(),
        readers=torch.cat([far_readers, band_readers], 2),
        far_column=far_column[:, :num_keys].contiguous(),
    )


def _readers(low: Tensor, high: Tensor, count: int) -> Tensor:
    """The queries that read each of ``count`` columns, first and one past the last. ``[B, 2, count]`` int32."""
    columns = torch.arange(count, dtype=low.dtype, device=low.device).expand(low.shape[0], count).contiguous()
    first = torch.searchsorted(high.contiguous(), columns, right=True, out_int32=True)
    last = torch.searchsorted(low.contiguous(), columns, right=True, out_int32=True)
    return torch.stack([first, last], 1)


def sep_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, tables: Tables, *, scale: float, bias: Bias | None = None, adjustment: Adjustment | None = None
) -> Tensor:
    """Attention of each query over the table entries between its bounds. ``[B, T, N, D]``, contiguous, dtype of q.

    ``q [B, T, N, D]``; ``k``, ``v`` ``[B, S, K, D]`` with N a multiple of K; any strides whose last is 1. A query that reads nothing
    gives zeros. Sums are kept in float32 (of float64 in float64: the interpreter only), and float32 is never rounded to tf32.
    Differentiable in q, k and v. Extremes of an ``adjustment`` run over the keys that are read.
    """
    if scale <= 0:
        raise ValueError(f"scale is {scale}: the Triton kernels take their maxima before scaling and need a positive one.")
    if q.shape[3] > LARGEST_HEAD:
        raise ValueError(f"The head size is {q.shape[3]}: the Triton kernels keep a head in registers and go up to {LARGEST_HEAD}.")
    if adjustment is not None and adjustment.extremes is not None:
        raise ValueError("The Triton kernels take the extremes of the self-adjust softmax over the keys that are read, not over others.")
    out, *_ = _operator(q, k, v, *tables, *(bias or (None, None, None)), scale, *_numbers(adjustment))
    return out


def is_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors."""
    return bool(INTERPRETED.value)


class Softmax(NamedTuple):
    """Which softmax the kernels compute."""

    kind: int = STANDARD.value
    numerator_bias: float = 0.0
    denominator_bias: float = 0.0


def _numbers(adjustment: Adjustment | None) -> Softmax:
    if adjustment is None:
        return Softmax()
    return Softmax(NORMALISED.value if adjustment.is_normalised else RAW.value, adjustment.numerator_bias, adjustment.denominator_bias)


class Forward(NamedTuple):
    """Results of the forward kernel, and what the backward needs of it."""

    out: Tensor
    """``[B, T, N, D]``"""
    lse: Tensor
    """``[B, N, T]``: the logarithm *to base 2* of each query's sum of exponentials, inf where nothing is read."""
    gains: Tensor
    """``[B, N, 2, T]`` gain and offset of the normalised self-adjust softmax; empty otherwise."""
    extreme_keys: Tensor
    """``[B, N, 2, T]`` int32: the keys to which the gradients of its lowest and highest score go, or -2; empty otherwise."""


@torch.library.custom_op("sepllm::sep_attention_triton", mutates_args=())
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    rows: Tensor,
    readers: Tensor,
    far_column: Tensor,
    slopes: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float,
    softmax: int,
    numerator_bias: float,
    denominator_bias: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Forward`."""
    bias = _bias(slopes, query_positions, key_positions)
    kind = Softmax(softmax, numerator_bias, denominator_bias)
    out, lse, gains, extreme_keys = forward(q, k, v, Tables(bounds, rows, readers, far_column), scale=scale, bias=bias, softmax=kind)
    return out, lse, gains, extreme_keys


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Forward:
    return _empty(q, rest[_SOFTMAX - 3])


_SOFTMAX = 11
"""Place of the softmax's kind among the operator's arguments."""


def _empty(q: Tensor, softmax: object) -> Forward:
    sums = (q.shape[0], q.shape[2], q.shape[1])
    pairs = (*sums[:2], 2, sums[2]) if softmax == NORMALISED.value else (0,)
    wide = _accumulator(q.dtype)
    extreme_keys = q.new_empty(pairs, dtype=torch.int32)
    return Forward(q.new_empty(q.shape), q.new_empty(sums, dtype=wide), q.new_empty(pairs, dtype=wide), extreme_keys)


@torch.library.custom_op("sepllm::sep_attention_triton_backward", mutates_args=())
def _backward_operator(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    rows: Tensor,
    readers: Tensor,
    far_column: Tensor,
    slopes: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    out: Tensor,
    lse: Tensor,
    gains: Tensor,
    extreme_keys: Tensor,
    scale: float,
    softmax: int,
    numerator_bias: float,
    denominator_bias: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    bias = _bias(slopes, query_positions, key_positions)
    known = Forward(out, lse, gains, extreme_keys)
    kind = Softmax(softmax, numerator_bias, denominator_bias)
    return backward(grad_out, q, k, v, known, Tables(bounds, rows, readers, far_column), scale=scale, bias=bias, softmax=kind)


@_backward_operator.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:  # type: ignore[no-untyped-def]
    ctx.numbers = inputs[_SOFTMAX - 1 :]
    ctx.save_for_backward(*inputs[: _SOFTMAX - 1], *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    nothing = (None,) * (_SOFTMAX - 4 + len(ctx.numbers))
    if grad_out is None:
        return (None, None, None, *nothing)
    return (*_backward_operator(grad_out, *ctx.saved_tensors, *ctx.numbers), *nothing)


_operator.register_autograd(_backward, setup_context=_save_for_backward)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tables,
    *,
    scale: float,
    bias: Bias | None = None,
    softmax: Softmax = Softmax(),
    division: Tiles | None = None,
) -> Forward:
    """Launches the forward kernel. ``division`` replaces the table's tiles."""
    q, k, v = (_with_dense_rows(tensor) for tensor in (q, k, v))
    results = _empty(q, softmax.kind)
    tile = (division or tiles(q.shape[3], q.dtype, _capability(q), adjusts=softmax.kind != STANDARD.value)).forward
    with _device_of(q):
        _forward_kernel[_grid(q, q.shape[1], tile.queries)](
            q,
            k,
            v,
            tables.bounds,
            tables.rows,
            *_bias_arguments(bias),
            *results,
            *_strides(q, k, v),
            **_sizes(q, k, tables, scale, softmax, bias),
            **_shape(tile),
            NUMERATOR_BIAS=softmax.numerator_bias,
            DENOMINATOR_BIAS=softmax.denominator_bias,
        )
    return results


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    known: Forward,
    tables: Tables,
    *,
    scale: float,
    bias: Bias | None = None,
    softmax: Softmax = Softmax(),
    division: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the three backward kernels, one after the other: gradients of q, k and v."""
    q, k, v, grad_out = (_with_dense_rows(tensor) for tensor in (q, k, v, grad_out))
    division = division or tiles(q.shape[3], q.dtype, _capability(q), adjusts=softmax.kind != STANDARD.value)
    out, lse, gains, extreme_keys = known
    num_far = tables.rows.shape[1] - k.shape[1]
    delta, owed = torch.empty_like(lse), torch.empty_like(gains)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    far_dk, far_dv = (k.new_empty((k.shape[0], num_far, *k.shape[2:]), dtype=lse.dtype) for _ in range(2))
    strides, sizes, positions = _strides(q, k, v, grad_out), _sizes(q, k, tables, scale, softmax, bias), _bias_arguments(bias)
    sums = (lse, grad_out, delta, gains, extreme_keys, owed)
    of_queries = (q, k, v, tables.bounds, tables.rows, *positions, out, *sums, dq, *strides)
    of_keys = (q, k, v, tables.rows, tables.readers, tables.far_column, *positions, *sums, far_dk, far_dv, dk, dv, *strides)
    with _device_of(q):
        _query_gradient_kernel[_grid(q, q.shape[1], division.queries.queries)](*of_queries, **sizes, **_shape(division.queries))
        if num_far:
            _key_gradient_kernel[_grid(k, num_far, division.far.keys)](*of_keys, **sizes, **_shape(division.far), IS_FAR=True)
        _key_gradient_kernel[_grid(k, k.shape[1], division.keys.keys)](*of_keys, **sizes, **_shape(division.keys), IS_FAR=False)
    return dq, dk, dv


def _with_dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _bias(slopes: Tensor | None, query_positions: Tensor | None, key_positions: Tensor | None) -> Bias | None:
    if slopes is None or query_positions is None or key_positions is None:
        return None
    return Bias(slopes, query_positions, key_positions)


def _bias_arguments(bias: Bias | None) -> tuple[Tensor | None, ...]:
    return (None, None, None) if bias is None else tuple(tensor.contiguous() for tensor in bias)


def _capability(tensor: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else INTERPRETER


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _grid(tensor: Tensor, columns: int, block: int) -> tuple[int, int]:
    return tensor.shape[0] * tensor.shape[2], -(-columns // block)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _sizes(q: Tensor, k: Tensor, tables: Tables, scale: float, softmax: Softmax, bias: Bias | None) -> dict[str, object]:
    return {
        "num_queries": q.shape[1],
        "num_far": tables.rows.shape[1] - k.shape[1],
        "num_keys": k.shape[1],
        "num_heads": q.shape[2],
        "SCALE": scale,
        "SOFTMAX": softmax.kind,
        "GROUP": q.shape[2] // k.shape[2],
        "HAS_BIAS": bias is not None,
        "ACCUMULATE": tl.float64 if q.dtype == torch.float64 else tl.float32,
        "D": q.shape[3],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[3])),
    }


def _shape(tile: Tile) -> dict[str, object]:
    """Constants and compiler options of a tile. Products and sums may fuse: triton's default until 3.9, said aloud for later."""
    options: dict[str, object] = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    if tile.registers is not None:
        options["maxnreg"] = tile.registers
    return {"BLOCK_Q": tile.queries, "BLOCK_K": tile.keys} | options

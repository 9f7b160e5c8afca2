"""Attention over far columns and a band as Triton kernels for NVIDIA GPUs (sm_80 and newer): one online softmax, no S x S memory.

A query reads two contiguous ranges of a *table* of key rows: entries ``0 .. M`` are the far columns, entries ``M .. M + S`` the keys
themselves. Tiles of entries that every query of a block reads skip all masking; the edges are masked by the bounds. Rows are fetched
through the table inside the kernels, from any strided view, so nothing is gathered or transposed beforehand.

    forward         a block of queries    edges, then full tiles                           out, lse
    dq              a block of queries    the same tiles again                             dq, delta
    dk, dv (far)    a tile of far columns the queries that read it, one interval each      fp32, compact
    dk, dv (keys)   a tile of keys        the queries whose band holds it, + compact far   dk, dv

Nothing is added by atomics: the same inputs give the same bits. ``TRITON_INTERPRET=1`` at import runs the kernels on CPU tensors.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sepllm.ops.attention_reference import Bias
from sepllm.ops.sep_attention_tiles import INTERPRETER, Tile, Tiles, tiles

LARGEST_HEAD = 256

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(math.log2(math.e))
NEVER = tl.constexpr(2**30)
LOWEST = tl.constexpr(-1.0e30)


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


@triton.jit
def _span(low: tl.tensor, high: tl.tensor, counts: tl.tensor, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The tiles that hold a block's ranges ``low .. high``: where they start and stop, how many there are, how many of them all
    that ``counts`` read entirely, and how many stand before those."""
    is_used = low < high
    start = tl.min(tl.where(is_used, low, NEVER), 0)
    stop = tl.max(tl.where(is_used, high, 0), 0)
    number = (tl.maximum(stop - start, 0) + BLOCK - 1) // BLOCK
    before = tl.minimum((tl.maximum(tl.max(tl.where(counts, low, 0), 0) - start, 0) + BLOCK - 1) // BLOCK, number)
    full = tl.maximum(tl.min(tl.where(counts, high, NEVER), 0) - start - before * BLOCK, 0) // BLOCK
    return start, stop, number, tl.minimum(full, number - before), before


@triton.jit
def _walks(BOUNDS: tl.tensor, query: tl.tensor, is_query: tl.tensor, num_queries: tl.tensor, BLOCK: tl.constexpr) -> tl.tuple:
    """How a block of queries goes through the table: the edges of its bands, those of its far ranges, then all tiles that every query
    reads entirely. Each walk: bounds of each query, number of tiles, the tile before which the first start counts and from which the
    second does, both starts, and where the entries end."""
    far_low = tl.load(BOUNDS + query, mask=is_query, other=0)
    far_high = tl.load(BOUNDS + num_queries + query, mask=is_query, other=0)
    band_low = tl.load(BOUNDS + 2 * num_queries + query, mask=is_query, other=0)
    band_high = tl.load(BOUNDS + 3 * num_queries + query, mask=is_query, other=0)
    far_start, far_stop, far_number, far_full, far_before = _span(far_low, far_high, is_query, BLOCK)
    band_start, band_stop, band_number, band_full, band_before = _span(band_low, band_high, is_query, BLOCK)
    band = (band_low, band_high, band_number - band_full, band_before, band_start, band_start + band_full * BLOCK, band_stop)
    far = (far_low, far_high, far_number - far_full, far_before, far_start, far_start + far_full * BLOCK, far_stop)
    first, second = far_start + far_before * BLOCK, band_start + (band_before - far_full) * BLOCK
    return band, far, (far_low, far_high, far_full + band_full, far_full, first, second, band_stop)


@triton.jit
def _tile(t: tl.tensor, switch: tl.tensor, first: tl.tensor, second: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """What the ``t``-th tile holds, counting from ``first`` until the ``switch``-th and from ``second`` on from there."""
    return tl.where(t < switch, first, second) + t * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    if INTERPRETED and a.dtype == tl.bfloat16:  # the interpreter would multiply their bits
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def _load_rows(
    base: tl.tensor, row: tl.tensor, stride: tl.tensor, exists: tl.tensor, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
) -> tl.tensor:
    """``[rows, BLOCK_D]``; zeros beyond the head size and, if ``MASKED``, where a row does not exist."""
    d = tl.arange(0, BLOCK_D)[None, :]
    pointers = base + row[:, None].to(tl.int64) * stride + d
    if MASKED and D < BLOCK_D:
        values = tl.load(pointers, mask=exists[:, None] & (d < D), other=0.0)
    elif MASKED:
        values = tl.load(pointers, mask=exists[:, None], other=0.0)
    elif D < BLOCK_D:
        values = tl.load(pointers, mask=d < D, other=0.0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def _store_rows(
    base: tl.tensor, row: tl.tensor, stride: tl.tensor, values: tl.tensor, exists: tl.tensor, D: tl.constexpr, BLOCK_D: tl.constexpr
) -> None:
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(base + row[:, None].to(tl.int64) * stride + d, values.to(base.dtype.element_ty), mask=exists[:, None] & (d < D))


@triton.jit
def _attend(
    q: tl.tensor,
    K: tl.tensor,
    V: tl.tensor,
    ROWS: tl.tensor,
    K_POSITIONS: tl.tensor,
    k_row: tl.tensor,
    v_row: tl.tensor,
    walk: tl.tuple,
    slope: tl.tensor,
    position: tl.tensor,
    highest: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax over ``number`` tiles of table entries: running maximum (to base 2), sum and weighted values of each query.

    The table is read one tile ahead, so that no load of the loop waits for another.
    """
    FACTOR: tl.constexpr = 1.0 if HAS_BIAS else SCALE * LOG2_E
    low, high, number, switch, first, second, stop = walk
    entry = _tile(0, switch, first, second, BLOCK_K)
    row = tl.load(ROWS + entry, mask=entry < stop, other=-1)
    for t in range(number):
        next_entry = _tile(t + 1, switch, first, second, BLOCK_K)
        next_row = tl.load(ROWS + next_entry, mask=next_entry < stop, other=-1)
        k = _load_rows(K, row, k_row, row >= 0, D, BLOCK_D, MASKED)
        scores = _dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_K], out.dtype))
        if HAS_BIAS:
            scores = scores * (SCALE * LOG2_E) - slope * (position[:, None] - tl.load(K_POSITIONS + row, mask=row >= 0, other=0.0)[None, :])
        if MASKED:
            scores = tl.where((entry[None, :] >= low[:, None]) & (entry[None, :] < high[:, None]), scores, float("-inf"))
        now_highest = tl.maximum(highest, tl.max(scores, 1) * FACTOR)
        weights = tl.math.exp2(scores * FACTOR - now_highest[:, None])
        shrink = tl.math.exp2(highest - now_highest)
        v = _load_rows(V, row, v_row, row >= 0, D, BLOCK_D, MASKED)
        out = _dot(weights.to(v.dtype), v, out * shrink[:, None])
        total = total * shrink + tl.sum(weights, 1)
        highest = now_highest
        entry = next_entry
        row = next_row
    return highest, total, out


_UNSPECIALISED = ["num_queries", "num_far", "num_keys", "num_heads"]


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _forward_kernel(
    Q: tl.tensor,
    K: tl.tensor,
    V: tl.tensor,
    BOUNDS: tl.tensor,
    ROWS: tl.tensor,
    SLOPES: tl.tensor,
    Q_POSITIONS: tl.tensor,
    K_POSITIONS: tl.tensor,
    OUT: tl.tensor,
    LSE: tl.tensor,
    q_batch: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v_batch: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    num_queries: tl.tensor,
    num_far: tl.tensor,
    num_keys: tl.tensor,
    num_heads: tl.tensor,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Grid: heads of all rows (neighbours share keys), query blocks from the last one (the longest) down."""
    batch = (tl.program_id(0) // num_heads).to(tl.int64)
    head = tl.program_id(0) % num_heads
    query = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_query = query < num_queries
    place = batch * num_queries * num_heads
    BOUNDS += batch * 4 * num_queries
    ROWS += batch * (num_far + num_keys)
    K += batch * k_batch + (head // GROUP) * k_head
    V += batch * v_batch + (head // GROUP) * v_head
    band, far, whole = _walks(BOUNDS, query, is_query, num_queries, BLOCK_K)
    q = _load_rows(Q + batch * q_batch + head * q_head, query, q_row, is_query, D, BLOCK_D, True)
    slope = 0.0
    position = 0.0
    if HAS_BIAS:
        slope = tl.load(SLOPES + head) * LOG2_E
        position = tl.load(Q_POSITIONS + batch * num_queries + query, mask=is_query, other=0.0)
        K_POSITIONS += batch * num_keys
    highest = tl.full([BLOCK_Q], LOWEST, ACCUMULATE)
    total = tl.zeros([BLOCK_Q], ACCUMULATE)
    out = tl.zeros([BLOCK_Q, BLOCK_D], ACCUMULATE)
    highest, total, out = _attend(
        q, K, V, ROWS, K_POSITIONS, k_row, v_row, band, slope, position, highest, total, out, SCALE, HAS_BIAS, D, BLOCK_D, BLOCK_K, True
    )  # fmt: skip
    highest, total, out = _attend(
        q, K, V, ROWS, K_POSITIONS, k_row, v_row, far, slope, position, highest, total, out, SCALE, HAS_BIAS, D, BLOCK_D, BLOCK_K, True
    )  # fmt: skip
    highest, total, out = _attend(
        q, K, V, ROWS, K_POSITIONS, k_row, v_row, whole, slope, position, highest, total, out, SCALE, HAS_BIAS, D, BLOCK_D, BLOCK_K, False
    )  # fmt: skip
    reads_any = total > 0
    total = tl.where(reads_any, total, 1.0)
    _store_rows(OUT + (place + head) * D, query, num_heads * D, out / total[:, None], is_query, D, BLOCK_D)
    lse = tl.where(reads_any, highest + tl.math.log2(total), float("inf"))
    tl.store(LSE + place + head * num_queries + query, lse, mask=is_query)


@triton.jit
def _query_gradient(
    q: tl.tensor,
    grad_out: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    K: tl.tensor,
    V: tl.tensor,
    ROWS: tl.tensor,
    K_POSITIONS: tl.tensor,
    k_row: tl.tensor,
    v_row: tl.tensor,
    walk: tl.tuple,
    slope: tl.tensor,
    position: tl.tensor,
    dq: tl.tensor,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """The part of dq / scale that ``number`` tiles of table entries give, added to ``dq``."""
    FACTOR: tl.constexpr = 1.0 if HAS_BIAS else SCALE * LOG2_E
    low, high, number, switch, first, second, stop = walk
    entry = _tile(0, switch, first, second, BLOCK_K)
    row = tl.load(ROWS + entry, mask=entry < stop, other=-1)
    for t in range(number):
        next_entry = _tile(t + 1, switch, first, second, BLOCK_K)
        next_row = tl.load(ROWS + next_entry, mask=next_entry < stop, other=-1)
        k = _load_rows(K, row, k_row, row >= 0, D, BLOCK_D, MASKED)
        v = _load_rows(V, row, v_row, row >= 0, D, BLOCK_D, MASKED)
        scores = _dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_K], dq.dtype))
        grad_weights = _dot(grad_out, tl.trans(v), tl.zeros([q.shape[0], BLOCK_K], dq.dtype))
        if HAS_BIAS:
            distance = position[:, None] - tl.load(K_POSITIONS + row, mask=row >= 0, other=0.0)[None, :]
            scores = scores * (SCALE * LOG2_E) - slope * distance
        weights = tl.math.exp2(scores * FACTOR - lse[:, None])
        if MASKED:
            weights = tl.where((entry[None, :] >= low[:, None]) & (entry[None, :] < high[:, None]), weights, 0.0)
        grad_scores = weights * (grad_weights - delta[:, None])
        dq = _dot(grad_scores.to(k.dtype), k, dq)
        entry = next_entry
        row = next_row
    return dq


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _query_gradient_kernel(
    Q: tl.tensor,
    K: tl.tensor,
    V: tl.tensor,
    BOUNDS: tl.tensor,
    ROWS: tl.tensor,
    SLOPES: tl.tensor,
    Q_POSITIONS: tl.tensor,
    K_POSITIONS: tl.tensor,
    OUT: tl.tensor,
    LSE: tl.tensor,
    GRAD_OUT: tl.tensor,
    DELTA: tl.tensor,
    DQ: tl.tensor,
    q_batch: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v_batch: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    grad_batch: tl.tensor,
    grad_row: tl.tensor,
    grad_head: tl.tensor,
    num_queries: tl.tensor,
    num_far: tl.tensor,
    num_keys: tl.tensor,
    num_heads: tl.tensor,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Grid and tiles of the forward. Also writes ``delta``, each query's sum of out times its gradient."""
    batch = (tl.program_id(0) // num_heads).to(tl.int64)
    head = tl.program_id(0) % num_heads
    query = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_query = query < num_queries
    place = batch * num_queries * num_heads
    BOUNDS += batch * 4 * num_queries
    ROWS += batch * (num_far + num_keys)
    K += batch * k_batch + (head // GROUP) * k_head
    V += batch * v_batch + (head // GROUP) * v_head
    grad_out = _load_rows(GRAD_OUT + batch * grad_batch + head * grad_head, query, grad_row, is_query, D, BLOCK_D, True)
    out = _load_rows(OUT + (place + head) * D, query, num_heads * D, is_query, D, BLOCK_D, True)
    delta = tl.sum(out.to(ACCUMULATE) * grad_out.to(ACCUMULATE), 1)
    tl.store(DELTA + place + head * num_queries + query, delta, mask=is_query)
    band, far, whole = _walks(BOUNDS, query, is_query, num_queries, BLOCK_K)
    q = _load_rows(Q + batch * q_batch + head * q_head, query, q_row, is_query, D, BLOCK_D, True)
    lse = tl.load(LSE + place + head * num_queries + query, mask=is_query, other=0.0)
    slope = 0.0
    position = 0.0
    if HAS_BIAS:
        slope = tl.load(SLOPES + head) * LOG2_E
        position = tl.load(Q_POSITIONS + batch * num_queries + query, mask=is_query, other=0.0)
        K_POSITIONS += batch * num_keys
    dq = tl.zeros([BLOCK_Q, BLOCK_D], ACCUMULATE)
    dq = _query_gradient(
        q, grad_out, lse, delta, K, V, ROWS, K_POSITIONS, k_row, v_row, band, slope, position, dq, SCALE, HAS_BIAS, D, BLOCK_D, BLOCK_K, True
    )  # fmt: skip
    dq = _query_gradient(
        q, grad_out, lse, delta, K, V, ROWS, K_POSITIONS, k_row, v_row, far, slope, position, dq, SCALE, HAS_BIAS, D, BLOCK_D, BLOCK_K, True
    )  # fmt: skip
    dq = _query_gradient(
        q, grad_out, lse, delta, K, V, ROWS, K_POSITIONS, k_row, v_row, whole, slope, position, dq, SCALE, HAS_BIAS, D, BLOCK_D, BLOCK_K, False
    )  # fmt: skip
    _store_rows(DQ + (place + head) * D, query, num_heads * D, dq * SCALE, is_query, D, BLOCK_D)


@triton.jit
def _key_gradients(
    k: tl.tensor,
    v: tl.tensor,
    Q: tl.tensor,
    GRAD_OUT: tl.tensor,
    LSE: tl.tensor,
    DELTA: tl.tensor,
    Q_POSITIONS: tl.tensor,
    q_row: tl.tensor,
    grad_row: tl.tensor,
    walk: tl.tuple,
    slope: tl.tensor,
    position: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The part of dk / scale and dv that ``number`` tiles of queries give, added to ``dk`` and ``dv``. Scores are keys by queries."""
    FACTOR: tl.constexpr = 1.0 if HAS_BIAS else SCALE * LOG2_E
    low, high, number, switch, first, second, stop = walk
    for t in range(number):
        query = _tile(t, switch, first, second, BLOCK_Q)
        exists = query < stop
        q = _load_rows(Q, query, q_row, exists, D, BLOCK_D, MASKED)
        grad_out = _load_rows(GRAD_OUT, query, grad_row, exists, D, BLOCK_D, MASKED)
        lse = tl.load(LSE + query, mask=exists, other=0.0)
        delta = tl.load(DELTA + query, mask=exists, other=0.0)
        scores = _dot(k, tl.trans(q), tl.zeros([k.shape[0], BLOCK_Q], dk.dtype))
        if HAS_BIAS:
            distance = tl.load(Q_POSITIONS + query, mask=exists, other=0.0)[None, :] - position[:, None]
            scores = scores * (SCALE * LOG2_E) - slope * distance
        weights = tl.math.exp2(scores * FACTOR - lse[None, :])
        if MASKED:
            weights = tl.where((query[None, :] >= low[:, None]) & (query[None, :] < high[:, None]), weights, 0.0)
        dv = _dot(weights.to(grad_out.dtype), grad_out, dv)
        grad_weights = _dot(v, tl.trans(grad_out), tl.zeros([k.shape[0], BLOCK_Q], dk.dtype))
        grad_scores = weights * (grad_weights - delta[None, :])
        dk = _dot(grad_scores.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _key_gradient_kernel(
    Q: tl.tensor,
    K: tl.tensor,
    V: tl.tensor,
    ROWS: tl.tensor,
    READERS: tl.tensor,
    FAR_COLUMN: tl.tensor,
    SLOPES: tl.tensor,
    Q_POSITIONS: tl.tensor,
    K_POSITIONS: tl.tensor,
    LSE: tl.tensor,
    GRAD_OUT: tl.tensor,
    DELTA: tl.tensor,
    FAR_DK: tl.tensor,
    FAR_DV: tl.tensor,
    DK: tl.tensor,
    DV: tl.tensor,
    q_batch: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v_batch: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    grad_batch: tl.tensor,
    grad_row: tl.tensor,
    grad_head: tl.tensor,
    num_queries: tl.tensor,
    num_far: tl.tensor,
    num_keys: tl.tensor,
    num_heads: tl.tensor,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_FAR: tl.constexpr,
) -> None:
    """Grid: key heads of all rows, tiles of far columns (those with most readers first) or of keys.

    Far columns write sums to their own compact rows; keys start from those of their far column and write the gradients.
    """
    key_heads = num_heads // GROUP
    batch = (tl.program_id(0) // key_heads).to(tl.int64)
    key_head = tl.program_id(0) % key_heads
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    num_columns = num_far if IS_FAR else num_keys
    num_entries = num_far + num_keys
    entry = column if IS_FAR else num_far + column
    is_column = column < num_columns
    place = (batch * num_columns * key_heads + key_head) * D
    READERS += batch * 2 * num_entries
    low = tl.load(READERS + entry, mask=is_column, other=0)
    high = tl.load(READERS + num_entries + entry, mask=is_column, other=0)
    is_read = low < high
    row = tl.load(ROWS + batch * num_entries + entry, mask=is_read, other=0) if IS_FAR else column
    k = _load_rows(K + batch * k_batch + key_head * k_head, row, k_row, is_read, D, BLOCK_D, True)
    v = _load_rows(V + batch * v_batch + key_head * v_head, row, v_row, is_read, D, BLOCK_D, True)
    slope = 0.0
    position = 0.0
    if HAS_BIAS:
        position = tl.load(K_POSITIONS + batch * num_keys + row, mask=is_read, other=0.0)
        Q_POSITIONS += batch * num_queries
    if IS_FAR:
        dk = tl.zeros([BLOCK_K, BLOCK_D], ACCUMULATE)
        dv = tl.zeros([BLOCK_K, BLOCK_D], ACCUMULATE)
    else:
        far = tl.load(FAR_COLUMN + batch * num_keys + column, mask=is_column, other=-1)
        far_place = (batch * num_far * key_heads + key_head) * D
        dk = _load_rows(FAR_DK + far_place, far, key_heads * D, far >= 0, D, BLOCK_D, True)
        dv = _load_rows(FAR_DV + far_place, far, key_heads * D, far >= 0, D, BLOCK_D, True)
    counts = is_read if IS_FAR else is_column  # nobody asks for the sums of an unread far column
    start, stop, number, full, before = _span(low, high, counts, BLOCK_Q)
    edges = (low, high, number - full, before, start, start + full * BLOCK_Q, stop)
    whole = (low, high, full, full, start + before * BLOCK_Q, start, stop)
    for member in range(GROUP):
        head = key_head * GROUP + member
        if HAS_BIAS:
            slope = tl.load(SLOPES + head) * LOG2_E
        q_place = Q + batch * q_batch + head * q_head
        grad_place = GRAD_OUT + batch * grad_batch + head * grad_head
        lse_place = LSE + (batch * num_heads + head) * num_queries
        delta_place = DELTA + (batch * num_heads + head) * num_queries
        dk, dv = _key_gradients(
            k, v, q_place, grad_place, lse_place, delta_place, Q_POSITIONS, q_row, grad_row, edges, slope, position,
            dk, dv, SCALE, HAS_BIAS, D, BLOCK_D, BLOCK_Q, True
        )  # fmt: skip
        dk, dv = _key_gradients(
            k, v, q_place, grad_place, lse_place, delta_place, Q_POSITIONS, q_row, grad_row, whole, slope, position,
            dk, dv, SCALE, HAS_BIAS, D, BLOCK_D, BLOCK_Q, False
        )  # fmt: skip
    if IS_FAR:
        _store_rows(FAR_DK + place, column, key_heads * D, dk, is_column, D, BLOCK_D)
        _store_rows(FAR_DV + place, column, key_heads * D, dv, is_column, D, BLOCK_D)
    else:
        _store_rows(DK + place, column, key_heads * D, dk * SCALE, is_column, D, BLOCK_D)
        _store_rows(DV + place, column, key_heads * D, dv, is_column, D, BLOCK_D)


def sep_attention_triton(q: Tensor, k: Tensor, v: Tensor, tables: Tables, *, scale: float, bias: Bias | None = None) -> Tensor:
    """Attention of each query over the table entries between its bounds. ``[B, T, N, D]``, contiguous, dtype of q.

    ``q [B, T, N, D]``; ``k``, ``v`` ``[B, S, K, D]`` with N a multiple of K; any strides whose last is 1. A query that reads nothing
    gives zeros. Sums are kept in float32 (of float64 in float64: the interpreter only), and float32 is never rounded to tf32.
    Differentiable in q, k and v.
    """
    if scale <= 0:
        raise ValueError(f"scale is {scale}: the Triton kernels take their maxima before scaling and need a positive one.")
    if q.shape[3] > LARGEST_HEAD:
        raise ValueError(f"The head size is {q.shape[3]}: the Triton kernels keep a head in registers and go up to {LARGEST_HEAD}.")
    slopes, query_positions, key_positions = bias or (None, None, None)
    out, _ = _operator(q, k, v, *tables, slopes, query_positions, key_positions, scale)
    return out


def is_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors."""
    return bool(INTERPRETED.value)


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
) -> tuple[Tensor, Tensor]:
    """``out [B, T, N, D]`` and ``lse [B, N, T]``: the logarithm *to base 2* of each query's sum of exponentials, inf where nothing is read."""
    bias = _bias(slopes, query_positions, key_positions)
    return forward(q, k, v, Tables(bounds, rows, readers, far_column), scale=scale, bias=bias)


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=_accumulator(q.dtype))


@torch.library.custom_op("sepllm::sep_attention_triton_backward", mutates_args=())
def _backward_operator(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    rows: Tensor,
    readers: Tensor,
    far_column: Tensor,
    slopes: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    bias = _bias(slopes, query_positions, key_positions)
    return backward(grad_out, q, k, v, out, lse, Tables(bounds, rows, readers, far_column), scale=scale, bias=bias)


@_backward_operator.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    q, k, v, *tables_and_bias, out, lse = ctx.saved_tensors
    nothing = (None,) * (len(tables_and_bias) + 1)
    if grad_out is None:
        return (None, None, None, *nothing)
    return (*_backward_operator(grad_out, q, k, v, out, lse, *tables_and_bias, ctx.scale), *nothing)


_operator.register_autograd(_backward, setup_context=_save_for_backward)


def forward(
    q: Tensor, k: Tensor, v: Tensor, tables: Tables, *, scale: float, bias: Bias | None = None, division: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel: ``out`` and ``lse`` as the operator gives them. ``division`` replaces the table's tiles."""
    q, k, v = (_with_dense_rows(tensor) for tensor in (q, k, v))
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=_accumulator(q.dtype))
    tile = (division or tiles(q.shape[3], q.dtype, _capability(q))).forward
    with _device_of(q):
        _forward_kernel[_grid(q, q.shape[1], tile.queries)](
            q,
            k,
            v,
            tables.bounds,
            tables.rows,
            *_bias_arguments(bias),
            out,
            lse,
            *_strides(q, k, v),
            **_sizes(q, k, tables, scale, bias),
            **_shape(tile),
        )
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tables: Tables,
    *,
    scale: float,
    bias: Bias | None = None,
    division: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the three backward kernels, one after the other: gradients of q, k and v."""
    q, k, v, grad_out = (_with_dense_rows(tensor) for tensor in (q, k, v, grad_out))
    division = division or tiles(q.shape[3], q.dtype, _capability(q))
    num_far = tables.rows.shape[1] - k.shape[1]
    delta = torch.empty_like(lse)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    far_dk, far_dv = (k.new_empty((k.shape[0], num_far, *k.shape[2:]), dtype=lse.dtype) for _ in range(2))
    strides, sizes, positions = _strides(q, k, v, grad_out), _sizes(q, k, tables, scale, bias), _bias_arguments(bias)
    of_keys = (q, k, v, tables.rows, tables.readers, tables.far_column, *positions, lse, grad_out, delta, far_dk, far_dv, dk, dv, *strides)
    with _device_of(q):
        _query_gradient_kernel[_grid(q, q.shape[1], division.queries.queries)](
            q, k, v, tables.bounds, tables.rows, *positions, out, lse, grad_out, delta, dq, *strides, **sizes, **_shape(division.queries)
        )
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


def _sizes(q: Tensor, k: Tensor, tables: Tables, scale: float, bias: Bias | None) -> dict[str, object]:
    return {
        "num_queries": q.shape[1],
        "num_far": tables.rows.shape[1] - k.shape[1],
        "num_keys": k.shape[1],
        "num_heads": q.shape[2],
        "SCALE": scale,
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

"""The Triton kernels of `sep_attention_triton`: how a block of queries, or a tile of keys, goes through the table of those it reads.

The self-adjust softmax multiplies each weight by ``score * gain + offset``; see `sepllm.ops.attention_reference.Adjustment`.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(math.log2(math.e))
NEVER = tl.constexpr(2**30)
LOWEST = tl.constexpr(-1.0e30)
STANDARD = tl.constexpr(0)
RAW = tl.constexpr(1)
NORMALISED = tl.constexpr(2)
NO_KEY = tl.constexpr(-2)
"""An extreme that is the 0, or of a query that reads nothing. Not -1, which is the key of entries that nobody reads."""


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
def _lower(value: tl.tensor, key: tl.tensor, scores: tl.tensor, rows: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The lower of a running minimum of each query and that of a tile's ``scores``, with the first key that has it."""
    of_tile = tl.min(scores, 1)
    key_of_tile = tl.min(tl.where(scores == of_tile[:, None], rows[None, :], NEVER), 1)
    is_lower = (of_tile < value) | ((of_tile == value) & (key_of_tile < key))
    return tl.where(is_lower, of_tile, value), tl.where(is_lower, key_of_tile, key)


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
    state: tl.tuple,
    SCALE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tuple:
    """Online softmax over a walk's tiles. State of each query: maximum so far (to base 2), sum of weights, weighted values; of the
    self-adjust softmax also values weighted by weight and score; of the normalised one its lowest and (minus) its highest score and
    the first keys that have them.

    The table is read one tile ahead, so that no load of the loop waits for another.
    """
    highest, total, out, scored, lowest, lowest_key, minus_top, top_key = state
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
        plain = scores * (FACTOR / LOG2_E)
        if MASKED:
            is_inside = (entry[None, :] >= low[:, None]) & (entry[None, :] < high[:, None])
            scores = tl.where(is_inside, scores, float("-inf"))
        now_highest = tl.maximum(highest, tl.max(scores, 1) * FACTOR)
        weights = tl.math.exp2(scores * FACTOR - now_highest[:, None])
        shrink = tl.math.exp2(highest - now_highest)
        v = _load_rows(V, row, v_row, row >= 0, D, BLOCK_D, MASKED)
        out = _dot(weights.to(v.dtype), v, out * shrink[:, None])
        if SOFTMAX != STANDARD:
            scored = _dot((weights * plain).to(v.dtype), v, scored * shrink[:, None])
        if SOFTMAX == NORMALISED and MASKED:
            lowest, lowest_key = _lower(lowest, lowest_key, tl.where(is_inside, plain, float("inf")), row)
            minus_top, top_key = _lower(minus_top, top_key, tl.where(is_inside, -plain, float("inf")), row)
        elif SOFTMAX == NORMALISED:
            lowest, lowest_key = _lower(lowest, lowest_key, plain, row)
            minus_top, top_key = _lower(minus_top, top_key, -plain, row)
        total = total * shrink + tl.sum(weights, 1)
        highest = now_highest
        entry = next_entry
        row = next_row
    return highest, total, out, scored, lowest, lowest_key, minus_top, top_key


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
    GAINS: tl.tensor,
    EXTREME_KEYS: tl.tensor,
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
    SOFTMAX: tl.constexpr,
    NUMERATOR_BIAS: tl.constexpr,
    DENOMINATOR_BIAS: tl.constexpr,
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
    head = (tl.program_id(0) % num_heads).to(tl.int64)
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
    scored = tl.zeros([BLOCK_Q, BLOCK_D], ACCUMULATE)
    unknown = tl.full([BLOCK_Q], float("inf"), ACCUMULATE)
    no_key = tl.full([BLOCK_Q], NEVER, tl.int32)
    state = (highest, total, out, scored, unknown, no_key, unknown, no_key)
    state = _attend(q, K, V, ROWS, K_POSITIONS, k_row, v_row, band, slope, position, state, SCALE, SOFTMAX, HAS_BIAS, D, BLOCK_D, BLOCK_K, True)
    state = _attend(q, K, V, ROWS, K_POSITIONS, k_row, v_row, far, slope, position, state, SCALE, SOFTMAX, HAS_BIAS, D, BLOCK_D, BLOCK_K, True)
    state = _attend(q, K, V, ROWS, K_POSITIONS, k_row, v_row, whole, slope, position, state, SCALE, SOFTMAX, HAS_BIAS, D, BLOCK_D, BLOCK_K, False)
    highest, total, out, scored, lowest, lowest_key, minus_top, top_key = state
    reads_any = total > 0
    total = tl.where(reads_any, total, 1.0)
    if SOFTMAX == RAW:
        out = scored
    if SOFTMAX == NORMALISED:
        top = tl.where(reads_any, DENOMINATOR_BIAS - minus_top, 0.0)
        lowest = tl.where(reads_any, lowest, 0.0)
        gain = 1.0 / (tl.maximum(top, 0.0) + DENOMINATOR_BIAS - tl.minimum(lowest, 0.0))
        gain = tl.where(reads_any, gain, 0.0)
        offset = (NUMERATOR_BIAS - tl.minimum(lowest, 0.0)) * gain
        out = scored * gain[:, None] + out * offset[:, None]
        pair = 2 * (place + head * num_queries)
        tl.store(GAINS + pair + query, gain, mask=is_query)
        tl.store(GAINS + pair + num_queries + query, offset, mask=is_query)
        tl.store(EXTREME_KEYS + pair + query, tl.where(lowest < 0, lowest_key, NO_KEY), mask=is_query)
        tl.store(EXTREME_KEYS + pair + num_queries + query, tl.where(reads_any & (top > 0), top_key, NO_KEY), mask=is_query)
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
    gain: tl.tensor,
    offset: tl.tensor,
    dq: tl.tensor,
    mean: tl.tensor,
    SCALE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The part of dq / scale that a walk's tiles give, added to ``dq``; and, added to ``mean``, the softmax's mean of the gradient of
    each weight."""
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
        if SOFTMAX == STANDARD:
            grad_scores = weights * (grad_weights - delta[:, None])
        else:
            adjusted = scores * (FACTOR / LOG2_E) * gain[:, None] + offset[:, None]
            grad_scores = weights * (grad_weights * (adjusted + gain[:, None]) - delta[:, None])
            mean += tl.sum(weights * grad_weights, 1)
        dq = _dot(grad_scores.to(k.dtype), k, dq)
        entry = next_entry
        row = next_row
    return dq, mean


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
    GAINS: tl.tensor,
    EXTREME_KEYS: tl.tensor,
    OWED: tl.tensor,
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
    SOFTMAX: tl.constexpr,
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
    head = (tl.program_id(0) % num_heads).to(tl.int64)
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
    mean = tl.zeros([BLOCK_Q], ACCUMULATE)
    pair = 2 * (place + head * num_queries)
    gain = tl.full([BLOCK_Q], 1.0, ACCUMULATE)
    offset = tl.zeros([BLOCK_Q], ACCUMULATE)
    if SOFTMAX == NORMALISED:
        gain = tl.load(GAINS + pair + query, mask=is_query, other=0.0)
        offset = tl.load(GAINS + pair + num_queries + query, mask=is_query, other=0.0)
    dq, mean = _query_gradient(
        q, grad_out, lse, delta, K, V, ROWS, K_POSITIONS, k_row, v_row, band, slope, position, gain, offset, dq, mean,
        SCALE, SOFTMAX, HAS_BIAS, D, BLOCK_D, BLOCK_K, True
    )  # fmt: skip
    dq, mean = _query_gradient(
        q, grad_out, lse, delta, K, V, ROWS, K_POSITIONS, k_row, v_row, far, slope, position, gain, offset, dq, mean,
        SCALE, SOFTMAX, HAS_BIAS, D, BLOCK_D, BLOCK_K, True
    )  # fmt: skip
    dq, mean = _query_gradient(
        q, grad_out, lse, delta, K, V, ROWS, K_POSITIONS, k_row, v_row, whole, slope, position, gain, offset, dq, mean,
        SCALE, SOFTMAX, HAS_BIAS, D, BLOCK_D, BLOCK_K, False
    )  # fmt: skip
    if SOFTMAX == NORMALISED:
        for extreme in tl.static_range(2):
            key = tl.load(EXTREME_KEYS + pair + extreme * num_queries + query, mask=is_query, other=NO_KEY)
            owed = tl.where(key >= 0, (delta - mean) * gain if extreme == 0 else -delta * gain, 0.0)
            tl.store(OWED + pair + extreme * num_queries + query, owed, mask=is_query)
            dq += owed[:, None] * _load_rows(K, key, k_row, key >= 0, D, BLOCK_D, True)
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
    GAINS: tl.tensor,
    EXTREME_KEYS: tl.tensor,
    OWED: tl.tensor,
    num_queries: tl.tensor,
    q_row: tl.tensor,
    grad_row: tl.tensor,
    row: tl.tensor,
    walk: tl.tuple,
    slope: tl.tensor,
    position: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    SCALE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The part of dk / scale and dv that a walk's tiles of queries give, added to ``dk`` and ``dv``. Scores are keys by queries."""
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
            is_inside = (query[None, :] >= low[:, None]) & (query[None, :] < high[:, None])
            weights = tl.where(is_inside, weights, 0.0)
        adjusted = 1.0
        gain = 0.0
        if SOFTMAX != STANDARD:
            adjusted = scores * (FACTOR / LOG2_E)
            gain = 1.0
        if SOFTMAX == NORMALISED:
            gain = tl.load(GAINS + query, mask=exists, other=0.0)[None, :]
            adjusted = adjusted * gain + tl.load(GAINS + num_queries + query, mask=exists, other=0.0)[None, :]
        dv = _dot((weights * adjusted).to(grad_out.dtype), grad_out, dv)
        grad_weights = _dot(v, tl.trans(grad_out), tl.zeros([k.shape[0], BLOCK_Q], dk.dtype))
        grad_scores = weights * (grad_weights * (adjusted + gain) - delta[None, :])
        if SOFTMAX == NORMALISED:
            for extreme in tl.static_range(2):
                key = tl.load(EXTREME_KEYS + extreme * num_queries + query, mask=exists, other=NO_KEY)
                owed = tl.load(OWED + extreme * num_queries + query, mask=exists, other=0.0)
                owes = row[:, None] == key[None, :]
                if MASKED:
                    owes = owes & is_inside
                grad_scores += tl.where(owes, owed[None, :], 0.0)
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
    GAINS: tl.tensor,
    EXTREME_KEYS: tl.tensor,
    OWED: tl.tensor,
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
    SOFTMAX: tl.constexpr,
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
    key_head = (tl.program_id(0) % key_heads).to(tl.int64)
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
    row = tl.load(ROWS + batch * num_entries + entry, mask=is_read, other=-1) if IS_FAR else column
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
        sums = (batch * num_heads + head) * num_queries
        if SOFTMAX == NORMALISED:
            gains, keys, owed = GAINS + 2 * sums, EXTREME_KEYS + 2 * sums, OWED + 2 * sums
        else:
            gains, keys, owed = GAINS, EXTREME_KEYS, OWED
        dk, dv = _key_gradients(
            k, v, q_place, grad_place, LSE + sums, DELTA + sums, Q_POSITIONS, gains, keys, owed, num_queries, q_row, grad_row,
            row, edges, slope, position, dk, dv, SCALE, SOFTMAX, HAS_BIAS, D, BLOCK_D, BLOCK_Q, True
        )  # fmt: skip
        dk, dv = _key_gradients(
            k, v, q_place, grad_place, LSE + sums, DELTA + sums, Q_POSITIONS, gains, keys, owed, num_queries, q_row, grad_row,
            row, whole, slope, position, dk, dv, SCALE, SOFTMAX, HAS_BIAS, D, BLOCK_D, BLOCK_Q, False
        )  # fmt: skip
    if IS_FAR:
        _store_rows(FAR_DK + place, column, key_heads * D, dk, is_column, D, BLOCK_D)
        _store_rows(FAR_DV + place, column, key_heads * D, dv, is_column, D, BLOCK_D)
    else:
        _store_rows(DK + place, column, key_heads * D, dk * SCALE, is_column, D, BLOCK_D)
        _store_rows(DV + place, column, key_heads * D, dv, is_column, D, BLOCK_D)

"""torch's compiled flex_attention over ``[far ; keys]``: one softmax over the far keys, gathered in order, and all keys behind them.

In that order of columns a query reads two intervals, so which blocks of columns a block of queries reads follows from the queries'
bounds: no mask is evaluated to find out. Lengths grow to buckets, so that one compilation serves many batches:

    columns   [ a a , . ? - - | a a . . , . . . . ? . . . - - ]        - filler, read by nobody
    query          [ far ]                    [ band  ]

Beside the copies of keys and values that takes four tables of ``B * (T / BLOCK) * (C / BLOCK)`` int32, C = M + S columns: with blocks of
128, 1.3 MB a row of 32768 tokens of which a quarter is far. All heads share them, and all layers with the same ranges.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from sepllm.attention.spec import AttentionSpec, Core, PositionBias
from sepllm.layout import KeyRanges
from sepllm.pattern import Softmax, Standard

BLOCK = {"cpu": 64, "cuda": 128}
"""Queries, and columns, in a block of the mask. 128 is flex_attention's default, which every tile that it chooses for a GPU divides. On a
CPU 64 takes 0.74 and 0.85 of its time at S = 2048 and 8192 (fp32, window 64, one thread); 32 takes a tenth less yet, and tables four times
as large."""

SMALLEST_HEAD = 16
"""Below this head size flex_attention has no CUDA kernel; such heads are filled up with zeros."""

COMPILATIONS = 64
"""Shapes (after bucketing) that one process may compile, for training and for inference each. torch's own limit of 8 is soon used up: by prompts
of all lengths, and in training by windows, far capacities and the rows of an evaluation."""

_COMPILES_FOR_CPU = torch.backends.cpu.get_cpu_capability().startswith("AVX") and sys.platform != "darwin"

_Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def unsupported(spec: AttentionSpec) -> str | None:
    if not isinstance(spec.softmax, Standard):
        return "only the standard softmax"
    if spec.dropout:
        return "no dropout"
    if spec.device_type not in BLOCK:
        return "torch compiles flex_attention for CPU and CUDA only"
    if spec.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "torch compiles flex_attention for float32, bfloat16 and float16 only"
    if spec.device_type == "cpu" and spec.needs_grad:
        return "torch's flex_attention has no backward on the CPU"
    if spec.device_type == "cpu" and not _COMPILES_FOR_CPU:
        return "torch compiles flex_attention for CPUs with AVX2 on Linux and Windows only"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, *, scale: float, softmax: Softmax, bias: PositionBias | None, dropout: float
) -> Tensor:
    prepared: _Prepared = ranges.derived["flex"]
    if torch.compiler.is_compiling():
        return _attention(q, k, v, prepared, scale, bias, _kernel)
    with torch._dynamo.config.patch(recompile_limit=COMPILATIONS):
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return _training()(q, k, v, prepared, scale, bias, _kernel)
        return _attention(q, k, v, prepared, scale, bias, _inference())


@functools.cache
def _training() -> Callable[..., Tensor]:
    """Everything in one compilation, which fuses the copies: lengths repeat from step to step."""
    return torch.compile(_attention, fullgraph=True, dynamic=False)


@functools.cache
def _inference() -> Callable[..., Tensor]:
    """The kernel alone: it sees lengths in buckets, whatever the texts' own are."""
    return torch.compile(_kernel, fullgraph=True, dynamic=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    block_mask: BlockMask
    """Of T queries, grown to a bucket, over C columns."""
    index: Tensor
    """``[B, M, 1, 1]`` int64: key of each far column; M is grown to a bucket, with zeros."""
    far_column: Tensor
    """``[B, S, 1, 1]`` int64: the far column in which each key stands; M for keys in none that is read."""
    unread: Tensor
    """``[B, S, 1, 1]`` bool: keys that no query reads."""

    def fill(self, x: Tensor) -> Tensor:
        """``x [B, S, ...]`` grown to the columns behind the far ones, with zeros."""
        return _grown(x, self.block_mask.seq_lengths[1] - self.index.shape[1])


def prepare(ranges: KeyRanges) -> None:
    block = BLOCK[ranges.index.device.type]
    num_far = _bucket(ranges.index.shape[1], block)
    lengths = (_bucket(ranges.far_lo.shape[1], block), num_far + _bucket(ranges.num_keys, block))
    far, band = (ranges.far_lo, ranges.far_hi), (ranges.band_lo + num_far, ranges.band_hi + num_far)
    of_far, of_band = (_block_tables(*bounds, lengths, block) for bounds in (far, band))
    index = _grown(ranges.index, num_far).long()
    ranges.derived["flex"] = _Prepared(
        block_mask=_block_mask(of_far | of_band, _mask(*(_grown(bound, lengths[0]) for bound in (*far, *band))), lengths, block),
        index=index[..., None, None],
        far_column=_far_column(index, ranges.far_hi[:, -1:], ranges.num_keys)[..., None, None],
        unread=ranges.unread_keys()[..., None, None],
    )


def _bucket(count: int, block: int) -> int:
    """``count`` rounded up to whole blocks, of which only the three leading binary digits count: at most a quarter too many above 8."""
    blocks = max(-(-count // block), 1)
    step = 1 << max(blocks.bit_length() - 3, 0)
    return -(-blocks // step) * step * block


def _grown(x: Tensor, length: int) -> Tensor:
    """``x [B, S, ...]`` with zeros up to ``length`` in place of S."""
    return x if x.shape[1] == length else pad(x, (0, 0) * (x.ndim - 2) + (0, length - x.shape[1]))


def _block_tables(low: Tensor, high: Tensor, lengths: tuple[int, int], block: int) -> Tensor:
    """Which blocks hold a pair ``low <= column < high``, and which hold nothing else. ``[2, B, queries / block, columns / block]`` bool.

    ``low``, ``high`` ``[B, T]``. As they never decrease, the queries that may read a block of columns lie between two that a binary
    search finds; of those, the ones that read anything read the block. A block with queries beyond T is never full.
    """
    batch, num_queries = low.shape
    low, high = low.contiguous(), high.contiguous()
    query, column = (torch.arange(0, length, block, dtype=torch.int32, device=low.device) for length in lengths)
    start, end = query.clamp(max=num_queries)[:, None], (query + block).clamp(max=num_queries)[:, None]
    first = torch.searchsorted(high, column.repeat(batch, 1), right=True, out_int32=True)[:, None].clamp(start, end)
    after = torch.searchsorted(low, (column + block).repeat(batch, 1), out_int32=True)[:, None].clamp(first, end)
    readers_before = pad((high > low).cumsum(1), (1, 0))
    first_count, after_count = (readers_before.gather(1, at.flatten(1).long()).view(at.shape) for at in (first, after))
    first_query, last_query = start[:, 0].clamp(max=num_queries - 1), end[:, 0] - 1
    reads_all = (low[:, last_query, None] <= column) & (high[:, first_query, None] >= column + block)
    return torch.stack([after_count > first_count, reads_all & (end - start == block)])


def _block_mask(tables: Tensor, mask: _Mask, lengths: tuple[int, int], block: int) -> BlockMask:
    touched, full = tables
    by_query = torch.stack([touched & ~full, full])
    (kv_num, full_kv_num), (kv_indices, full_kv_indices) = _ordered(by_query)
    (q_num, full_q_num), (q_indices, full_q_indices) = _ordered(by_query.mT)
    return BlockMask(
        seq_lengths=lengths,
        kv_num_blocks=kv_num,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q_num,
        q_indices=q_indices,
        full_q_num_blocks=full_q_num,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=(block, block),
        mask_mod=mask,
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are set, and all block columns, those first: the form in which a BlockMask stores them."""
    columns = torch.argsort(blocks.to(torch.int8, memory_format=torch.contiguous_format), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, :, None], columns.int()[:, :, None]


def _mask(far_lo: Tensor, far_hi: Tensor, band_lo: Tensor, band_hi: Tensor) -> _Mask:
    """Whether a query reads a column, from the bounds ``[B, T]``."""
    if not torch.compiler.is_compiling():
        for bound in (far_lo, far_hi, band_lo, band_hi):
            # torch 2.13 writes wrong C++ for sizes of captured tensors that it took as variable: ks1 is replaced inside of ks19
            torch._dynamo.mark_static(bound)

    def reads(b: Tensor, h: Tensor, query: Tensor, column: Tensor) -> Tensor:
        is_far = (column >= far_lo[b, query]) & (column < far_hi[b, query])
        return is_far | ((column >= band_lo[b, query]) & (column < band_hi[b, query]))

    return reads


def _far_column(index: Tensor, num_used: Tensor, num_keys: int) -> Tensor:
    """The far column in which each key stands; M for keys in none that is read. ``index [B, M]``, ``num_used [B, 1]`` -> ``[B, S]`` int64."""
    batch, num_far = index.shape
    column = torch.arange(num_far, device=index.device).expand(batch, -1)
    found = torch.full((batch, num_keys + 1), num_far, device=index.device)
    return found.scatter_(1, torch.where(column < num_used, index, num_keys), column)[:, :-1]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, prepared: _Prepared, scale: float, bias: PositionBias | None, kernel: Callable[..., Tensor]
) -> Tensor:
    num_queries, head_size = q.shape[1], q.shape[3]
    if q.device.type == "cuda" and head_size < SMALLEST_HEAD:
        q, k, v = (pad(x, (0, SMALLEST_HEAD - head_size)) for x in (q, k, v))
    queries = _grown(q, prepared.block_mask.seq_lengths[0])
    score = None if bias is None else _score(bias, prepared)
    out = kernel(queries, _columns(k, prepared), _columns(v, prepared), prepared.block_mask, scale, score)
    return out[:, :num_queries, :, :head_size]


def _kernel(q: Tensor, keys: Tensor, values: Tensor, block_mask: BlockMask, scale: float, score: _Score | None) -> Tensor:
    """``q [B, T, N, H]``, ``keys`` and ``values`` ``[B, C, K, H]`` -> ``[B, T, N, H]``. Rows of the mask that are empty give zeros.

    They exist (padding), so ROWS_GUARANTEED_SAFE stays unset; tiles are left to torch, which picks them by device, dtype and head size.
    """
    out = flex_attention(
        q.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        score_mod=score,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=q.shape[2] != keys.shape[2],
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def _columns(x: Tensor, prepared: _Prepared) -> Tensor:
    """Far keys, then all keys: ``x [B, S, K, H]`` -> ``[B, C, K, H]``. What unread keys hold is cleared: 0 * NaN is NaN."""
    out: Tensor = _Columns.apply(x, prepared)
    return out


class _Columns(torch.autograd.Function):
    """A key stands in one far column at most, so the backward gathers as the forward does: no atomics, the same sum every time.

    Columns that nobody reads get no gradient and pass none on.
    """

    @staticmethod
    def forward(ctx, x: Tensor, prepared: _Prepared) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.prepared = prepared
        x = x.masked_fill(prepared.unread, 0)
        far = x.gather(1, prepared.index.expand(-1, -1, *x.shape[2:]))
        return torch.cat([far, prepared.fill(x)], 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        prepared: _Prepared = ctx.prepared
        num_far, num_keys = prepared.index.shape[1], prepared.far_column.shape[1]
        column = prepared.far_column.clamp(max=num_far - 1).expand(-1, -1, *grad.shape[2:])
        of_far = grad.gather(1, column).masked_fill(prepared.far_column == num_far, 0)
        return grad[:, num_far : num_far + num_keys] + of_far, None


def _score(bias: PositionBias, prepared: _Prepared) -> _Score:
    """Adds ALiBi to a score."""
    queries = _grown(bias.query_positions, prepared.block_mask.seq_lengths[0])
    far = bias.key_positions.gather(1, prepared.index[..., 0, 0])
    keys = torch.cat([far, prepared.fill(bias.key_positions)], 1)
    slopes = bias.slopes

    def add_bias(score: Tensor, b: Tensor, h: Tensor, query: Tensor, column: Tensor) -> Tensor:
        return score - slopes[h] * (queries[b, query] - keys[b, column])

    return add_bias


FLEX = Core(name="flex", unsupported=unsupported, attention=attention, prepare=prepare)

"""Plain torch, any device: chunk by chunk, one stock attention call over the far prefix and the slab of the band.

A chunk of C queries needs the far columns that any of them reads and at most C + n - 1 band keys; both are contiguous, so they are
sliced, joined and masked. Memory is O(S * (M + n)) bits of mask for all layers together and O(C * (M + n)) scores at a time.
The backward computes each chunk again, so that gradients of keys are added into one buffer instead of one per chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sepllm.attention.spec import AttentionSpec, Core, PositionBias
from sepllm.layout import KeyRanges
from sepllm.pattern import Softmax, Standard

CHUNK = 128
"""Queries per chunk. Smaller wastes less of the band's slab, larger makes fewer calls; 64 and 128 are within 10 % of one another at
S = 1024 to 4096 on one CPU core, 32 and 256 are slower."""


def unsupported(spec: AttentionSpec) -> str | None:
    if not isinstance(spec.softmax, Standard):
        return "only the standard softmax"
    if spec.dropout:
        return "no dropout"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, *, scale: float, softmax: Softmax, bias: PositionBias | None, dropout: float
) -> Tensor:
    unread = ranges.derived["chunked"].unread
    if unread is not None:  # they may hold anything, NaN included
        k, v = k.masked_fill(unread, 0), v.masked_fill(unread, 0)
    out: Tensor = _Chunked.apply(q, k, v, ranges, scale, bias)
    return out


def prepare(ranges: KeyRanges) -> None:
    unread = ranges.unread_keys()
    ranges.derived["chunked"] = _Prepared(chunks=tuple(_chunks(ranges)), unread=unread[..., None, None] if bool(unread.any()) else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    chunks: tuple[_Chunk, ...]
    unread: Tensor | None
    """``[B, S, 1, 1]`` bool: keys that no query reads. None where there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    queries: slice
    far: slice
    band: slice
    hidden: Tensor
    """``[B, 1, C, far + band]`` bool. A query that reads nothing hides nothing here; its output is cleared."""
    is_empty: Tensor | None
    """``[B, C, 1, 1]`` bool: queries that read nothing. None where there are none."""


def _chunks(ranges: KeyRanges) -> Iterator[_Chunk]:
    lows = torch.stack([ranges.far_lo, ranges.band_lo]).cpu()
    highs = torch.stack([ranges.far_hi, ranges.band_hi]).cpu()
    is_empty = (ranges.read_keys() == 0).cpu()
    device = ranges.index.device
    for start in range(0, is_empty.shape[1], CHUNK):
        queries = slice(start, min(start + CHUNK, is_empty.shape[1]))
        far, band = _hull(lows[0, :, queries], highs[0, :, queries]), _hull(lows[1, :, queries], highs[1, :, queries])
        far_column, key = torch.arange(far.start, far.stop), torch.arange(band.start, band.stop)
        low, high, empty = lows[:, :, queries, None], highs[:, :, queries, None], is_empty[:, queries]
        reads = torch.cat([(far_column >= low[0]) & (far_column < high[0]), (key >= low[1]) & (key < high[1])], -1)
        yield _Chunk(
            queries=queries,
            far=far,
            band=band,
            hidden=~(reads | empty[..., None])[:, None].to(device),
            is_empty=empty[:, :, None, None].to(device) if bool(empty.any()) else None,
        )


def _hull(low: Tensor, high: Tensor) -> slice:
    """The columns that any query of a chunk reads."""
    is_used = high > low
    if not bool(is_used.any()):
        return slice(0, 0)
    return slice(int(low[is_used].min()), int(high[is_used].max()))


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Far keys of every row, in order. ``x [B, S, K, H]``, ``index [B, M]`` -> ``[B, K, M, H]``."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[rows, index.long()].transpose(1, 2)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, scale: float, bias: PositionBias | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, v)
        ctx.ranges, ctx.scale, ctx.bias = ranges, scale, bias
        out = torch.empty_like(q)
        far_k, far_v = _gather(k, ranges.index), _gather(v, ranges.index)
        for chunk in ranges.derived["chunked"].chunks:
            keys, values = _joined(far_k, k, chunk), _joined(far_v, v, chunk)
            out[:, chunk.queries] = _one(q[:, chunk.queries], keys, values, chunk, ranges, scale, bias)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        q, k, v = ctx.saved_tensors
        ranges: KeyRanges = ctx.ranges
        far_k, far_v = _gather(k, ranges.index), _gather(v, ranges.index)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad_far_k, grad_far_v = torch.zeros_like(far_k), torch.zeros_like(far_v)
        for chunk in ranges.derived["chunked"].chunks:
            with torch.enable_grad():
                queries = q[:, chunk.queries].detach().requires_grad_()
                keys = _joined(far_k, k, chunk).detach().requires_grad_()
                values = _joined(far_v, v, chunk).detach().requires_grad_()
                out = _one(queries, keys, values, chunk, ranges, ctx.scale, ctx.bias)
            gradients = torch.autograd.grad(out, (queries, keys, values), grad_out[:, chunk.queries])
            grad_q[:, chunk.queries], of_keys, of_values = gradients
            num_far = chunk.far.stop - chunk.far.start
            grad_far_k[:, :, chunk.far] += of_keys[:, :, :num_far]
            grad_far_v[:, :, chunk.far] += of_values[:, :, :num_far]
            grad_k[:, chunk.band] += of_keys[:, :, num_far:].transpose(1, 2)
            grad_v[:, chunk.band] += of_values[:, :, num_far:].transpose(1, 2)
        index = ranges.index.long()[:, :, None, None].expand(-1, -1, *k.shape[2:])
        grad_k.scatter_add_(1, index, grad_far_k.transpose(1, 2))
        grad_v.scatter_add_(1, index, grad_far_v.transpose(1, 2))
        return grad_q, grad_k, grad_v, None, None, None


def _joined(far: Tensor, x: Tensor, chunk: _Chunk) -> Tensor:
    """``[B, K, far + band, H]``"""
    return torch.cat([far[:, :, chunk.far], x[:, chunk.band].transpose(1, 2)], 2)


def _one(q: Tensor, keys: Tensor, values: Tensor, chunk: _Chunk, ranges: KeyRanges, scale: float, bias: PositionBias | None) -> Tensor:
    """Attention of one chunk. ``q [B, C, N, H]``, keys and values as `_joined` makes them."""
    if not keys.shape[2]:
        return q * 0
    mask = torch.zeros(chunk.hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(chunk.hidden, float("-inf"))
    if bias is not None:
        mask = mask + _bias(bias, chunk, ranges).to(q.dtype)
    out = scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask, scale=scale, enable_gqa=q.shape[2] != keys.shape[1])
    out = out.transpose(1, 2)
    return out if chunk.is_empty is None else out.masked_fill(chunk.is_empty, 0)


def _bias(bias: PositionBias, chunk: _Chunk, ranges: KeyRanges) -> Tensor:
    """ALiBi of one chunk. ``[B, N, C, far + band]``"""
    far = bias.key_positions.gather(1, ranges.index[:, chunk.far].long())
    positions = torch.cat([far, bias.key_positions[:, chunk.band]], 1)
    distance = bias.query_positions[:, chunk.queries, None] - positions[:, None]
    return -bias.slopes[:, None, None] * distance[:, None]


CHUNKED = Core(name="chunked", unsupported=unsupported, attention=attention, prepare=prepare)

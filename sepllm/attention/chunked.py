"""Plain torch, any device: chunk by chunk, one stock attention call over the far prefix and the slab of the band.

A chunk of C queries needs the far columns that any of them reads and at most C + n - 1 band keys; both are contiguous, so they are
sliced, joined and masked. Beside copies of the far keys, memory is O(C * (M + n)) at a time. The backward forms the scores of each
chunk again and adds gradients of keys into one buffer.

Forward and backward are two operators of torch, so that a compiler takes each for one step and never looks at the loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from sepllm.attention.spec import AttentionSpec, Core, PositionBias
from sepllm.layout import NEVER, KeyRanges
from sepllm.pattern import Softmax, Standard

CHUNK = 128
"""Queries per chunk. Smaller wastes less of the band's slab, larger makes fewer calls; 64 and 128 are within 10 % of one another at
S = 1024 to 4096 on one CPU core, 32 and 256 are slower."""

NAMESPACE = re.sub(r"\W", "_", __name__)
"""Of the operators. A copy of this module that came with a checkpoint has another name, and so operators of its own."""


def unsupported(spec: AttentionSpec) -> str | None:
    if not isinstance(spec.softmax, Standard):
        return "only the standard softmax"
    if spec.dropout:
        return "no dropout"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, *, scale: float, softmax: Softmax, bias: PositionBias | None, dropout: float
) -> Tensor:
    prepared: _Prepared = ranges.derived["chunked"]
    call = _Call(
        far_index=ranges.index,
        far_lo=ranges.far_lo,
        far_hi=ranges.far_hi,
        band_lo=ranges.band_lo,
        band_hi=ranges.band_hi,
        chunks=prepared.chunks,
        unread=prepared.unread,
        slopes=None if bias is None else bias.slopes,
        query_positions=None if bias is None else bias.query_positions,
        key_positions=None if bias is None else bias.key_positions,
        scale=scale,
    )
    out: Tensor = _forward(q, k, v, *call)
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    chunks: Tensor
    """``[chunks, 5]`` int32 on the CPU: the first far column of any query of the chunk and the one after the last, the same of band
    keys, and 1 where some query reads nothing."""
    unread: Tensor | None
    """``[B, S]`` bool: keys that no query reads, which may hold anything, NaN included. None where there are none."""


def prepare(ranges: KeyRanges) -> None:
    """Sizes are read from the CPU's copy of the ranges; where there is none, this waits for the device."""
    here = ranges.host or ranges
    is_empty = _by_chunk(here.read_keys() == 0).any(2).any(0).int()
    chunks = torch.stack([*_hulls(here.far_lo, here.far_hi), *_hulls(here.band_lo, here.band_hi), is_empty], 1).cpu()
    unread = here.unread_keys()
    has_unread = bool(unread.any())
    ranges.derived["chunked"] = _Prepared(chunks=chunks, unread=unread.to(ranges.index.device, non_blocking=True) if has_unread else None)


def _hulls(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The first column that any query of a chunk reads and the one after the last, each ``[chunks]`` int32; equal where none is read."""
    low, high = _by_chunk(low), _by_chunk(high)
    is_used = high > low
    last = torch.where(is_used, high, 0).amax((0, 2))
    return torch.where(is_used, low, last[:, None]).amin((0, 2)), last


def _by_chunk(x: Tensor) -> Tensor:
    """``[B, T]`` -> ``[B, chunks, CHUNK]``, filled up with 0."""
    return pad(x, (0, -x.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))


class _Call(NamedTuple):
    """What the operators take beside q, k and v, in the order of `_ARGUMENTS`; fields as in `KeyRanges`, `_Prepared`, `PositionBias`."""

    far_index: Tensor
    far_lo: Tensor
    far_hi: Tensor
    band_lo: Tensor
    band_hi: Tensor
    chunks: Tensor
    unread: Tensor | None
    slopes: Tensor | None
    query_positions: Tensor | None
    key_positions: Tensor | None
    scale: float

    @classmethod
    def of(cls, *arguments: Any) -> _Call:
        """Without the far columns that nobody reads: the list is longer than it need be."""
        call = cls(*arguments)
        used = max((far_last for _, far_last, *_ in call.chunks.tolist()), default=0)
        return call._replace(far_index=call.far_index[:, :used])


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor far_index, Tensor far_lo, Tensor far_hi, Tensor band_lo, Tensor band_hi, Tensor chunks, "
    "Tensor? unread, Tensor? slopes, Tensor? query_positions, Tensor? key_positions, float scale"
)


@torch.library.custom_op(f"{NAMESPACE}::chunked", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
def _forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for chunk in _chunks(k, v, _Call.of(*arguments)):
        out[:, chunk.queries] = chunk.attend(q[:, chunk.queries])
    return out


@torch.library.custom_op(f"{NAMESPACE}::chunked_backward", mutates_args=(), schema=f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call.of(*arguments)
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = _KeyGradient.zeros(k, call), _KeyGradient.zeros(v, call)
    for chunk in _chunks(k, v, call):
        grad_q[:, chunk.queries], of_keys, of_values = chunk.gradients(q[:, chunk.queries], grad[:, chunk.queries])
        grad_k.add(of_keys, chunk)
        grad_v.add(of_values, chunk)
    return grad_q, grad_k.total().to(k.dtype), grad_v.total().to(v.dtype)


@_forward.register_fake
def _(q: Tensor, *_others: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_others: object) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.scale), *[None] * len(_Call._fields)


def _refuse(ctx: Any, *_grads: Tensor) -> None:
    raise ValueError("core chunked has no second derivative: use core dense for gradients of gradients.")


_forward.register_autograd(_gradients, setup_context=_remember)
_backward.register_autograd(_refuse)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """All that the queries of one chunk need: a small attention of its own."""

    queries: slice
    far: slice
    band: slice
    keys: Tensor
    """``[B, K, far + band, H]``"""
    values: Tensor
    mask: Tensor
    """``[B, 1 or N, C, far + band]``, added to the scores. A query that reads nothing hides nothing here, lest it divide by zero."""
    is_empty: Tensor | None
    """``[B, C, 1, 1]`` bool: queries that read nothing. None where there are none."""
    scale: float

    def attend(self, q: Tensor) -> Tensor:
        """``[B, C, N, H]``"""
        if not self.keys.shape[2]:
            return torch.zeros_like(q)
        out = scaled_dot_product_attention(
            q.transpose(1, 2), self.keys, self.values, attn_mask=self.mask, scale=self.scale, enable_gqa=q.shape[2] != self.keys.shape[1]
        ).transpose(1, 2)
        return out if self.is_empty is None else out.masked_fill(self.is_empty, 0)

    def gradients(self, q: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of q, keys and values, from the gradient of what `attend` gives."""
        if not self.keys.shape[2]:
            return torch.zeros_like(q), torch.zeros_like(self.keys), torch.zeros_like(self.values)
        if self.is_empty is not None:
            grad = grad.masked_fill(self.is_empty, 0)
        accumulate = torch.promote_types(q.dtype, torch.float32)
        q_rows, grad_rows = self._by_key_head(q), self._by_key_head(grad)
        scores = (q_rows @ self.keys.transpose(2, 3)).to(accumulate).mul_(self.scale)
        weights = torch.softmax(scores.view(*q.shape[:1], q.shape[2], q.shape[1], -1).add_(self.mask), 3).view_as(scores)
        of_scores = (grad_rows @ self.values.transpose(2, 3)).to(accumulate)
        of_scores.sub_((of_scores * weights).sum(3, keepdim=True)).mul_(weights).mul_(self.scale)
        of_scores, weights = of_scores.to(q.dtype), weights.to(q.dtype)
        of_q = (of_scores @ self.keys).unflatten(2, (-1, q.shape[1])).permute(0, 3, 1, 2, 4).flatten(2, 3)
        return of_q, of_scores.transpose(2, 3) @ q_rows, weights.transpose(2, 3) @ grad_rows

    def _by_key_head(self, x: Tensor) -> Tensor:
        """Rows of all heads that share keys, one head after the other. ``[B, C, N, H]`` -> ``[B, K, N / K * C, H]``."""
        return x.unflatten(2, (self.keys.shape[1], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _chunks(k: Tensor, v: Tensor, call: _Call) -> Iterator[_Chunk]:
    if call.unread is not None:
        k, v = (x.masked_fill(call.unread[..., None, None], 0) for x in (k, v))
    far_k, far_v = (_gather(x, call.far_index) for x in (k, v))
    is_empty = call.far_hi + call.band_hi == call.far_lo + call.band_lo
    far_lo, band_lo = (low.masked_fill(is_empty, 0) for low in (call.far_lo, call.band_lo))
    far_hi, band_hi = (high.masked_fill(is_empty, NEVER) for high in (call.far_hi, call.band_hi))
    for place, (far_first, far_last, band_first, band_last, has_empty) in enumerate(call.chunks.tolist()):
        queries = slice(place * CHUNK, min((place + 1) * CHUNK, is_empty.shape[1]))
        far, band = slice(far_first, far_last), slice(band_first, band_last)
        reads_far = _is_within(far, far_lo[:, queries], far_hi[:, queries])
        reads_band = _is_within(band, band_lo[:, queries], band_hi[:, queries])
        mask = torch.where(torch.cat([reads_far, reads_band], 2), 0.0, -torch.inf).to(k.dtype)[:, None]
        yield _Chunk(
            queries=queries,
            far=far,
            band=band,
            keys=torch.cat([far_k[:, :, far], k[:, band].transpose(1, 2)], 2),
            values=torch.cat([far_v[:, :, far], v[:, band].transpose(1, 2)], 2),
            mask=mask if call.slopes is None else mask + _bias(call, queries, far, band).to(k.dtype),
            is_empty=is_empty[:, queries, None, None] if has_empty else None,
            scale=call.scale,
        )


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Far keys of every row, in order. ``x [B, S, K, H]``, ``index [B, M]`` -> ``[B, K, M, H]``."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[rows, index].transpose(1, 2)


def _is_within(columns: slice, low: Tensor, high: Tensor) -> Tensor:
    """``[B, C, columns]`` bool, from ``[B, C]``."""
    column = torch.arange(columns.start, columns.stop, dtype=torch.int32, device=low.device)
    return (column >= low[..., None]) & (column < high[..., None])


def _bias(call: _Call, queries: slice, far: slice, band: slice) -> Tensor:
    """ALiBi of one chunk. ``[B, N, C, far + band]``"""
    assert call.slopes is not None
    assert call.query_positions is not None
    assert call.key_positions is not None
    far_positions = call.key_positions.gather(1, call.far_index[:, far])
    positions = torch.cat([far_positions, call.key_positions[:, band]], 1)
    distance = call.query_positions[:, queries, None] - positions[:, None]
    return -call.slopes[:, None, None] * distance[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _KeyGradient:
    """Gradient of keys or of values, summed over chunks in fp32 or wider; that of far keys on its own until the end."""

    far: Tensor
    """``[B, K, M, H]``"""
    keys: Tensor
    """``[B, S, K, H]``"""
    index: Tensor

    @classmethod
    def zeros(cls, x: Tensor, call: _Call) -> _KeyGradient:
        rows, _, heads, size = x.shape
        keys = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        return cls(far=keys.new_zeros(rows, heads, call.far_index.shape[1], size), keys=keys, index=call.far_index)

    def add(self, gradient: Tensor, chunk: _Chunk) -> None:
        """``gradient [B, K, far + band, H]``"""
        num_far = chunk.far.stop - chunk.far.start
        self.far[:, :, chunk.far] += gradient[:, :, :num_far]
        self.keys[:, chunk.band] += gradient[:, :, num_far:].transpose(1, 2)

    def total(self) -> Tensor:
        index = self.index[:, :, None, None].expand(-1, -1, *self.keys.shape[2:])
        return self.keys.scatter_add_(1, index, self.far.transpose(1, 2))


CHUNKED = Core(name="chunked", unsupported=unsupported, attention=attention, prepare=prepare)

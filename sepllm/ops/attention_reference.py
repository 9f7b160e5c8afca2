"""Attention written out: a mask, a softmax in at least fp32, and the two kinds of self-adjust softmax. The definition of all kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Bias(NamedTuple):
    """ALiBi: ``-slope * (query - key)`` is added to each score."""

    slopes: Tensor
    """``[N]``"""
    query_positions: Tensor
    """``[B, T]``"""
    key_positions: Tensor
    """``[B, S]``"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjustment:
    """SA-softmax (arXiv 2502.18277). With p the softmax of the scores s, both over the keys read, key j weighs

        raw           p_j s_j
        normalised    p_j (s_j - m + numerator_bias) / (M - m)
                      m = min(min s, 0),  M = max(max s + denominator_bias, 0) + denominator_bias

    The denominator's bias enters twice, as in the reference. The gradient of an extreme goes to the first key that attains it, and to
    none where the extreme is the 0.
    """

    is_normalised: bool
    numerator_bias: float = 0.0
    denominator_bias: float = 0.0
    extremes: tuple[Tensor, Tensor] | None = None
    """``[B, T]`` int32: min and max run over the keys ``lo <= j < hi`` of each query. None: over those that it reads."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_read: Tensor,
    *,
    scale: float,
    bias: Bias | None = None,
    adjustment: Adjustment | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``out [B, T, N, H]`` of q's dtype and ``lse [B, N, T]``, the base-2 logarithm of the sum of exponentials. O(T * S) memory.

    ``q [B, T, N, H]``, ``k`` and ``v`` ``[B, S, K, H]``, ``is_read [B, T, S]`` bool. A query that reads nothing gives 0 and inf; what keys hold
    that no query looks at does not matter.
    """
    keys = torch.arange(k.shape[1], device=k.device)
    counts = is_read
    if adjustment is not None and adjustment.extremes is not None:
        counts = (keys >= adjustment.extremes[0][..., None]) & (keys < adjustment.extremes[1][..., None])
    k, v = repeated_where_read(k, is_read | counts, q.shape[2]), repeated_where_read(v, is_read, q.shape[2])
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("btnh,bsnh->bnts", q, k).to(wide) * scale
    if bias is not None:
        distance = bias.query_positions[:, :, None] - bias.key_positions[:, None, :]
        scores = scores - bias.slopes[:, None, None].to(wide) * distance[:, None]
    is_read = is_read[:, None]
    reads_any = is_read.any(-1)
    masked = scores.masked_fill(~is_read, torch.finfo(wide).min)
    weights = torch.softmax(masked, -1).masked_fill(~is_read, 0)
    lse = (torch.logsumexp(masked.detach(), -1) / math.log(2)).masked_fill(~reads_any, math.inf)
    if adjustment is not None:
        weights = weights * _adjusted(scores, counts[:, None], adjustment).masked_fill(~is_read, 0)
    weights = torch.nn.functional.dropout(weights, dropout)
    return torch.einsum("bnts,bsnh->btnh", weights.to(v.dtype), v), lse


def masked_softmax(scores: Tensor, is_read: Tensor, *, scale: float = 1.0) -> Tensor:
    """``softmax(scores * scale)`` over the keys read, 0 elsewhere, computed in at least fp32. `sepllm.ops.masked_softmax` in plain torch."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    masked = (scores.to(wide) * scale).masked_fill(~is_read, torch.finfo(wide).min)
    return torch.softmax(masked, -1).masked_fill(~is_read, 0).to(scores.dtype)


def repeated_where_read(x: Tensor, is_read: Tensor, num_heads: int) -> Tensor:
    """Keys or values ``[B, S, K, H]``, a copy for each of the queries' heads, 0 where no query looks. ``is_read [B, T, S]``"""
    return x.masked_fill(~is_read.any(1)[..., None, None], 0).repeat_interleave(num_heads // x.shape[2], 2)


def _adjusted(scores: Tensor, counts: Tensor, adjustment: Adjustment) -> Tensor:
    """What multiplies each softmax weight. ``[B, N, T, S]``"""
    if not adjustment.is_normalised:
        return scores
    lowest = _at(scores, scores.masked_fill(~counts, math.inf).argmin(-1, keepdim=True))
    highest = _at(scores, scores.masked_fill(~counts, -math.inf).argmax(-1, keepdim=True)) + adjustment.denominator_bias
    low = torch.where(lowest < 0, lowest, 0)
    high = torch.where(highest > 0, highest, 0) + adjustment.denominator_bias
    spread = (high - low).masked_fill(~counts.any(-1, keepdim=True), 1)
    return (scores - low + adjustment.numerator_bias) / spread


def _at(scores: Tensor, key: Tensor) -> Tensor:
    return scores.gather(-1, key)

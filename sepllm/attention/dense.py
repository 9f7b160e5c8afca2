"""The definition: an explicit mask and an fp32 softmax, O(T * S) memory. Every other core is tested against this one."""

from __future__ import annotations

import torch
from torch import Tensor

from sepllm.attention.spec import AttentionSpec, Core, PositionBias
from sepllm.layout import KeyRanges
from sepllm.pattern import Softmax, Standard


def unsupported(spec: AttentionSpec) -> str | None:
    if not isinstance(spec.softmax, Standard):
        return "self-adjust softmax is not built yet"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, *, scale: float, softmax: Softmax, bias: PositionBias | None, dropout: float
) -> Tensor:
    reads = ranges.dense()
    unread = ~reads.any(1)[..., None, None]
    k, v = k.masked_fill(unread, 0), v.masked_fill(unread, 0)  # they may hold anything, NaN included
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    accumulate = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("btnh,bsnh->bnts", q, k).to(accumulate) * scale
    if bias is not None:
        distance = bias.query_positions[:, :, None] - bias.key_positions[:, None, :]
        scores = scores - bias.slopes[:, None, None].to(accumulate) * distance[:, None]
    reads = reads[:, None]
    weights = torch.softmax(scores.masked_fill(~reads, torch.finfo(accumulate).min), -1)
    weights = weights.masked_fill(~reads, 0)  # a query that reads nothing
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    return torch.einsum("bnts,bsnh->btnh", weights.to(v.dtype), v)


DENSE = Core(name="dense", unsupported=unsupported, attention=attention)

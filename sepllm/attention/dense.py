"""An explicit mask and an fp32 softmax, O(T * S) memory: computes all that any core can. With a position bias or the self-adjust softmax it
is the definition itself, `sepllm.ops.attention_reference`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sepllm.attention.self_adjust import adjustment_of
from sepllm.attention.spec import AttentionSpec, Core, PositionBias
from sepllm.layout import KeyRanges
from sepllm.ops.attention_reference import attention as written_out
from sepllm.ops.attention_reference import repeated_where_read
from sepllm.ops.masked_softmax import masked_softmax
from sepllm.pattern import SelfAdjust, Softmax, Standard


def unsupported(spec: AttentionSpec) -> str | None:
    if not isinstance(spec.softmax, Standard | SelfAdjust):
        return "an unknown softmax"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, *, scale: float, softmax: Softmax, bias: PositionBias | None, dropout: float
) -> Tensor:
    adjustment, is_read = adjustment_of(softmax, ranges), ranges.dense()
    if adjustment is not None or bias is not None:
        return written_out(q, k, v, is_read, scale=scale, bias=bias, adjustment=adjustment, dropout=dropout)[0]
    k, v = (repeated_where_read(x, is_read, q.shape[2]) for x in (k, v))
    weights = masked_softmax(torch.einsum("btnh,bsnh->bnts", q, k), is_read[:, None], scale=scale)
    return torch.einsum("bnts,bsnh->btnh", functional.dropout(weights, dropout), v)


DENSE = Core(name="dense", unsupported=unsupported, attention=attention)

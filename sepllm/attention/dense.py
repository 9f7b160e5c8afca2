"""The definition: an explicit mask and an fp32 softmax, O(T * S) memory. Every other core is tested against this one."""

from __future__ import annotations

from torch import Tensor

from sepllm.attention.self_adjust import adjustment_of
from sepllm.attention.spec import AttentionSpec, Core, PositionBias
from sepllm.layout import KeyRanges
from sepllm.ops.attention_reference import attention as written_out
from sepllm.pattern import SelfAdjust, Softmax, Standard


def unsupported(spec: AttentionSpec) -> str | None:
    if not isinstance(spec.softmax, Standard | SelfAdjust):
        return "an unknown softmax"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, *, scale: float, softmax: Softmax, bias: PositionBias | None, dropout: float
) -> Tensor:
    adjustment = adjustment_of(softmax, ranges)
    return written_out(q, k, v, ranges.dense(), scale=scale, bias=bias, adjustment=adjustment, dropout=dropout)[0]


DENSE = Core(name="dense", unsupported=unsupported, attention=attention)

"""The C++ operator for CPUs (csrc/sep_attention_cpu.cpp): the work of the kept pairs, forward and backward, any softmax kind."""

from __future__ import annotations

import torch
from torch import Tensor

from sepllm.attention.self_adjust import adjustment_of
from sepllm.attention.spec import AttentionSpec, Core, PositionBias
from sepllm.layout import KeyRanges
from sepllm.ops import extension
from sepllm.ops.sep_attention import Ranges, register, sep_attention
from sepllm.pattern import SelfAdjust, Softmax, Standard

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unsupported(spec: AttentionSpec) -> str | None:
    if spec.device_type != "cpu":
        return "only on a CPU"
    if not isinstance(spec.softmax, Standard | SelfAdjust):
        return "an unknown softmax"
    if spec.dropout:
        return "no dropout"
    if spec.dtype not in DTYPES:
        return f"{spec.dtype} is not a floating-point type that it computes"
    return _why_unavailable()


@torch.compiler.assume_constant_result
def _why_unavailable() -> str | None:
    """Found out once, outside of what is compiled."""
    return extension.why_unavailable()


def prepare(ranges: KeyRanges) -> None:
    register()
    ranges.derived["native"] = None


def attention(
    q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, *, scale: float, softmax: Softmax, bias: PositionBias | None, dropout: float
) -> Tensor:
    bounds = Ranges(ranges.index, ranges.far_lo, ranges.far_hi, ranges.band_lo, ranges.band_hi)
    return sep_attention(q, k, v, bounds, scale=scale, bias=bias, adjustment=adjustment_of(softmax, ranges))[0]


NATIVE = Core(name="native", unsupported=unsupported, attention=attention, prepare=prepare)

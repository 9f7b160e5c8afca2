"""Own Triton kernels for NVIDIA GPUs: see `sepllm.ops.sep_attention_triton`. Needs the package triton, which CUDA builds of torch bring."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from sepllm.attention.self_adjust import adjustment_of
from sepllm.attention.spec import AttentionSpec, Core, PositionBias
from sepllm.layout import KeyRanges
from sepllm.ops.attention_reference import Bias
from sepllm.pattern import SelfAdjust, Softmax, Standard

OLDEST_CAPABILITY = (8, 0)


def unsupported(spec: AttentionSpec) -> str | None:
    if isinstance(spec.softmax, SelfAdjust) and spec.softmax.extremes == "causal" and spec.softmax.kind == "normalised":
        return "the self-adjust softmax takes its extremes over the keys that are read only"
    if not isinstance(spec.softmax, Standard | SelfAdjust):
        return "an unknown softmax"
    if spec.dropout:
        return "no dropout"
    return _missing(spec.device_type, spec.dtype)


@torch.compiler.assume_constant_result
def _missing(device_type: str, dtype: torch.dtype) -> str | None:
    """What this machine lacks for tensors of such a device and dtype."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton (pip install triton, or a CUDA build of torch)"
    from sepllm.ops.sep_attention_triton import is_interpreted

    if is_interpreted():
        return None if device_type in ("cpu", "cuda") else "Triton's interpreter takes CPU and CUDA tensors"
    if device_type != "cuda":
        return "needs a CUDA device"
    if torch.version.hip is not None or torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        return "needs an NVIDIA GPU of compute capability 8.0 or newer"
    return None if dtype in (torch.bfloat16, torch.float16, torch.float32) else "only bfloat16, float16 and float32"


def attention(
    q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, *, scale: float, softmax: Softmax, bias: PositionBias | None, dropout: float
) -> Tensor:
    from sepllm.ops.sep_attention_triton import sep_attention_triton

    vectors = None
    if bias is not None:
        exact = torch.promote_types(q.dtype, torch.float32)
        vectors = Bias(bias.slopes.to(exact), bias.query_positions.to(exact), bias.key_positions.to(exact))
    adjustment = adjustment_of(softmax, ranges)
    return sep_attention_triton(q, k, v, ranges.derived["fused_triton"], scale=scale, bias=vectors, adjustment=adjustment)


def prepare(ranges: KeyRanges) -> None:
    from sepllm.ops.sep_attention_triton import make_tables

    ranges.derived["fused_triton"] = make_tables(ranges.index, ranges.far_lo, ranges.far_hi, ranges.band_lo, ranges.band_hi, num_keys=ranges.num_keys)


FUSED_TRITON = Core(name="fused_triton", unsupported=unsupported, attention=attention, prepare=prepare)

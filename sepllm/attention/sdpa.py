"""torch's own causal attention (flash or cuDNN on a GPU), for layers whose window covers the sequence."""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from sepllm.attention.spec import AttentionSpec, Core, PositionBias
from sepllm.layout import KeyRanges
from sepllm.pattern import Softmax, Standard


def unsupported(spec: AttentionSpec) -> str | None:
    if not spec.is_causal:
        return "only for layers that read every earlier key, without padding or document starts"
    if spec.has_bias:
        return "no position bias"
    if spec.dropout:
        return "no dropout"
    if not isinstance(spec.softmax, Standard):
        return "only the standard softmax"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, *, scale: float, softmax: Softmax, bias: PositionBias | None, dropout: float
) -> Tensor:
    num_queries, num_keys = q.shape[1], k.shape[1]
    is_square = num_queries == num_keys
    out = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if is_square or num_queries == 1 else causal_lower_right(num_queries, num_keys),
        is_causal=is_square,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


SDPA = Core(name="sdpa", unsupported=unsupported, attention=attention)

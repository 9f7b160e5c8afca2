"""What attention cores and their door agree on: the description of a call, the position bias, and what a core is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sepllm.layout import KeyRanges
from sepllm.ops.attention_reference import Bias
from sepllm.pattern import Softmax

PositionBias = Bias


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """What a core must know to say whether it can compute a call. Never looks at tensor contents."""

    device_type: str
    dtype: torch.dtype
    num_queries: int
    num_keys: int
    longest_band: int
    """Upper bound on the keys that a query reads in its band."""
    is_causal: bool
    softmax: Softmax
    has_bias: bool
    dropout: float
    needs_grad: bool


def _nothing(_ranges: KeyRanges) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """One implementation of attention over key ranges. All give the answer of `dense`."""

    name: str
    unsupported: Callable[[AttentionSpec], str | None]
    """Why it cannot compute such a call; None where it can."""
    attention: Callable[..., Tensor]
    """``(q, k, v, ranges, *, scale, softmax, bias, dropout) -> out``, shapes as in `sepllm.attention.attend`."""
    prepare: Callable[[KeyRanges], None] = _nothing
    """Puts what it works out from the ranges into ``ranges.derived[name]``, once for all layers that share them. Waits for no device."""

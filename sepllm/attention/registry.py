"""The door to attention, and the list of cores behind it.

A core is a module with two functions: ``unsupported(spec) -> str | None`` says why it cannot compute a call (None: it can), and
``attention(q, k, v, ranges, *, scale, softmax, bias, dropout) -> out`` computes it. Every core gives the answer of `dense`.
To add one: a file in this folder, a line in ``_CORES``, its name in the parametrised tests.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from sepllm.layout import KeyRanges
from sepllm.pattern import Softmax, Standard

_CORES = ("sdpa", "chunked", "dense")
"""In the order in which ``auto`` prefers them."""

FEW_QUERIES = 32
"""Up to this many queries (decoding), ``auto`` takes the plain mask: there is too little work to divide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionBias:
    """ALiBi: ``-slope * (query position - key position)`` added to each score."""

    slopes: Tensor
    """``[N]`` float, of the heads at hand"""
    query_positions: Tensor
    """``[B, T]``"""
    key_positions: Tensor
    """``[B, S]``"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """What a core must know to say whether it can compute a call. Never looks at tensor contents."""

    device_type: str
    dtype: torch.dtype
    num_queries: int
    num_keys: int
    is_causal: bool
    softmax: Softmax
    has_bias: bool
    dropout: float


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: KeyRanges,
    *,
    scale: float,
    core: str = "auto",
    softmax: Softmax = Standard(),
    bias: PositionBias | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of each query over the keys that its ranges name. ``[B, T, N, H]``, dtype of q.

    ``q [B, T, N, H]``; ``k``, ``v`` ``[B, S, K, H]`` with N a multiple of K (grouped heads). ``scale`` multiplies the scores.
    ``core`` forces one of `core_names`; ``auto`` takes the best that supports the call. A query that reads nothing gives zeros.
    """
    _check(q, k, v, ranges)
    name = choose_core(spec_of(q, ranges, softmax=softmax, bias=bias, dropout=dropout), core)
    return _module(name).attention(q, k, v, ranges, scale=scale, softmax=softmax, bias=bias, dropout=dropout)


def spec_of(q: Tensor, ranges: KeyRanges, *, softmax: Softmax, bias: PositionBias | None, dropout: float) -> AttentionSpec:
    """The description of one call."""
    return AttentionSpec(
        device_type=q.device.type,
        dtype=q.dtype,
        num_queries=q.shape[1],
        num_keys=ranges.num_keys,
        is_causal=ranges.is_causal,
        softmax=softmax,
        has_bias=bias is not None,
        dropout=dropout,
    )


def choose_core(spec: AttentionSpec, core: str = "auto") -> str:
    """The name of the core that computes such a call. ValueError, with every core's reason, where none does."""
    if core != "auto" and core not in _CORES:
        raise ValueError(f"core {core!r} is not known: use auto or one of {', '.join(_CORES)}.")
    reasons = {}
    preferred = ("sdpa", "dense") if spec.num_queries <= FEW_QUERIES else _CORES
    for name in preferred if core == "auto" else (core,):
        reason = _module(name).unsupported(spec)
        if reason is None:
            return name
        reasons[name] = reason
    raise ValueError("No attention core can compute this: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) + ".")


def core_names() -> tuple[str, ...]:
    """The cores that exist, in the order in which ``auto`` prefers them."""
    return _CORES


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"sepllm.attention.{name}")


def _check(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.shape != k.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: they must be [B, T, N, H], [B, S, K, H], [B, S, K, H].")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads and k {k.shape[2]}: the first must be a multiple of the second.")
    if ranges.num_keys != k.shape[1] or ranges.band_lo.shape != q.shape[:2]:
        raise ValueError(
            f"The ranges are of {tuple(ranges.band_lo.shape)} queries over {ranges.num_keys} keys, but q is {tuple(q.shape)} and k {tuple(k.shape)}."
        )

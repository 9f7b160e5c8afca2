"""The door to attention, and the list of cores behind it.

To add a core: a file in this folder that ends in a `Core`, its name in ``_CORES``. Every test of `tests/sepllm/attention` then runs it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sepllm.attention.chunked import CHUNKED
from sepllm.attention.dense import DENSE
from sepllm.attention.flex import FLEX
from sepllm.attention.fused_triton import FUSED_TRITON
from sepllm.attention.measured import preferred
from sepllm.attention.native import NATIVE
from sepllm.attention.sdpa import SDPA
from sepllm.attention.spec import AttentionSpec, Core, PositionBias
from sepllm.layout import KeyRanges
from sepllm.pattern import Softmax, Standard

_CORES = (SDPA, NATIVE, FUSED_TRITON, FLEX, CHUNKED, DENSE)
"""All cores; `sepllm.attention.measured` says which of them ``auto`` prefers where."""
_BY_NAME = {core.name: core for core in _CORES}


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
    """Attention of each query over the keys that its ranges name. ``[B, T, N, H]``, dtype of q; under `torch.autocast` in its dtype.

    ``q [B, T, N, H]``; ``k``, ``v`` ``[B, S, K, H]`` with N a multiple of K (grouped heads). ``scale`` multiplies the scores.
    ``core`` forces one of `core_names`; ``auto`` takes the best that supports the call. A query that reads nothing gives zeros.
    """
    _check(q, k, v, ranges)
    if _is_autocast_on(q.device.type):
        q, k, v = (_as_autocast(x) for x in (q, k, v))
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    chosen = _choose(spec_of(q, ranges, softmax=softmax, bias=bias, dropout=dropout, needs_grad=needs_grad), core)
    if chosen.name not in ranges.derived:
        chosen.prepare(ranges)
    return chosen.attention(q, k, v, ranges, scale=scale, softmax=softmax, bias=bias, dropout=dropout)


def prepare(ranges: KeyRanges, spec: AttentionSpec, core: str = "auto") -> str:
    """Works out ahead what all layers that share the ranges need of the core that computes such calls, and names the core.

    `attend` does it when it finds it missing. Ahead of compiled layers it keeps that work out of what is compiled.
    """
    chosen = _choose(spec, core)
    if chosen.name not in ranges.derived:
        chosen.prepare(ranges)
    return chosen.name


def spec_of(
    q: Tensor, ranges: KeyRanges, *, softmax: Softmax = Standard(), bias: PositionBias | None = None, dropout: float = 0.0, needs_grad: bool = False
) -> AttentionSpec:
    """The description of one call with queries of the dtype and the device of ``q``; its shape does not matter."""
    return AttentionSpec(
        device_type=q.device.type,
        dtype=q.dtype,
        num_queries=ranges.band_lo.shape[1],
        num_keys=ranges.num_keys,
        longest_band=ranges.longest_band,
        is_causal=ranges.is_causal,
        softmax=softmax,
        has_bias=bias is not None,
        dropout=dropout,
        needs_grad=needs_grad,
    )


def choose_core(spec: AttentionSpec, core: str = "auto") -> str:
    """The name of the core that computes such a call. ValueError, with every core's reason, where none does."""
    return _choose(spec, core).name


def core_names() -> tuple[str, ...]:
    """The cores that exist."""
    return tuple(_BY_NAME)


def _choose(spec: AttentionSpec, name: str) -> Core:
    if name != "auto" and name not in _BY_NAME:
        raise ValueError(f"core {name!r} is not known: use auto or one of {', '.join(_BY_NAME)}.")
    reasons = {}
    for wanted in preferred(spec) if name == "auto" else (name,):
        if wanted in _BY_NAME:
            reason = _BY_NAME[wanted].unsupported(spec)
            if reason is None:
                return _BY_NAME[wanted]
            reasons[wanted] = reason
    raise ValueError("No attention core can compute this: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) + ".")


def _is_autocast_on(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _as_autocast(x: Tensor) -> Tensor:
    """In the dtype of `torch.autocast`, as for torch's own attention: rotation left q and k in float32, v is not."""
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))


def _check(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.shape != k.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: they must be [B, T, N, H], [B, S, K, H], [B, S, K, H].")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads and k {k.shape[2]}: the first must be a multiple of the second.")
    if ranges.num_keys != k.shape[1] or ranges.band_lo.shape != q.shape[:2]:
        raise ValueError(
            f"The ranges are of {tuple(ranges.band_lo.shape)} queries over {ranges.num_keys} keys, but q is {tuple(q.shape)} and k {tuple(k.shape)}."
        )

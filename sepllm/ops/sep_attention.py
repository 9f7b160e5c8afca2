"""Attention over key ranges as an operator: the definition in plain torch, and the C++ kernels of csrc/sep_attention_cpu.cpp.

A query reads the keys ``index[c]`` for ``far_lo <= c < far_hi`` and the keys ``band_lo <= j < band_hi``, which are disjoint, under one
softmax. The kernels do the work of these pairs only, forward and backward, and allocate nothing of size T x S.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from sepllm.ops import extension

Bias = tuple[Tensor, Tensor, Tensor]
"""ALiBi: slopes ``[N]``, positions of the queries ``[B, T]`` and of the keys ``[B, S]``; adds ``-slope * (query - key)`` to a score."""


def sep_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    far_lo: Tensor,
    far_hi: Tensor,
    band_lo: Tensor,
    band_hi: Tensor,
    *,
    scale: float,
    bias: Bias | None = None,
    impl: str = "native",
) -> tuple[Tensor, Tensor]:
    """``out [B, T, N, H]`` of q's dtype, and ``lse [B, N, T]`` fp32 (fp64 for fp64): the base-2 logarithm of the sum of exponentials.

    ``q [B, T, N, H]``, ``k`` and ``v`` ``[B, S, K, H]``: float32, float64, bfloat16 or float16 on a CPU; heads may be grouped. ``index [B, M]``
    and the bounds ``[B, T]`` are int32; bounds must not decrease with the query. A query that reads nothing gives 0 and ``lse`` inf.
    Differentiable in q, k and v, not in ``lse``; the gradient is the same to the bit from run to run with the same number of threads.
    """
    if impl == "reference":
        return reference(q, k, v, index, far_lo, far_hi, band_lo, band_hi, scale=scale, bias=bias)
    if impl != "native":
        raise ValueError(f"impl is {impl!r}: use native or reference.")
    register()
    slopes, query_positions, key_positions = bias or (None, None, None)
    out, lse = torch.ops.sepllm.sep_attention(q, k, v, index, far_lo, far_hi, band_lo, band_hi, slopes, query_positions, key_positions, scale)
    return out, lse


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    far_lo: Tensor,
    far_hi: Tensor,
    band_lo: Tensor,
    band_hi: Tensor,
    *,
    scale: float,
    bias: Bias | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: scores of all pairs, those that are not read left out. O(T * S) memory; any device and dtype."""
    keys, columns = torch.arange(k.shape[1], device=k.device), torch.arange(index.shape[1], device=k.device)
    reads = ((keys >= band_lo[..., None]) & (keys < band_hi[..., None])).int()
    far = (columns >= far_lo[..., None]) & (columns < far_hi[..., None])
    is_read = reads.scatter_add(2, index[:, None].expand_as(far).long(), far.int()).bool()
    unread = ~is_read.any(1)[..., None, None]
    groups = q.shape[2] // k.shape[2]
    k, v = (x.masked_fill(unread, 0).repeat_interleave(groups, 2) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("btnh,bsnh->bnts", q, k).to(wide) * scale
    if bias is not None:
        slopes, query_positions, key_positions = bias
        scores = scores - slopes[:, None, None].to(wide) * (query_positions[:, :, None] - key_positions[:, None, :])[:, None]
    scores = scores.masked_fill(~is_read[:, None], -math.inf)
    reads_any = is_read.any(2)[:, None]
    lse = torch.logsumexp(scores.masked_fill(~reads_any[..., None], 0), -1)
    weights = torch.exp(scores - lse[..., None]).masked_fill(~is_read[:, None], 0)
    out = torch.einsum("bnts,bsnh->btnh", weights.to(v.dtype), v)
    return out, (lse / math.log(2)).masked_fill(~reads_any, math.inf).detach()


@functools.cache
def register() -> None:
    """Loads the compiled operator and tells torch its shapes and its gradient."""
    extension.load()
    torch.library.register_fake("sepllm::sep_attention", _fake)
    torch.library.register_fake("sepllm::sep_attention_backward", _fake_backward)
    torch.library.register_autograd("sepllm::sep_attention", _backward, setup_context=_save)


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=lse_dtype)


def _fake_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(*tensors, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    nothing = (None,) * 9
    if grad_out is None:
        return (None, None, None, *nothing)
    q, k, v, *rest, out, lse = ctx.saved_tensors
    return (*torch.ops.sepllm.sep_attention_backward(grad_out, q, k, v, out, lse, *rest, ctx.scale), *nothing)

"""SepLLM attention from two stock calls: one over the far keys, one over the window, joined by their log-sum-exps.

With m the larger of the two log-sum-exps l1 and l2, the output is (o1 exp(l1 - m) + o2 exp(l2 - m)) / (exp(l1 - m) + exp(l2 - m)). The
backward is two stock calls as well: given the joined output and log-sum-exp, torch's backward of either part is that part of the whole.
This is the strongest way to get there without a kernel, and what one online softmax saves is the difference.

The window is a batch of blocks of n queries, each with its own and the block before it as keys, half of which each query reads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sepllm.layout import KeyRanges
from tools.bench.problem import Problem


def refuse_two_calls(problem: Problem, _dtype: torch.dtype) -> str | None:
    """Why it cannot run; None where it can."""
    if problem.device.type != "cpu":
        return "it is written with torch's CPU kernels, which take a mask and give the log-sum-exp"
    if problem.length % problem.window or problem.length < 2 * problem.window:
        return f"its blocks are as long as the window ({problem.window}) and must divide the sequence ({problem.length})"
    return None


class TwoCalls:
    """Attention of one batch of rows, ``[B, N, S, H]``; the far ranges must begin at 0 (no padding, no documents)."""

    def __init__(self, problem: Problem, dtype: torch.dtype, *, ranges: KeyRanges | None = None) -> None:
        ranges = ranges or problem.ranges
        window, blocks = problem.window, problem.length // problem.window
        self.index = ranges.index.long()
        self.window, self.scale = window, problem.scale
        self.has_far = (ranges.far_hi > 0)[:, None]
        self.far_mask = _additive(torch.arange(self.index.shape[1]) < ranges.far_hi[..., None], dtype)[:, None]
        query, key = torch.arange(window)[:, None], torch.arange(2 * window)
        in_window = ((key > query) & (key <= query + window)).expand(problem.batch, blocks, -1, -1).clone()
        in_window[:, 0, :, :window] = False
        self.band_mask = _additive(in_window.flatten(0, 1), dtype)[:, None]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = _Joined.apply(q, k, v, self)
        return out

    def far(self, x: Tensor) -> Tensor:
        """``[B, N, M, H]``"""
        return x.gather(2, self._columns(x))

    def far_gradient(self, gradient: Tensor, into: Tensor) -> None:
        into.scatter_add_(2, self._columns(into), gradient)

    def queries(self, x: Tensor) -> Tensor:
        """One row a block. ``[B, N, S, H]`` -> ``[B * blocks, N, n, H]``"""
        return x.unflatten(2, (-1, self.window)).transpose(1, 2).flatten(0, 1)

    def joined(self, x: Tensor, batch: int) -> Tensor:
        """The inverse of `queries`, also for ``[B * blocks, N, n]``."""
        return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)

    def keys(self, x: Tensor) -> Tensor:
        """Of each block and the one before. ``[B, N, S, H]`` -> ``[B * blocks, N, 2 n, H]``"""
        before = pad(x, (0, 0, self.window, -self.window))
        return torch.cat([self.queries(before), self.queries(x)], 2)

    def keys_gradient(self, gradient: Tensor, batch: int) -> Tensor:
        """``[B * blocks, N, 2 n, H]`` -> ``[B, N, S, H]``"""
        before, own = (self.joined(half, batch) for half in gradient.split(self.window, 2))
        return own + pad(before, (0, 0, -self.window, self.window))

    def _columns(self, x: Tensor) -> Tensor:
        return self.index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, parts: TwoCalls) -> Tensor:  # type: ignore[no-untyped-def]
        far_out, far_lse = _forward(q, parts.far(k), parts.far(v), parts.far_mask, parts.scale)
        far_out, far_lse = far_out.where(parts.has_far[..., None], 0), far_lse.where(parts.has_far, -torch.inf)
        band = _forward(parts.queries(q), parts.keys(k), parts.keys(v), parts.band_mask, parts.scale)
        band_out, band_lse = (parts.joined(x, q.shape[0]) for x in band)
        lse = torch.logaddexp(far_lse, band_lse)
        far_weight, band_weight = (part.sub(lse).exp_()[..., None].to(q.dtype) for part in (far_lse, band_lse))
        out = far_out * far_weight + band_out * band_weight
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.parts = parts
        return out

    @staticmethod
    def backward(ctx, out_gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        q, k, v, out, lse = ctx.saved_tensors
        parts: TwoCalls = ctx.parts
        of_far = _backward(out_gradient, q, parts.far(k), parts.far(v), out, lse, mask=parts.far_mask, scale=parts.scale)
        band_gradient, band_q, band_out, band_lse = (parts.queries(x) for x in (out_gradient, q, out, lse[..., None]))
        band_k, band_v = parts.keys(k), parts.keys(v)
        of_band = _backward(band_gradient, band_q, band_k, band_v, band_out, band_lse[..., 0], mask=parts.band_mask, scale=parts.scale)
        dk, dv = (parts.keys_gradient(gradient, q.shape[0]) for gradient in of_band[1:])
        parts.far_gradient(of_far[1], dk)
        parts.far_gradient(of_far[2], dv)
        return parts.joined(of_band[0], q.shape[0]) + of_far[0], dk, dv, None


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)


def _backward(
    out_gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(out_gradient, q, k, v, out, lse.contiguous(), 0.0, False, attn_mask=mask, scale=scale)


def _additive(reads: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(reads.shape, dtype=dtype).masked_fill_(~reads, -torch.inf)

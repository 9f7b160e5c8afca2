"""The norms of GPT-NeoX, under its parameter names. Statistics are in fp32 (or wider); the result has the input's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

NormKind = Literal["layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm"]


def make_norm(kind: NormKind, shape: int | Sequence[int], *, epsilon: float) -> nn.Module:
    """The norm of that name over the last axes of its input, whose sizes are ``shape``."""
    if kind == "layernorm":
        return nn.LayerNorm(_axes(shape), eps=epsilon)
    if kind == "non_parametric_layernorm":
        return nn.LayerNorm(_axes(shape), eps=epsilon, elementwise_affine=False)
    return RMSNorm(shape, epsilon=epsilon) if kind == "rmsnorm" else ScaleNorm(shape, epsilon=epsilon)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + epsilon) * scale`` (arXiv 1910.07467).

    The epsilon stands under the root, as in LLaMA. GPT-NeoX adds it to the root; at its default of 1e-8 nothing can be seen of that,
    at LLaMA's 1e-5 a released checkpoint needs this one.
    """

    def __init__(self, shape: int | Sequence[int], *, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.scale = nn.Parameter(torch.ones(_axes(shape)))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        axes = tuple(range(-self.scale.ndim, 0))
        normed = wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + self.epsilon)
        return self.scale * normed.to(x.dtype)


class ScaleNorm(nn.Module):
    """``x / max(|x|, epsilon) * g`` with one learned number ``g`` (arXiv 1910.05895)."""

    def __init__(self, shape: int | Sequence[int], *, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.axes = tuple(range(-len(_axes(shape)), 0))
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, dim=self.axes, keepdim=True).clamp(min=self.epsilon)
        return self.g * (wide / length).to(x.dtype)


def _axes(shape: int | Sequence[int]) -> list[int]:
    return [shape] if isinstance(shape, int) else list(shape)

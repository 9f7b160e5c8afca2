"""The norms of GPT-NeoX, under its parameter names. Statistics are in fp32 (or wider); the result has the input's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from megatron.parallel.regions import TensorParallel

NormKind = Literal["layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm"]


def make_norm(kind: NormKind, shape: int | Sequence[int], *, epsilon: float) -> nn.Module:
    """The norm of that name over the last axes of its input, whose sizes are ``shape``."""
    if kind == "layernorm":
        return nn.LayerNorm(_axes(shape), eps=epsilon)
    if kind == "non_parametric_layernorm":
        return nn.LayerNorm(_axes(shape), eps=epsilon, elementwise_affine=False)
    return RMSNorm(shape, epsilon=epsilon) if kind == "rmsnorm" else ScaleNorm(shape, epsilon=epsilon)


def make_sharded_norm(kind: NormKind, shape: Sequence[int], *, epsilon: float, parallel: TensorParallel) -> nn.Module:
    """The same norm of an input of whose axes ``shape`` each shard holds a piece of the first. The statistics are those of the whole."""
    local = (parallel.local(shape[0]), *shape[1:])
    if kind in ("layernorm", "non_parametric_layernorm"):
        return ShardedLayerNorm(local, epsilon=epsilon, is_affine=kind == "layernorm", parallel=parallel)
    return (ShardedRMSNorm if kind == "rmsnorm" else ShardedScaleNorm)(local, epsilon=epsilon, parallel=parallel)


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
        normed = wide * torch.rsqrt(self._mean_square(wide) + self.epsilon)
        return self.scale * normed.to(x.dtype)

    def _mean_square(self, wide: Tensor) -> Tensor:
        return wide.square().mean(tuple(range(-self.scale.ndim, 0)), keepdim=True)


class ScaleNorm(nn.Module):
    """``x / max(|x|, epsilon) * g`` with one learned number ``g`` (arXiv 1910.05895)."""

    def __init__(self, shape: int | Sequence[int], *, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.axes = tuple(range(-len(_axes(shape)), 0))
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.g * (wide / self._length(wide).clamp(min=self.epsilon)).to(x.dtype)

    def _length(self, wide: Tensor) -> Tensor:
        return torch.linalg.vector_norm(wide, dim=self.axes, keepdim=True)


class ShardedLayerNorm(nn.LayerNorm):
    def __init__(self, shape: Sequence[int], *, epsilon: float, is_affine: bool, parallel: TensorParallel) -> None:
        super().__init__(list(shape), eps=epsilon, elementwise_affine=is_affine)
        self.parallel = parallel

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - self._mean(wide)
        normed = centred * torch.rsqrt(self._mean(centred.square()) + self.eps)
        return (normed if self.weight is None else normed * self.weight + self.bias).to(x.dtype)

    def _mean(self, x: Tensor) -> Tensor:
        return self.parallel.total(x.mean(tuple(range(-len(self.normalized_shape), 0)), keepdim=True)) / self.parallel.size


class ShardedRMSNorm(RMSNorm):
    def __init__(self, shape: Sequence[int], *, epsilon: float, parallel: TensorParallel) -> None:
        super().__init__(shape, epsilon=epsilon)
        self.parallel = parallel

    def _mean_square(self, wide: Tensor) -> Tensor:
        return self.parallel.total(super()._mean_square(wide)) / self.parallel.size


class ShardedScaleNorm(ScaleNorm):
    """Each shard's gradient of ``g`` is a part of a sum (`megatron.parallel.parameters`)."""

    def __init__(self, shape: Sequence[int], *, epsilon: float, parallel: TensorParallel) -> None:
        super().__init__(shape, epsilon=epsilon)
        self.parallel = parallel

    def _length(self, wide: Tensor) -> Tensor:
        return self.parallel.total(wide.square().sum(self.axes, keepdim=True)).clamp(min=self.epsilon**2).sqrt()


def _axes(shape: int | Sequence[int]) -> list[int]:
    return [shape] if isinstance(shape, int) else list(shape)

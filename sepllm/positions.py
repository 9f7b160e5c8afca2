"""Positions of tokens as small tables: rotary cosines and sines, ALiBi slopes, sinusoidal embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotary_table(
    positions: Tensor, *, rotary_dims: int, base: float, dtype: torch.dtype, angle_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embeddings (arXiv 2104.09864), each ``[B, T, rotary_dims]``, for ``positions [B, T]``.

    The second half of the last axis repeats the first, as `apply_rotary` wants it. Angles are computed in ``angle_dtype``; fp16
    there repeats Pythia's own training, whose frequencies were halved.
    """
    frequency = rotary_frequencies(rotary_dims, base=base, device=positions.device).to(angle_dtype)
    angle = positions[..., None].to(angle_dtype) * frequency
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotary_frequencies(rotary_dims: int, *, base: float, device: torch.device | str | None = None) -> Tensor:
    """Radians per position of each pair of dimensions, ``[rotary_dims / 2]`` float32."""
    return base ** -(torch.arange(0, rotary_dims, 2, dtype=torch.float32, device=device) / rotary_dims)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first ``R`` dimensions of each head, half-split pairing; the rest passes through.

    ``x [B, T, N, H]``; ``cos``, ``sin`` ``[B, T, R]`` with ``R <= H``.
    """
    dims = cos.shape[-1]
    rotated, passed = x[..., :dims], x[..., dims:]
    first, second = rotated.chunk(2, -1)
    turned = rotated * cos[:, :, None] + torch.cat([-second, first], -1) * sin[:, :, None]
    return torch.cat([turned, passed], -1)


def alibi_slopes(num_heads: int) -> Tensor:
    """ALiBi's slope of each head (arXiv 2108.12409). ``[num_heads]`` float32."""

    def geometric(count: int) -> list[float]:
        ratio = 2 ** (-8 / count)
        return [ratio**power for power in range(1, count + 1)]

    whole = 2 ** math.floor(math.log2(num_heads))
    return torch.tensor(geometric(whole) + geometric(2 * whole)[::2][: num_heads - whole])


def sinusoidal_table(positions: Tensor, width: int) -> Tensor:
    """Sinusoidal position embeddings (arXiv 1706.03762), sines in the first half, cosines in the second, fp32.

    ``[B, T, width]`` for ``positions [B, T]``.
    """
    frequency = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width)
    angle = positions[..., None].float() * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)

"""Positions of tokens: which number a token has for which purpose, and small tables of them: rotary cosines and sines, ALiBi slopes,
sinusoidal embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sepllm.layout import TokenLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """The position numbers of one forward pass, int64. All are the token's place in its text, except with BiPE (arXiv 2401.16421)."""

    embedded: Tensor
    """``[B, T]``: rows of the position embeddings, learned or sinusoidal. BiPE: the token's place in its segment."""
    queries: Tensor
    """``[B, T]``: for rotary angles and ALiBi. BiPE: the number of the token's segment."""
    keys: Tensor
    """``[B, S]``: the same of every column."""

    @classmethod
    def of(cls, layout: TokenLayout, *, segment_end_ids: Iterable[int] | None = None) -> Positions:
        """Positions of the layout's queries and keys. ``segment_end_ids``: BiPE's separators; None: no BiPE."""
        if segment_end_ids is None:
            return cls(embedded=layout.positions, queries=layout.positions, keys=layout.key_positions)
        bilevel = layout.bilevel_positions(segment_end_ids)
        first = layout.ids.shape[1] - layout.num_queries
        return cls(embedded=bilevel.intra[:, first:], queries=bilevel.inter[:, first:], keys=bilevel.inter)

    def check_embedded(self, max_position_embeddings: int, *, offset: int = 0) -> None:
        """ValueError unless each position, ``offset`` added, has a row in a learned table of that many.

        Padding, document starts and segments make positions smaller than columns, so that only the tensor can tell; but it is not looked at
        (nor its device waited for) unless there are more columns than rows.
        """
        if self.keys.shape[1] + offset <= max_position_embeddings:
            return
        last = int(self.embedded.max()) + offset
        if last >= max_position_embeddings:
            raise ValueError(
                f"Position {last} has no embedding: max_position_embeddings is {max_position_embeddings}. Shorten the text (with USE_BiPE: its "
                "segments), or train with a larger max_position_embeddings."
            )


def rotary_table(
    positions: Tensor, *, rotary_dims: int, base: float, dtype: torch.dtype, angle_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embeddings (arXiv 2104.09864), each ``[B, T, rotary_dims]``, for ``positions [B, T]``.

    The second half of the last axis repeats the first, as `apply_rotary` wants it. Angles are computed in ``angle_dtype``; fp16
    there repeats Pythia's own training, whose frequencies were halved.
    """
    return table_of_frequencies(positions, rotary_frequencies(rotary_dims, base=base, device=positions.device).to(angle_dtype), dtype=dtype)


def table_of_frequencies(positions: Tensor, frequencies: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same for ``frequencies [R / 2]``, radians per position of each pair, in whose dtype the angles are computed."""
    angle = positions[..., None].to(frequencies.dtype) * frequencies
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)


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


def apply_rotary_once_more(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `apply_rotary` but for rounding, in a third of its time on a CPU: for all keys of a cache at every token."""
    half = cos.shape[-1] // 2
    first, second, passed = x.split([half, half, x.shape[-1] - 2 * half], -1)
    turned = x[..., : 2 * half] * cos[:, :, None]
    if passed.shape[-1]:
        turned = torch.cat([turned, passed], -1)
    sin = sin[:, :, None, :half]
    turned[..., :half].addcmul_(second, sin, value=-1)
    turned[..., half : 2 * half].addcmul_(first, sin)
    return turned


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

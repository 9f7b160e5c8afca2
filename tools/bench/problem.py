"""One attention problem: token rows, the pattern's key ranges, and random queries, keys, values and output gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sepllm.layout import KeyRanges, TokenLayout
from sepllm.pattern import AttentionPattern
from tools.bench.text import TokenStream

INITIAL_TOKENS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What one call takes: ``[B, S, N, H]`` each, or ``[B, N, S, H]`` with the heads first."""

    q: Tensor
    k: Tensor
    v: Tensor
    out_gradient: Tensor

    def heads_first(self) -> Inputs:
        return Inputs.leaves(*(tensor.detach().transpose(1, 2).contiguous() for tensor in (self.q, self.k, self.v, self.out_gradient)))

    def copy(self) -> Inputs:
        """The same numbers in other memory."""
        return Inputs.leaves(*(tensor.detach().clone() for tensor in (self.q, self.k, self.v, self.out_gradient)))

    @classmethod
    def leaves(cls, q: Tensor, k: Tensor, v: Tensor, out_gradient: Tensor) -> Inputs:
        return cls(q=q.requires_grad_(), k=k.requires_grad_(), v=v.requires_grad_(), out_gradient=out_gradient)


@dataclass(frozen=True, kw_only=True)
class Problem:
    ids: Tensor
    """``[B, S]`` int64, on the CPU as a data loader leaves them."""
    pattern: AttentionPattern
    heads: int
    head_size: int
    device: torch.device
    layers: int
    """How many layers share the mask, when its cost is counted in."""

    @classmethod
    def of_text(
        cls,
        text: TokenStream,
        *,
        batch: int,
        length: int,
        target: float | None,
        window: int,
        heads: int,
        head_size: int,
        device: torch.device,
        layers: int,
    ) -> Problem:
        pattern = AttentionPattern(initial_tokens=INITIAL_TOKENS, separator_ids=frozenset(text.separator_ids), windows=(window,))
        ids = text.rows(batch, length, target=target)
        return cls(ids=ids, pattern=pattern, heads=heads, head_size=head_size, device=device, layers=layers)

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def window(self) -> int:
        return self.pattern.windows[0]

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_size)

    @property
    def causal_pairs(self) -> int:
        """Of one head of all rows."""
        return self.batch * self.length * (self.length + 1) // 2

    @cached_property
    def kept_pairs(self) -> int:
        """Of one head of all rows."""
        return int(self.ranges.kept_pairs().sum())

    @property
    def share(self) -> float:
        return self.kept_pairs / self.causal_pairs

    @cached_property
    def densities(self) -> Sequence[float]:
        """Share of separators among the tokens of each row."""
        separators = torch.tensor(sorted(self.pattern.separator_ids))
        return torch.isin(self.ids, separators).float().mean(1).tolist()

    @cached_property
    def ranges(self) -> KeyRanges:
        return self.new_ranges()

    def new_ranges(self) -> KeyRanges:
        """Worked out anew from the ids, as for every micro-batch."""
        return TokenLayout.from_ids(self.ids, self.pattern).to(self.device).ranges(0)

    @cached_property
    def is_far(self) -> Tensor:
        """By the definition, not by the layout: ``[B, S]`` bool."""
        separators = torch.tensor(sorted(self.pattern.separator_ids))
        is_initial = torch.arange(self.length) < self.pattern.initial_tokens
        return (torch.isin(self.ids, separators) | is_initial).to(self.device)

    def reads(self, queries: slice, row: int) -> Tensor:
        """Which keys these queries of a row read, by the definition. ``[queries, S]`` bool."""
        key = torch.arange(self.length, device=self.device)
        return self.causal(queries) & (self.is_far[row] | (key[queries, None] - key < self.window))

    def causal(self, queries: slice) -> Tensor:
        """Which keys do not come after the query. ``[queries, S]`` bool."""
        key = torch.arange(self.length, device=self.device)
        return key <= key[queries, None]

    def dense_mask(self) -> Tensor:
        """``[B, S, S]`` bool, made anew."""
        return torch.stack([self.reads(slice(None), row) for row in range(self.batch)])

    def inputs(self, dtype: torch.dtype) -> Inputs:
        """Seeded normal numbers, rounded to ``dtype``, as leaves."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.length, self.heads, self.head_size)
        return Inputs.leaves(*(torch.randn(shape, generator=generator).to(self.device, dtype) for _ in range(4)))

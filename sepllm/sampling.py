"""From logits to the next token: temperature, top-k, top-p. Pure functions on ``[B, V]`` tensors; torch only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The default is greedy."""

    temperature: float = 0.0
    """Divides the logits. 0: always the most likely token, whatever the other two say."""
    top_k: int = 0
    """Draw from this many most likely tokens. 0: from all."""
    top_p: float = 0.0
    """Draw from the fewest most likely tokens whose probabilities reach this sum. 0 (or 1): from all."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}: it must be 0 (greedy) or a positive number.")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: it counts tokens and must be 0 (off) or positive.")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it is a probability and must lie between 0 (off) and 1.")


def next_tokens(logits: Tensor, sampling: Sampling, *, generator: torch.Generator | None = None) -> Tensor:
    """One token id per row. ``[B]`` int64, for ``logits [B, V]``.

    The logits are divided by the temperature, then cut by top-k, then by top-p, then drawn from with ``generator`` (None: torch's
    own), which must live on the device of the logits.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    kept = keep_top_p(keep_top_k(_divided(logits.float(), sampling.temperature), sampling.top_k), sampling.top_p)
    return torch.multinomial(kept.softmax(-1), 1, generator=generator).squeeze(-1)


def _divided(logits: Tensor, temperature: float) -> Tensor:
    """The logits of a temperature, less the largest of each row, so that none overflows however small the temperature is."""
    return (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)


def keep_top_k(logits: Tensor, count: int) -> Tensor:
    """The logits with all but the ``count`` largest of each row at -inf. Ties with the last one kept stay; 0 keeps all."""
    if count == 0 or count >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(count, -1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, probability: float) -> Tensor:
    """The logits with all but each row's nucleus at -inf: the fewest most likely tokens whose probabilities reach ``probability``
    (arXiv 1904.09751). The most likely token always stays; 0 and 1 keep all.
    """
    if probability == 0 or probability == 1:
        return logits
    ordered, order = logits.sort(-1, descending=True)
    weights = ordered.softmax(-1)
    before = weights.cumsum(-1) - weights
    is_cut = before >= probability
    is_cut[..., 0] = False
    return logits.masked_fill(torch.zeros_like(is_cut).scatter(-1, order, is_cut), -torch.inf)

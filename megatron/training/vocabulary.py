"""Rows of the vocabulary: added where tensor parallelism wants more, taken away on the way back."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_MATRICES = re.compile(r"sequential\.\d+\.(word_embeddings|final_linear)\.weight")


def repadded(state: Mapping[str, Tensor], *, vocab_size: int, rows: int) -> dict[str, Tensor]:
    """The weights with ``rows`` rows of the same vocabulary, padded otherwise. Matrices that lack some of its tokens stay as they are."""
    return {name: _extended(value[:rows], rows) if _MATRICES.fullmatch(name) and len(value) >= vocab_size else value for name, value in state.items()}


def with_rows(state: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The weights with embedding and output matrix of ``rows`` rows. New ones are the mean of the others: tokens like any other, and
    none that stands out among the logits."""
    return {name: _extended(value, rows) if _MATRICES.fullmatch(name) else value for name, value in state.items()}


def without_rows(state: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The weights with the first ``rows`` rows of embedding and output matrix."""
    return {name: value[:rows] if _MATRICES.fullmatch(name) else value for name, value in state.items()}


def _extended(value: Tensor, rows: int) -> Tensor:
    missing = rows - value.shape[0]
    if missing == 0:
        return value
    mean = value.float().mean(0, keepdim=True).to(value.dtype)
    return torch.cat([value, mean.expand(missing, -1)])

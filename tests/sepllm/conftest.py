"""The definition of who reads what, as loops over Python integers; shared by the tests of the layout and of the cores."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sepllm.pattern import AttentionPattern

Definition = Callable[..., Tensor]


def _texts(ids: list[int], is_text: list[bool], document_end_id: int | None) -> list[list[int]]:
    """Columns of each text of a row: of its documents, or of all that is not padding."""
    texts: list[list[int]] = [[]]
    for column, token in enumerate(ids):
        if is_text[column]:
            texts[-1].append(column)
            if token == document_end_id:
                texts.append([])
    return texts


def _reads(
    ids: Tensor, pattern: AttentionPattern, *, layer: int = 0, attention_mask: Tensor | None = None, document_end_id: int | None = None
) -> Tensor:
    """``[B, S, S]`` bool: `AttentionPattern.reads` asked of every pair of each text."""
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    rows, length = ids.shape
    reads = [[[False] * length for _ in range(length)] for _ in range(rows)]
    for row, (tokens, is_text) in enumerate(zip(ids.tolist(), mask.bool().tolist(), strict=True)):
        for columns in _texts(tokens, is_text, document_end_id):
            for query, query_column in enumerate(columns):
                for key, key_column in enumerate(columns[: query + 1]):
                    reads[row][query_column][key_column] = pattern.reads(query=query, key=key, key_id=tokens[key_column], layer=layer)
    return torch.tensor(reads)


@pytest.fixture
def definition() -> Definition:
    """``definition(ids, pattern, layer=0, attention_mask=None, document_end_id=None)``: which key each query reads."""
    return _reads

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.data.indexed import IndexedDatasetWriter
from tools.sepllm.rows import ArrayTokens, DatasetTokens, row_blocks


def write(prefix: Path, sizes: list[int]) -> np.ndarray:
    ids = np.arange(sum(sizes))
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for part in np.split(ids, np.cumsum(sizes)[:-1]):
            writer.add_document(part)
    return ids


@pytest.mark.parametrize("sizes", [[20], [1, 7, 3, 9], [5, 5, 5, 5]])
def test_a_dataset_reads_as_one_text(sizes: list[int], tmp_path: Path) -> None:
    ids = write(tmp_path / "data", sizes)
    tokens = DatasetTokens(tmp_path / "data")
    for start in range(20):
        for length in range(20 - start + 1):
            assert tokens.read(start, length).tolist() == ids[start : start + length].tolist()


def test_rows_are_all_whole_ones_in_order() -> None:
    tokens = ArrayTokens(name="text", ids=np.arange(7 * 40 + 3))
    blocks = list(row_blocks(tokens, seq_length=7))
    assert [len(block) for block in blocks] == [32, 8]
    assert torch.equal(torch.cat(blocks), torch.arange(7 * 40).view(40, 7))


def test_fewer_rows_are_spread_over_the_text() -> None:
    tokens = ArrayTokens(name="text", ids=np.arange(100))
    (block,) = row_blocks(tokens, seq_length=10, most=4)
    assert (block[:, 0] // 10).tolist() == [0, 2, 5, 7]


def test_a_text_shorter_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="text has 5 tokens, but a row takes 6"):
        list(row_blocks(ArrayTokens(name="text", ids=np.arange(5)), seq_length=6))

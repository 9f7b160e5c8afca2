from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.tokenizer import CharLevelTokenizer
from tests.tools.datasets.writing import write_pair
from tools.datasets import pairs
from tools.datasets.pairs import document_borders, document_of, document_tokens, open_pair, text_of, token_runs


@pytest.fixture
def dataset(tmp_path: Path) -> IndexedDataset:
    """Documents of 2, 0, 1 and 3 sequences, the last with an empty one."""
    with IndexedDatasetWriter(tmp_path / "x", "u2") as writer:
        for document in ([[1], [2, 3]], [], [[4]], [[5], [], [6]]):
            for row in document:
                writer.add(row)
            writer.end_document()
    return IndexedDataset(tmp_path / "x")


def test_documents_hold_their_sequences(dataset: IndexedDataset) -> None:
    assert [document_tokens(dataset, document).tolist() for document in range(4)] == [[1, 2, 3], [], [4], [5, 6]]
    assert [document_of(dataset, sequence) for sequence in range(6)] == [0, 0, 2, 3, 3, 3]
    assert document_borders(dataset).tolist() == [0, 2, 2, 3, 6]
    for document in (-1, 4):
        with pytest.raises(ValueError, match=f"Document {document} of .* does not exist: it has 4"):
            document_tokens(dataset, document)


@pytest.mark.parametrize("sequences", [1, 2, 100])
@pytest.mark.parametrize("tokens", [1, 2, 100])
def test_runs_are_all_tokens_with_their_places(dataset: IndexedDataset, sequences: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "SEQUENCES", sequences)
    monkeypatch.setattr(pairs, "TOKENS", tokens)
    runs = [(place, run.tolist()) for place, run in token_runs(dataset)]
    assert [token for _, run in runs for token in run] == [1, 2, 3, 4, 5, 6]
    assert all(run[0] == place + 1 and len(run) <= tokens for place, run in runs)


def test_a_file_name_stands_for_its_prefix(dataset: IndexedDataset) -> None:
    assert len(open_pair(f"{dataset.prefix}.idx")) == len(open_pair(f"{dataset.prefix}.bin")) == 6


def test_tokens_of_another_tokenizer_are_named(tmp_path: Path) -> None:
    assert text_of(np.array([72, 105]), CharLevelTokenizer()) == "Hi"
    for token in (512, -1):
        with pytest.raises(ValueError, match=f"Token {token} is none of the tokenizer's 512"):
            text_of(np.array([72, token]), CharLevelTokenizer())


def test_an_empty_pair_has_nothing(tmp_path: Path) -> None:
    empty = IndexedDataset(write_pair(tmp_path / "empty", []))
    assert list(token_runs(empty)) == []
    assert document_borders(empty).tolist() == [0]

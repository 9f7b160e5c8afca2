from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import index_bytes
from tests.tools.datasets.writing import write_pair, write_sparse_pair
from tools.datasets.inspect_pair import main


def inspected(prefix: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert main([prefix, "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_a_pair_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_pair(tmp_path / "my.text", [[5, 9, 0], [], [7, 0], [3, 0], [8, 2]])
    (tmp_path / "my.text_train_0_indexmap_8ns_4sl_1s_packedpi_ac_shuffle_idx.npy").write_bytes(b"")
    assert inspected(prefix, capsys) == {
        "prefix": prefix,
        "dtype": "uint16",
        "bin_bytes": 18,
        "idx_bytes": 34 + 5 * 12 + 6 * 8,
        "documents": 5,
        "lists_documents": True,
        "sequences": 5,
        "empty_sequences": 1,
        "tokens": 9,
        "shortest": 0,
        "median": 2.0,
        "longest": 3,
        "looked_at": 4,
        "lowest_id": 0,
        "highest_id": 9,
        "last_tokens": {"0": 3, "2": 1},
        "sample_indices": ["my.text_train_0_indexmap_8ns_4sl_1s_packedpi_ac"],
    }


def test_a_preshuffled_pair_of_gigabytes_is_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_sparse_pair(tmp_path / "document", [1_500_000_000] * 2, "u2")
    (tmp_path / "document.idx").write_bytes(
        index_bytes(np.dtype("<u2"), sizes=np.full(3, 2049), offsets=np.array([0, 3_000_000_000, 5_900_000_000]), doc_idx=np.array([0]))
    )
    assert main([prefix]) == 0
    text = capsys.readouterr().out
    assert "all sequences have 2,049 tokens: samples already" in text
    assert "the index names none: every sequence counts as one" in text


def test_an_empty_pair_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspected(write_pair(tmp_path / "x", []), capsys)["highest_id"] is None
    assert main([str(tmp_path / "x")]) == 0

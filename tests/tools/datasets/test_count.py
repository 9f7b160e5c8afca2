from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tools.datasets.writing import write_pair, write_sparse_pair
from tools.datasets.count import main


def counted(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_pairs_are_counted_one_by_one_and_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_pair(tmp_path / "in" / "a", [[1, 2, 0], [], [3, 0]])
    write_pair(tmp_path / "in" / "b", [[0, 0]], "i4")
    assert main([first, str(tmp_path / "in"), "--ids", "0", "70000", "-1"]) == 0
    found = counted(capsys)
    one = {"prefix": first, "dtype": "uint16", "documents": 3, "sequences": 3, "empty_sequences": 1, "tokens": 5, "bytes": 10}
    other = {"prefix": first[:-1] + "b", "dtype": "int32", "documents": 1, "sequences": 1, "empty_sequences": 0, "tokens": 2, "bytes": 8}
    ids = [{"0": 2, "70000": 0, "-1": 0}, {"0": 2, "70000": 0, "-1": 0}]
    assert found["pairs"] == [one | {"ids": ids[0]}, one | {"ids": ids[0]}, other | {"ids": ids[1]}]
    assert found["total"] == {"documents": 7, "sequences": 7, "empty_sequences": 2, "tokens": 12, "bytes": 28}


def test_more_tokens_than_32_bits_are_counted_without_reading_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([write_sparse_pair(tmp_path / "x", [2_147_483_647] * 3, "u2")]) == 0
    assert counted(capsys)["total"] == {"documents": 3, "sequences": 3, "empty_sequences": 0, "tokens": 6_442_450_941, "bytes": 12_884_901_882}


def test_a_pair_that_is_not_there_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "x")]) == 2
    assert "x.idx does not exist" in capsys.readouterr().err

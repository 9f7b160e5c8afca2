from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.data.indexed import IndexedDatasetWriter
from sepllm.pattern import AttentionPattern
from tests.tools.sepllm.conftest import TEXT, MakeTokenizer
from tools.sepllm import density
from tools.sepllm.density import Density, main

SEPARATORS = (3, 7)


def test_the_statistics_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density, "WINDOWS", (4, 9))
    ids = torch.randint(0, 12, (5, 40), generator=torch.Generator().manual_seed(0))
    found = Density.of("text", ids.split(2), SEPARATORS, initial_tokens=2)
    is_separator = np.isin(ids.numpy(), SEPARATORS)
    assert (found.rows, found.seq_length) == (5, 40)
    assert found.share == pytest.approx(is_separator.mean())
    assert [found.row_shares[name] for name in ("min", "max")] == pytest.approx([is_separator.mean(1).min(), is_separator.mean(1).max()])
    assert found.counts == {token: int((ids == token).sum()) for token in SEPARATORS}
    assert found.most_far_keys == max(sum(key < 2 or bool(row[key]) for key in range(40)) for row in is_separator)
    assert found.far_capacity == 64
    for window, kept in found.kept.items():
        pattern = AttentionPattern(initial_tokens=2, separator_ids=frozenset(SEPARATORS), windows=(window,))
        reads = [[pattern.reads(query=q, key=k, key_id=int(row[k])) for q, k in product(range(40), repeat=2)] for row in ids]
        assert kept.attention_map == sum(map(sum, reads)) / (5 * 40 * 41 / 2)
        assert kept.kv == sum(sum(row[-40:]) for row in reads) / (5 * 40)


def test_separators_are_found_in_the_tokenizer(make_tokenizer: MakeTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 10)
    assert main(["--text", str(tmp_path / "text.txt"), "--tokenizer", str(make_tokenizer()), "--seq-length", "20"]) == 0
    out = capsys.readouterr().out
    assert "of them separators" in out
    assert "\\n" in out


def test_a_dataset_gives_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document([1, 3, 1, 1] * 20)
    assert main([str(tmp_path / "data"), "--separators", "3", "--seq-length", "8", "--rows", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["share"], found["rows"], found["counts"]) == (0.25, 5, {"3": 10})


def test_what_makes_the_tokens_must_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "data")]) == 2
    assert "--tokenizer is missing" in capsys.readouterr().err

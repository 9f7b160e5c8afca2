from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench import index_build
from tools.bench.index_build import Corpus, document_sizes, main, measure


def test_both_contenders_are_measured_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--documents", "3000", "--seq-length", "64", "--json", str(tmp_path / "out.json")]) == 0
    assert "C++ built the arrays of the definition, bit for bit" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["documents"] == 3000
    assert row["c++"]["sha256"] == row["numpy"]["sha256"]
    assert row["c++"]["array_bytes"] == 4 * 3000 + 12 * row["c++"]["samples"] + 8
    assert row["c++"]["seconds"] > 0


def test_other_arrays_fail_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(index_build, "in_process", lambda name, corpus, seq_length: measure("c++", corpus, seq_length=64 + len(name)))
    assert main(["--documents", "300"]) == 1
    assert "DID NOT BUILD the arrays" in capsys.readouterr().out


def test_a_corpus_has_about_the_tokens_it_says() -> None:
    sizes = document_sizes(Corpus(documents=100_000, tokens=10**8))
    assert len(sizes) == 100_000
    assert sizes.sum() == pytest.approx(10**8, rel=0.02)

"""Preparing beside the library and datasets, on a few lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench import preprocess
from tools.datasets.train_tokenizer import train_like_neox

TEXTS = [f"Document {number} says: one, two, three." * (number + 1) for number in range(30)]


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # so that what the benchmark sets goes with the test
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train_like_neox(TEXTS, 320).save(str(tmp_path / "tokenizer.json"))
    return ["--input", str(tmp_path / "x.jsonl"), "--tokenizer", str(tmp_path / "tokenizer.json"), "--json", str(tmp_path / "out.json")]


@pytest.mark.timeout(120)
def test_every_contender_gets_a_row_and_the_stream_its_moments(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preprocess, "WANTED", 0.0)
    assert preprocess.main([*flags, "--workers", "1", "--rounds", "1", "--stream-mb", "1"]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["contender"] for row in result["rows"]] == ["library", "library_fast", "library_fast_again", "prepare", "command_1", "datasets_1"]
    for row in result["rows"]:
        assert row["tokens_per_core_s"] == pytest.approx(result["header"]["tokens"] / row["core_s"])
    assert len(result["memory"]) == 10
    assert "0% is wanted: reached" in capsys.readouterr().out


def test_a_contender_of_other_tokens_stops_the_benchmark(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = preprocess.Task.library
    monkeypatch.setattr(preprocess.Task, "library", lambda task, *, is_fast: library(task, is_fast=is_fast)[:-1])
    assert preprocess.main([*flags, "--workers", "1", "--rounds", "1"]) == 1
    assert "prepare, command_1, datasets_1 did not give the library's tokens" in capsys.readouterr().err

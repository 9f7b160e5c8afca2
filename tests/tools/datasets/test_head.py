from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tools.datasets.writing import write_pair
from tools.datasets.head import main

TEXTS = ["In the beginning.", "", "Was dóna", "and the end"]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_pair(tmp_path / "x", [list(text.encode()) for text in TEXTS])


def test_documents_are_shown_as_ids(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([prefix, "-n", "2", "--tokens", "3"]) == 0
    assert capsys.readouterr().out == "document 0: 17 tokens, the first 3 of which follow\n73 110 32\ndocument 1: 0 tokens\n\n"


def test_documents_are_shown_as_text_from_any_document_on(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([prefix, "--start", "2", "--tokenizer", "bytes"]) == 0
    assert capsys.readouterr().out == "document 2: 9 tokens\nWas dóna\ndocument 3: 11 tokens\nand the end\n"


def test_json_is_one_object_a_document(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([prefix, "--start", "2", "-n", "1", "--tokenizer", "bytes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"document": 2, "tokens": 9, "text": "Was dóna"}
    assert main([prefix, "-n", "1", "--tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"document": 0, "tokens": 17, "ids": [73, 110]}


@pytest.mark.parametrize("flags", [["-n", "-1"], ["--start", "-1"], ["--tokens", "0"], ["--tokenizer", "no-such"]])
def test_what_cannot_be_shown_is_a_sentence(flags: list[str], prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([prefix, *flags]) == 2
    assert capsys.readouterr().err

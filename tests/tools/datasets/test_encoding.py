from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.config.schema import TokenizerConfig
from megatron.data.indexed import IndexedDataset
from tools.datasets import preprocess_data, preprocess_data_with_mask
from tools.datasets.documents import find_sources, read_documents
from tools.datasets.encoding import TextRecipe, fingerprint, labels_after
from tools.datasets.preprocess import preprocess

CHARACTERS = TokenizerConfig(tokenizer_type="CharLevelTokenizer")
ANSWER = ",".join(map(str, b"A:"))


@pytest.mark.parametrize(
    ("row", "mask_before", "labels"),
    [
        ([1, 2, 3, 4], (2,), [-100, -100, 3, 4]),
        ([1, 2, 3, 2, 3, 4], (2, 3), [-100, -100, -100, 2, 3, 4]),
        ([2, 2, 3], (2, 3), [-100, -100, -100]),
        ([1, 2], (2, 3), [1, 2]),
        ([3], (2, 3), [3]),
        ([], (2,), []),
    ],
)
def test_labels_count_after_the_first_place_of_the_tokens(row: list[int], mask_before: tuple[int, ...], labels: list[int]) -> None:
    assert labels_after(row, mask_before) == labels


def write(folder: Path, *texts: str) -> str:
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(folder / "x.jsonl")


def test_the_mask_makes_a_pair_of_labels_beside_tokens_of_the_same_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--input", write(tmp_path, "Q:x A:y", "", "no answer"), "--tokenizer-type", "CharLevelTokenizer", "--append-eod"]
    assert preprocess_data_with_mask.main([*flags, "--mask-before-token", ANSWER, "--output-prefix", str(tmp_path / "x")]) == 0
    text, label = IndexedDataset(tmp_path / "x_text_document"), IndexedDataset(tmp_path / "x_label_document")
    assert [row.tolist() for row in text] == [[*b"Q:x A:y", 0], [*b"no answer", 0]]
    assert [row.tolist() for row in label] == [[-100] * 6 + [*b"y", 0], [*b"no answer", 0]]
    assert text.dtype == label.dtype == "int32"
    assert "x_label_document: 2 documents, 18 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mask-before-token", "a,b"], "--mask-before-token is a,b: give ids of tokens"),
        (["--mask-before-token", "1", "--jsonl-keys", "text", "title"], "--mask-before-token labels one field, and --jsonl-keys names 2"),
    ],
)
def test_a_mask_that_means_nothing_is_refused(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--input", write(tmp_path, "a"), "--tokenizer-type", "CharLevelTokenizer", "--output-prefix", str(tmp_path / "x")]
    assert preprocess_data.main([*words, *flags]) == 2
    assert message in capsys.readouterr().err


def read(file: str) -> list[tuple[str, ...]]:
    return [document for source in find_sources([file]) for document in read_documents(source, ["text"])]


def test_half_a_character_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b\\ud83d"}\n')
    for use in (lambda file: preprocess([file], str(tmp_path / "x"), TextRecipe(tokenizer=CHARACTERS)), read):
        with pytest.raises(ValueError, match=r"x.jsonl, line 2 holds half a character \(\\ud83d"):
            use(str(tmp_path / "x.jsonl"))


def test_text_is_repaired_before_it_is_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", SimpleNamespace(fix_text=lambda text: text.replace("â€™", "’")))
    preprocess([write(tmp_path, "itâ€™s")], str(tmp_path / "x"), TextRecipe(tokenizer=CHARACTERS, ftfy=True))
    assert bytes(IndexedDataset(tmp_path / "x_text_document")[0].tolist()).decode() == "it’s"


def test_a_fingerprint_differs_where_a_file_does(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("one")
    before = [fingerprint("x", [tmp_path / "a.json", None]), fingerprint("x", [tmp_path])]
    assert fingerprint("y", [tmp_path / "a.json"]) != before[0]
    (tmp_path / "a.json").write_text("two")
    assert fingerprint("x", [tmp_path / "a.json"]) != before[0]
    assert fingerprint("x", [str(tmp_path)]) != before[1]

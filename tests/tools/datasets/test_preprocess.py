from __future__ import annotations

import functools
import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

import prepare_data
from megatron.config.schema import TokenizerConfig
from megatron.data.indexed import IndexedDataset
from tools.datasets import chunks, hub
from tools.datasets.documents import Source
from tools.datasets.encoding import TextRecipe
from tools.datasets.growing import Written
from tools.datasets.preprocess import preprocess
from tools.datasets.progress import Bar

TEXTS = ["In the beginning.", "", "Was dóna; and\nthe end", "x" * 300]
CHARACTERS = TokenizerConfig(tokenizer_type="CharLevelTokenizer")
BYTES = TextRecipe(tokenizer=CHARACTERS)


def lines(texts: list[str], **others: str) -> bytes:
    return "".join(json.dumps({"text": text, **others}) + "\n" for text in texts).encode()


def write_parquet(path: Path) -> None:
    parquet.write_table(pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS}), path, row_group_size=2)


KINDS: dict[str, Callable[[Path], object]] = {
    "x.jsonl": lambda path: path.write_bytes(lines(TEXTS)),
    "x.json": lambda path: path.write_bytes(lines(TEXTS).replace(b"\n", b"\n\n")),
    "x.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(TEXTS))),
    "x.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(lines(TEXTS[:2])) + zstandard.compress(lines(TEXTS[2:]))),
    "x.parquet": write_parquet,
}


def decoded(prefix: Path | str) -> list[str]:
    return [bytes(row.tolist()).decode() for row in IndexedDataset(prefix)]


@pytest.mark.parametrize("name", KINDS)
def test_documents_of_every_kind_of_file_become_tokens(name: str, tmp_path: Path) -> None:
    KINDS[name](tmp_path / name)
    written = preprocess([str(tmp_path / name)], str(tmp_path / "out" / "my"), BYTES)
    prefix = str(tmp_path / "out" / "my_text_document")
    assert decoded(prefix) == [text for text in TEXTS if text]
    tokens = sum(len(text.encode()) for text in TEXTS)
    assert written == [Written(prefix=prefix, documents=3, tokens=tokens, end_tokens=0, empty=1)]


def test_plain_text_is_one_document_and_folders_are_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "b.txt").write_text("second\nfile")
    (tmp_path / "in" / "deep" / "c.txt.gz").write_bytes(gzip.compress(b"third"))
    (tmp_path / "in" / "a.jsonl").write_bytes(lines(["first", "document"]))
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG")
    preprocess([str(tmp_path / "in")], str(tmp_path / "x"), BYTES)
    assert decoded(tmp_path / "x_text_document") == ["first", "document", "second\nfile", "third"]


def test_each_document_ends_with_the_end_token_on_request(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines(TEXTS))
    recipe = TextRecipe(tokenizer=CHARACTERS, append_eod=True)
    (written,) = preprocess([str(tmp_path / "x.jsonl")], str(tmp_path / "x"), recipe)
    dataset = IndexedDataset(tmp_path / "x_text_document")
    assert [row[-1] for row in dataset] == [0, 0, 0]
    assert (written.end_tokens, written.documents, written.tokens) == (3, 3, dataset.num_tokens)
    assert dataset.doc_idx.tolist() == [0, 1, 2, 3]
    assert dataset.dtype == "uint16"


def test_each_key_is_tokenized_from_its_own_field(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines(["a", "b"], summary="short"))
    preprocess([str(tmp_path / "x.jsonl")], str(tmp_path / "x"), TextRecipe(tokenizer=CHARACTERS, keys=("text", "summary")))
    assert decoded(tmp_path / "x_text_document") == ["a", "b"]
    assert decoded(tmp_path / "x_summary_document") == ["short", "short"]


@pytest.mark.timeout(120)
def test_many_processes_write_what_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_RECORDS", 3)
    (tmp_path / "x.jsonl").write_bytes(lines([f"document {number}" for number in range(40)]))
    for workers in (1, 2):
        preprocess([str(tmp_path / "x.jsonl")], str(tmp_path / str(workers)), BYTES, workers=workers)
    for kind in ("bin", "idx"):
        assert (tmp_path / f"1_text_document.{kind}").read_bytes() == (tmp_path / f"2_text_document.{kind}").read_bytes()


FAULTS = {
    "no JSON": (b'{"text": "a"}\n{"text": \n', r"x.jsonl, line 2 is not JSON"),
    "another field": (b'{"text": "a"}\n\n{"content": "b"}\n', r"x.jsonl, line 3 has no text under 'text' \(it has content\)"),
    "a number": (b'{"text": 3}\n', "line 1 has no text under 'text' but 3: give it a text, or take the document out."),
    "nothing": (b'{"text": null}\n', "line 1 has no text under 'text' but null: give it a text"),
    "a list": (b'[{"text": "a"}, {"text": "b"}]\n', "as it is a JSON list and has no fields: write each object on a line of its own."),
    "other bytes than UTF-8": (b'{"text": "\xff"}\n', "utf-8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_line_is_named_and_nothing_is_written(fault: str, tmp_path: Path) -> None:
    content, message = FAULTS[fault]
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        preprocess([str(tmp_path / "x.jsonl")], str(tmp_path / "out"), BYTES)
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_parquet_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="has no column content: name one of id, text"):
        preprocess([str(tmp_path / "x.parquet")], str(tmp_path / "out"), TextRecipe(tokenizer=CHARACTERS, keys=("content",)))


def test_plain_text_has_no_second_field(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(ValueError, match="is plain text and has no fields"):
        preprocess([str(tmp_path / "x.txt")], str(tmp_path / "out"), TextRecipe(tokenizer=CHARACTERS, keys=("text", "summary")))


@pytest.mark.parametrize("name", ["x.doc", "x", "x.parquet.gz", ".zst"])
def test_a_file_of_another_kind_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="is of no known kind"):
        preprocess([str(tmp_path / name)], str(tmp_path / "out"), BYTES)


def run(*flags: str) -> int:
    return prepare_data.main(["--tokenizer-type", "CharLevelTokenizer", *flags])


def test_the_flags_are_gpt_neoxs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines(TEXTS))
    (tmp_path / "y.jsonl").write_bytes(lines(["more"]))
    flags = ["--append-eod", "--workers", "1", "--num-docs", "4", "--log-interval", "2", "--dataset-impl", "mmap", "--jsonl-keys", "text"]
    assert run("--input", f"{tmp_path}/x.jsonl,{tmp_path}/y.jsonl", "--output-prefix", f"{tmp_path}/out", *flags) == 0
    assert decoded(tmp_path / "out_text_document")[-1] == "more\0"
    assert "4 documents, 347 tokens, 4 of them ends of documents, 1 empty ones left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "no-such-file"], "--input no-such-file does not exist"),
        (["--dataset-impl", "lazy"], "--dataset-impl lazy is not written any more"),
        (["--workers", "0"], "--workers is 0"),
        (["--tokenizer-type", "HFTokenizer"], "tokenizer_type HFTokenizer needs vocab_file"),
    ],
)
def test_a_mistake_is_a_sentence_and_not_a_traceback(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_text("a")
    assert run("--input", f"{tmp_path}/x.txt", "--output-prefix", f"{tmp_path}/out", *flags) == 1
    assert capsys.readouterr().err.startswith(f"prepare_data.py: {message}")


def test_ftfy_is_asked_for_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(ValueError, match="pip install ftfy"):
        preprocess([str(tmp_path / "x.txt")], str(tmp_path / "out"), TextRecipe(tokenizer=CHARACTERS, ftfy=True))


def test_the_named_corpora_of_gpt_neox_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_data.main(["enwik8", "-d", "data"]) == 1
    assert "GPT-NeoX's enwik8 and other named corpora are not downloaded" in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "x.txt").write_text("a")
    monkeypatch.setattr("tools.datasets.growing.GrowingPair.finish", interrupted)
    assert run("--input", f"{tmp_path}/x.txt", "--output-prefix", f"{tmp_path}/out") == 130
    assert "stopped; the same command goes on from here" in capsys.readouterr().err


def test_a_process_that_is_ended_from_outside_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the system where memory is short: the pool finds it broken."""
    monkeypatch.setattr(chunks, "_begin", functools.partial(os._exit, 9))
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(ChildProcessError, match="was ended from outside: give fewer --workers"):
        preprocess([str(tmp_path / "x.txt")], str(tmp_path / "x"), BYTES, workers=2)


@pytest.mark.parametrize(
    ("names", "num_docs", "total"),
    [(["a.jsonl", "b.jsonl.gz"], None, "bytes"), (["a.jsonl", "b.jsonl.gz"], 8, 8), (["hf:x"], None, None)],
)
def test_the_bar_counts_stored_bytes_or_documents(
    names: list[str], num_docs: int | None, total: str | int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["one", "two", "three", "four"]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(["one", "two", "three", "four"]), mtime=0))
    monkeypatch.chdir(tmp_path)
    sources = [Source(name=name, kind=hub.PREFIX if ":" in name else ".jsonl") for name in names]
    monkeypatch.setattr(hub, "rows", lambda name: iter([{"text": "a"}] * 8))
    with Bar(sources, num_docs=num_docs, log_interval=1) as bar:
        for chunk in chunks.cut(sources, ["text"], chunks.Position()):
            bar.move(chunk, num_tokens=3)
        num_bytes = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert bar._bar.total == (num_bytes if total == "bytes" else total)
        assert bar._bar.n == (num_bytes if total == "bytes" else 8)


def test_the_bar_of_a_run_that_goes_on_does_not_count_what_was_there_as_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["one", "two", "three", "four"]))
    sources = [Source(name=str(tmp_path / "a.jsonl"), kind=".jsonl")]
    with Bar(sources, num_docs=None, log_interval=1, documents=2) as bar:
        (chunk,) = chunks.cut(sources, ["text"], chunks.Position())
        bar.move(chunk, num_tokens=3)
        assert bar._bar.n == bar._bar.initial == (tmp_path / "a.jsonl").stat().st_size

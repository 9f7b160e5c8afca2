from __future__ import annotations

import re
from pathlib import Path

import pytest
import sentencepiece
import yaml
from tokenizers import Tokenizer

from tests.tools.sepllm.conftest import TEXT, MakeTokenizer
from tools.sepllm.separators import main, separator_ids, unescaped
from tools.sepllm.vocabulary import open_tokenizer, readable

CHARACTERS = ".,?!;: \t\n"


def test_separators_are_the_tokens_of_one_character_in_the_papers_order(make_tokenizer: MakeTokenizer) -> None:
    path = make_tokenizer()
    byte_level = {" ": "\u0120", "\t": "\u0109", "\n": "\u010a"}
    vocabulary = Tokenizer.from_file(str(path)).get_vocab()
    assert separator_ids(open_tokenizer(path)) == [vocabulary[byte_level.get(character, character)] for character in CHARACTERS]


def test_spaced_separators_follow_those_without_a_blank(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = open_tokenizer(make_tokenizer())
    alone, spaced = separator_ids(tokenizer), separator_ids(tokenizer, spaced=True)
    assert spaced[: len(alone)] == alone
    assert [tokenizer.token_text(token) for token in spaced[len(alone) :]] == [" .", " ,"]


def test_all_separators_are_the_tokens_of_nothing_else(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = open_tokenizer(make_tokenizer())
    found = separator_ids(tokenizer, everything=True)
    by_definition = {token for token in range(tokenizer.vocab_size) if re.fullmatch(r"[.,?!;: \t\n]+", tokenizer.token_text(token))}
    assert set(found) == by_definition
    assert len(found) == len(by_definition) > len(separator_ids(tokenizer))


def test_the_line_of_yaml_is_what_a_configuration_takes(make_tokenizer: MakeTokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_tokenizer()
    assert main([str(path), "--yaml"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == {"separator_token_ids": separator_ids(open_tokenizer(path))}


def test_each_id_is_shown_with_its_text(make_tokenizer: MakeTokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_tokenizer()
    assert main([str(path.parent), "--characters", r".\n"]) == 0
    *shown, _, line = capsys.readouterr().out.splitlines()
    assert [row.split()[1] for row in shown] == [".", "\\n"]
    assert yaml.safe_load(line)["separator_token_ids"] == [int(row.split()[0]) for row in shown]


def test_a_tokenizer_without_an_end_of_document_is_read(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = open_tokenizer(make_tokenizer(special=("<s>",)))
    assert tokenizer.eod_id == -1
    assert len(separator_ids(tokenizer)) == len(CHARACTERS)


def test_a_sentencepiece_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=40, minloglevel=2, hard_vocab_limit=False
    )
    tokenizer = open_tokenizer(tmp_path)
    texts = [tokenizer.token_text(token) for token in separator_ids(tokenizer, ".,")]
    assert texts == [".", ","]


def test_one_token_a_byte_needs_no_file() -> None:
    assert separator_ids(open_tokenizer("bytes")) == [ord(character) for character in CHARACTERS]


def test_a_character_without_a_token_is_named(make_tokenizer: MakeTokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(make_tokenizer()), "--characters", ".\u2026"]) == 0
    assert capsys.readouterr().err == "No token is exactly one of '\u2026'.\n"


@pytest.mark.parametrize("name", ["nothing.json", "nothing", "text.txt", "."])
def test_what_is_no_tokenizer_is_told_in_a_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    assert main([str(tmp_path / name) if name != "nothing" else name]) == 2
    assert len(capsys.readouterr().err.strip()) > 20


def test_escapes_are_read_and_signs_shown() -> None:
    assert unescaped(r".\t\n\r") == ".\t\n\r"
    assert [readable(text) for text in (" the", " ,", "\n", "a b")] == ["the", "\u2423,", "\\n", "a\u2423b"]

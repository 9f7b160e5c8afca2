from __future__ import annotations

import json
from pathlib import Path

import pytest

import prepare_data
from megatron.config.schema import TokenizerConfig
from megatron.data.tokenizer import build_tokenizer, find_separator_ids
from tools.datasets.train_tokenizer import SMALLEST, main

TEXTS = ["In the beginning, God created the heaven and the earth.\n", "And the earth was without form; and void.\n"] * 20


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text, "title": "none"}) + "\n" for text in TEXTS))
    return tmp_path / "x.jsonl"


def test_a_trained_tokenizer_is_of_gpt_neoxs_kind(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "tokenizer.json"
    assert prepare_data.main(["train-tokenizer", "--input", str(text), "--vocab-size", "320", "--output", str(output)]) == 0
    saved = json.loads(output.read_text())
    assert (saved["normalizer"]["type"], saved["pre_tokenizer"]["type"], saved["model"]["type"]) == ("NFC", "ByteLevel", "BPE")
    added = {token["id"]: token["content"] for token in saved["added_tokens"]}
    assert (added[0], added[1]) == ("<|endoftext|>", "<|padding|>")
    assert [added[token] for token in sorted(added)[2:]] == [" " * length for length in range(24, 1, -1)]
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(output)))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (320, 0)
    for sample in (TEXTS[0], "if x:\n        return “ünknown”\t!"):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert len(tokenizer.encode(" " * 24)) == 1
    assert len(tokenizer.encode("the earth")) <= 4
    assert f"320 tokens; separator_token_ids: {find_separator_ids(tokenizer)}" in capsys.readouterr().out


def test_the_same_text_gives_the_same_tokenizer(text: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.json" for number in range(2)]
    for file in files:
        assert main(["--input", str(text), "--vocab-size", "300", "--output", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab-size", "200"], f"--vocab-size is 200: bytes, special tokens and runs of blanks alone are {SMALLEST}"),
        (["--jsonl-keys", "no"], "'no'"),
    ],
)
def test_a_mistake_is_a_sentence_and_leaves_no_file(
    flags: list[str], message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--input", str(text), "--output", str(tmp_path / "x.json"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()

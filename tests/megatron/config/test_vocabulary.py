"""Counting tokens in tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.config.schema import TokenizerConfig
from megatron.config.vocabulary import padded_vocab_size, vocabulary_size

Mistakes = Callable[..., tuple[str, ...]]


def test_added_tokens_count_once(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    added = [{"id": 0, "content": "<|endoftext|>"}, {"id": 3, "content": "  "}]
    path.write_text(json.dumps({"model": {"type": "BPE", "vocab": {"<|endoftext|>": 0, "a": 1, "b": 2}}, "added_tokens": added}))
    assert vocabulary_size(TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(path))) == 4


def test_a_unigram_vocabulary_is_a_list(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.0]]}, "added_tokens": []}))
    assert vocabulary_size(TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(path))) == 2


def test_the_count_is_that_of_the_tokenizers_library(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    tokenizer.add_special_tokens(["<eod>", "a"])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    assert vocabulary_size(TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(path))) == tokenizer.get_vocab_size(with_added_tokens=True)


@pytest.mark.parametrize("tokens", [("a", "b"), ("a", "model"), ("model", "added_tokens")])
def test_a_gpt2_vocabulary_is_counted_whatever_its_tokens(tmp_path: Path, tokens: tuple[str, ...]) -> None:
    """GPT-2's own has a token `model`."""
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    assert vocabulary_size(TokenizerConfig(vocab_file=str(path))) == 2


def test_json_of_another_kind_is_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "vocab_size": 50257}))
    with pytest.raises(ValueError, match="is not a tokenizer file"):
        vocabulary_size(TokenizerConfig(vocab_file=str(path)))


def test_an_absent_file_has_no_known_size() -> None:
    assert vocabulary_size(TokenizerConfig(vocab_file="absent.json")) is None
    assert vocabulary_size(TokenizerConfig()) is None


def test_a_file_that_is_no_tokenizer_is_a_mistake(tmp_path: Path, mistakes: Mistakes) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a tokenizer file"):
        vocabulary_size(TokenizerConfig(vocab_file=str(path)))
    (mistake,) = mistakes({"vocab-file": str(path), "tokenizer-type": "HFTokenizer"})
    assert "is not a tokenizer file" in mistake


@pytest.mark.parametrize(("vocab_size", "model_parallel_size", "rows"), [(50277, 1, 50304), (50277, 2, 50432), (50304, 1, 50304), (1, 1, 128)])
def test_the_embedding_is_padded_for_every_rank(vocab_size: int, model_parallel_size: int, rows: int) -> None:
    assert padded_vocab_size(vocab_size, 128, model_parallel_size) == rows

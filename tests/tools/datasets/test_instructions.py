"""Prompts and answers become tokens and the labels that count, and a run learns the answers alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import IndexedDataset
from megatron.data.tokenizer import CharLevelTokenizer
from megatron.training.trainer import train
from tests.megatron.training.running import figures, tiny_config, without_launcher
from tools.datasets.instructions import main, write_examples


def test_prompts_are_masked_and_answers_keep_their_tokens(tmp_path: Path) -> None:
    written = write_examples([("ask", "yes"), ("a", "no")], CharLevelTokenizer(), str(tmp_path / "x"))
    text, label = IndexedDataset(tmp_path / "x_text_document"), IndexedDataset(tmp_path / "x_label_document")
    assert [text[i].tolist() for i in range(2)] == [[*b"askyes", 0], [*b"ano", 0]]
    assert [label[i].tolist() for i in range(2)] == [[-100] * 3 + [*b"yes", 0], [-100, *b"no", 0]]
    assert (written.examples, written.tokens, written.learned) == (2, 11, 7)


def test_the_command_reads_fields_and_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"q": "why", "a": "so"}) for _ in range(3)))
    words = ["--input", str(tmp_path / "x.jsonl"), "--tokenizer-type", "CharLevelTokenizer", "--output-prefix", str(tmp_path / "x")]
    assert main([*words, "--prompt-key", "q", "--answer-key", "a"]) == 0
    assert "3 examples, 18 tokens, 9 of them to be learned" in capsys.readouterr().out
    assert main(words) == 2
    assert "has no text under 'prompt'" in capsys.readouterr().err


@pytest.mark.parametrize("pack_impl", ["packed", "pack_until_overflow", "unpacked"])
def test_a_run_with_label_files_learns_the_answers_and_not_the_prompts(tmp_path: Path, pack_impl: str) -> None:
    """Prompts are random and cannot be predicted; the answer to every one is the same."""
    random = np.random.default_rng(0)
    pairs = [("".join(map(chr, random.integers(33, 127, 12))), " is well.") for _ in range(400)]
    write_examples(pairs, CharLevelTokenizer(), str(tmp_path / "x"))
    files = {f"{split}_data_paths": (str(tmp_path / "x_text_document"),) for split in ("train", "valid", "test")}
    labels = {f"{split}_label_data_paths": (str(tmp_path / "x_label_document"),) for split in ("train", "valid", "test")}
    with without_launcher():
        for name, data in {"answers": files | labels, "everything": files}.items():
            config = tiny_config(
                "",
                tmp_path / name,
                data={"data_path": None, "pack_impl": pack_impl} | data,
                model={"hidden_dropout": 0.0},
                training={"train_iters": 40, "eval_interval": 40, "eval_iters": 1},
                schedule={"lr_decay_iters": 40, "warmup": 0.1},
            )
            train(config)
    answers, everything = (figures(tiny_config("", tmp_path / name), "test/lm_loss")[-1] for name in ("answers", "everything"))
    assert answers < 0.3
    assert everything > 1.5

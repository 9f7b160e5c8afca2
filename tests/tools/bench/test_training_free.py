from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.sepllm.byte_tokenizer import byte_tokenizer
from tools.bench import training_free
from tools.bench.training_free import Task, main

SHAPE = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
TASKS = ["--tasks", "local_wikitext:1:0", "local_lambada:2:1", "--windows", "4", "8", "--cache", "1", "4", "6", "16", "--max-length", "32"]


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line for a tiny model."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=128, eos_token_id=0)).save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "wikitext2_raw.test.jsonl").write_text(json.dumps({"page": "It rained, and it rained. Then it stopped."}) + "\n")
    texts = ["The sea, the wind and the rain", "A house. A hill, a road and a gate", "Nobody knew"]
    (tmp_path / "lambada_openai.test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setenv("SEPLLM_EVAL_DATA", "")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return [
        "--model",
        str(tmp_path / "tiny"),
        "--data",
        str(tmp_path),
        "--scores",
        str(tmp_path / "scores"),
        "--json",
        str(tmp_path / "out.json"),
        *TASKS,
    ]


def test_every_method_is_scored_once_and_kept(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    of = {(row["method"], row["task"]["name"]): row for row in rows}
    methods = ["vanilla", "StreamingLLM n=8", "SepLLM n=4", "SepLLM n=8", "FixLLM n=8"]
    assert list(of) == [(name, "local_wikitext") for name in [*methods, "SepCache 1 4 6 16"]] + [(name, "local_lambada") for name in methods]
    assert of["vanilla", "local_wikitext"]["kv_ratio"] == 1
    assert of["StreamingLLM n=8", "local_wikitext"]["kv_ratio"] < of["SepLLM n=8", "local_wikitext"]["kv_ratio"] < 1
    assert 0 < of["SepCache 1 4 6 16", "local_wikitext"]["kv_ratio"] < 1
    assert of["vanilla", "local_lambada"]["task"] == {"name": "local_lambada", "documents": 2, "shots": 1}
    perplexity = of["SepLLM n=4", "local_wikitext"]["metrics"]["word_perplexity"]
    assert f"SepLLM n=4 on wikitext, 1 documents, 0 shots: {perplexity:.1f}" in shown

    monkeypatch.setattr(training_free, "scored", lambda *_: pytest.fail("scored again"))
    assert main(words) == 0
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == rows
    assert main([*words, "--methods", "vanilla", "fixllm"]) == 0
    assert {row["method"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]} == {"vanilla", "FixLLM n=8"}
    assert main([*words, "--max-length", "16"]) == 2
    assert "was made with another model, method or number of documents" in capsys.readouterr().err


def test_a_task_is_a_name_and_two_numbers() -> None:
    assert Task.read("local_piqa:40:5") == Task(name="local_piqa", documents=40, shots=5)
    for wrong in ("local_piqa", "local_piqa:0:5", "local_piqa:x:5"):
        with pytest.raises(Exception, match="give name:documents:shots"):
            Task.read(wrong)

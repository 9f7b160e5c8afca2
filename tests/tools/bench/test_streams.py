from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sepllm.streaming.__main__ as streaming
from tests.sepllm.byte_tokenizer import byte_tokenizer
from tools.bench.streams import main

SHAPE = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def test_a_finished_run_becomes_a_result_with_its_course(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=0)).save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "book.txt").write_text("It rained, and it rained. " * 20)
    sizes = ["--init_cache_size", "2", "--sep_cache_size", "4", "--local_size", "8", "--cache_size", "24"]
    words = ["--model", str(tmp_path / "tiny"), "--text", str(tmp_path / "book.txt"), "--methods", "sepllm", "vanilla", "--num_eval_tokens", "150"]
    assert streaming.main([*words, *sizes, "--save_every", "25", "--output_dir", str(tmp_path / "run")]) == 0
    capsys.readouterr()

    assert main([str(tmp_path / "run"), "--name", "tiny", "--json", str(tmp_path / "out.json"), "--png", str(tmp_path / "out.png")]) == 0
    rows = {row["method"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert rows["sepllm"]["stored_largest"] == 24
    shown = capsys.readouterr().out
    assert f"{rows['sepllm']['perplexity']:.2f}" in shown
    assert "tiny, sepllm: stretches of 25 tokens." in shown
    assert [line.split()[0] for line in shown.split("tiny, sepllm: stretches")[1].splitlines()[2:7]] == ["25", "50", "75", "125", "150"]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--name", "x"]) == 2
    assert "has no results.json" in capsys.readouterr().err

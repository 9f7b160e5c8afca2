"""What is counted follows from the plan and the formulas; the whole tool runs on two processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern
from tools.bench.context_parallel import Counted, Times, main

KEY_BYTES = 4


def counted(pattern: AttentionPattern, *, length: int, pieces: int) -> Counted:
    return Counted.of(TokenLayout.from_ids(torch.full((1, length), 9), pattern).ranges(0), pieces, KEY_BYTES)


def test_without_far_keys_only_windows_are_sent() -> None:
    """Two pieces of two chunks: each sends the end of that chunk of its own which one of the other follows."""
    assert counted(AttentionPattern(windows=(5,)), length=32, pieces=2).sent_bytes["exchange"] == 2 * 4 * KEY_BYTES


def test_full_attention_sends_what_its_queries_read() -> None:
    """Of two pieces the second reads the first chunk, and the first both chunks of the second."""
    found = counted(AttentionPattern.full(1), length=32, pieces=2)
    assert found.sent_bytes == {"exchange": 2 * 16 * KEY_BYTES, "all-gather": 2 * 16 * KEY_BYTES, "ring": 4 * 16 * KEY_BYTES}
    assert found.work_ratio == 1
    assert found.plain_work_ratio > 1.4


def test_a_round_lasts_as_long_as_its_slowest_process() -> None:
    ranks = [{"communication ring": [1.0, 4.0], "layer alone": [3.0, 3.0], "attention": [1.0, 1.0]}]
    ranks.append({"communication ring": [2.0, 3.0], "layer alone": [0.0, 0.0], "attention": [2.0, 2.0]})
    times = Times.of(64, ranks)
    assert times.communication_s == {"ring": [2.0, 4.0]}
    assert times.layer_s == {"alone": [3.0, 3.0]}
    assert times.attention_s == [1.0, 2.0]


def test_the_tool_measures_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 30, 4096))
    words = "--count-lengths 128 --seq-lengths 128 --rounds 1 --heads 2 --head-size 8 --window 8 --separator-ids 1 2 3"
    assert main([*words.split(), "--tokens", str(tmp_path / "tokens.npy"), "--json", str(tmp_path / "out.json")]) == 0
    (measured,) = json.loads((tmp_path / "out.json").read_text())["measured"]
    assert measured["communication_s"].keys() == {"exchange", "all-gather", "ring"}
    assert measured["layer_s"].keys() == {"exchange", "all-gather", "alone"}
    assert len(measured["attention_s"]) == 2
    assert "work max/mean" in capsys.readouterr().out

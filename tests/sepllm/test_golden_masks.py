"""Every case of the golden masks: which key each query reads, in every mode, prefill and decode, and the counters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern

CASES = json.loads((Path(__file__).parents[1] / "golden" / "masks.json").read_text())
PREFILL = [case for case in CASES if case["phase"] == "prefill"]
DECODE = [case for case in CASES if case["phase"] == "generate"]
PLAIN_TOKEN = 1  # no separator in any case
PADDING_ID = 0


def pattern_of(case: dict[str, Any]) -> AttentionPattern:
    """The case's parameters as a pattern. Cases that record the reference's reading of padding ask for it by name."""
    params = case["params"]
    windows = params.get("windows_per_layer") or [params["n"]]
    if params["mode"] == "full":
        return AttentionPattern.full(len(windows))
    has_separators = params["mode"] == "sepllm" and params["seps"] != [-1]
    pattern = AttentionPattern(
        initial_tokens=params["a"],
        separator_ids=params["seps"] if has_separators else (),
        windows=windows,
        intervals=[params["fix_interval"]] * len(windows) if "fix_interval" in params else None,
        padding_id=PADDING_ID if params.get("adaptive") else None,
        reference_padding=case["status"] == "reference_reading",
    )
    return pattern if params.get("exclude_diagonal", True) else pattern.widened(1)


def rows_of(mask: Tensor) -> list[str]:
    return ["".join("1" if read else "." for read in row) for row in mask.tolist()]


@pytest.mark.parametrize("case", PREFILL, ids=lambda case: case["name"])
def test_prefill_reads_the_golden_keys(case: dict[str, Any]) -> None:
    ids = torch.tensor(case["ids"])
    extra = case["params"].get("key_len", ids.shape[1]) - ids.shape[1]
    ids = torch.cat([ids, torch.full((ids.shape[0], extra), PLAIN_TOKEN)], 1)
    hidden = case["params"].get("hidden")
    mask = None
    if hidden:
        mask = torch.ones_like(ids)
        for row, columns in enumerate(hidden):
            mask[row, columns] = 0
    pattern = pattern_of(case)
    layout = TokenLayout.from_ids(ids, pattern, attention_mask=mask)
    kv_kept = map_kept = 0
    for layer, rows in enumerate(case["allowed"]):
        reads = layout.ranges(layer).dense()
        assert [rows_of(mask) for mask in reads] == rows
        kv_kept += int(reads[:, -1].sum())
        map_kept += int(layout.ranges(layer).kept_pairs().sum())
    counters = case["counters"]
    assert (kv_kept, map_kept) == (counters["kv"][0], counters["attmap"][0])
    assert layout.kv_ratio() == counters["kv"][0] / counters["kv"][1]
    assert layout.attention_map_ratio() == counters["attmap"][0] / counters["attmap"][1]


@pytest.mark.parametrize("case", DECODE, ids=lambda case: case["name"])
def test_decoding_reads_the_golden_keys(case: dict[str, Any]) -> None:
    layout = TokenLayout.from_ids(torch.tensor(case["prompt_ids"]), pattern_of(case))
    for step in case["steps"]:
        layout = layout.extend(torch.tensor(step["new"])[:, None])
        assert [rows_of(mask)[0] for mask in layout.ranges(0).dense()] == step["allowed"]
        assert layout.kv_ratio() == step["counters"]["kv"][0] / step["counters"]["kv"][1]


def test_left_padding_stays_hidden_while_decoding() -> None:
    case = next(case for case in DECODE if case["name"] == "generate_leftpad_window_reaches_padding")
    pattern = AttentionPattern(initial_tokens=1, separator_ids=case["params"]["seps"], windows=(4,))
    ids = torch.tensor(case["prompt_ids"])
    layout = TokenLayout.from_ids(ids, pattern, attention_mask=ids != PADDING_ID).extend(torch.tensor([[20], [21]]))
    assert [rows_of(mask)[0] for mask in layout.ranges(0).dense()] == ["...11", "11111"]

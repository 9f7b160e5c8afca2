"""Attention outputs of the golden file: scalar loops over one text, with and without ALiBi, and with the self-adjust softmax."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sepllm.attention import PositionBias, attend, choose_core, core_names
from sepllm.attention.registry import spec_of
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern, SelfAdjust
from sepllm.positions import alibi_slopes

GOLDEN = Path(__file__).parents[2] / "golden"
INDEXES = json.loads((GOLDEN / "tensors_index.json").read_text())
INDEX = INDEXES["attn"]
SELF_ADJUST = INDEXES["sa"]
CASES = [("n4", "none"), ("n4", "alibi"), ("n4", "alibi_bipe"), ("n16", "none"), ("full", "none")]


def golden(name: str) -> Tensor:
    """``[1, S, heads, H]`` float64"""
    stored = torch.from_numpy(np.load(GOLDEN / "tensors.npz")[name]).double()
    return stored.reshape(-1, *stored.shape[-2:]).transpose(0, 1)[None]


def segment_numbers(ids: Tensor) -> Tensor:
    """BiPE's inter positions: separators strictly before each token."""
    is_separator = torch.isin(ids, torch.tensor(INDEX["seps"])).int()
    return is_separator.cumsum(1) - is_separator


@pytest.mark.parametrize("core", core_names())
@pytest.mark.parametrize(("window", "position"), CASES)
def test_core_gives_the_golden_output(core: str, window: str, position: str) -> None:
    ids = torch.tensor([INDEX["ids"]])
    pattern = AttentionPattern(initial_tokens=INDEX["a"], separator_ids=INDEX["seps"], windows=(INDEX["windows"][window],))
    layout = TokenLayout.from_ids(ids, pattern)
    q, k, v = golden("attn_q"), golden("attn_k"), golden("attn_v")
    bias = None
    if position != "none":
        places = layout.positions if position == "alibi" else segment_numbers(ids)
        bias = PositionBias(slopes=alibi_slopes(q.shape[2]).double(), query_positions=places, key_positions=places)
    out = answer_or_refusal(core, q, k, v, layout, bias=bias)
    if out is not None:
        torch.testing.assert_close(out, golden(f"attn_{window}_{position}"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("core", core_names())
@pytest.mark.parametrize("reads", ["causal", "sepllm"])
@pytest.mark.parametrize("biases", [*SELF_ADJUST["biases"], "raw"])
def test_core_gives_the_golden_output_of_the_self_adjust_softmax(core: str, reads: str, biases: str) -> None:
    """The reference takes its extremes over all causal keys, whatever the mask hides."""
    softmax = SelfAdjust(kind="raw")
    if biases != "raw":
        numerator, denominator = SELF_ADJUST["biases"][biases]
        softmax = SelfAdjust(kind="normalised", numerator_bias=numerator, denominator_bias=denominator, extremes="causal")
    pattern = AttentionPattern(windows=(8,), softmax=softmax)
    if reads == "sepllm":
        pattern = replace(pattern, initial_tokens=SELF_ADJUST["a"], separator_ids=SELF_ADJUST["seps"], windows=(SELF_ADJUST["n"],))
    layout = TokenLayout.from_ids(torch.tensor([SELF_ADJUST["ids"]]), pattern)
    out = answer_or_refusal(core, golden("sa_q"), golden("sa_k"), golden("sa_v"), layout)
    if out is not None:
        expected = golden(f"sa_nodeno_out_{reads}" if biases == "raw" else f"sa_out_{reads}_{biases}")
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def answer_or_refusal(core: str, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, *, bias: PositionBias | None = None) -> Tensor | None:
    """The core's output, or None where it refuses such a call, in the words that it declares."""
    ranges, softmax, scale = layout.ranges(0), layout.pattern.softmax, q.shape[3] ** -0.5
    try:
        choose_core(spec_of(q, ranges, softmax=softmax, bias=bias), core)
    except ValueError as refusal:
        with pytest.raises(ValueError, match=re.escape(str(refusal))):
            attend(q, k, v, ranges, scale=scale, core=core, softmax=softmax, bias=bias)
        return None
    return attend(q, k, v, ranges, scale=scale, core=core, softmax=softmax, bias=bias)

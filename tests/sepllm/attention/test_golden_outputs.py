"""Attention outputs of the golden file: scalar loops over one text, with and without ALiBi."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sepllm.attention import PositionBias, attend, choose_core, core_names
from sepllm.attention.registry import spec_of
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern, Standard
from sepllm.positions import alibi_slopes

GOLDEN = Path(__file__).parents[2] / "golden"
INDEX = json.loads((GOLDEN / "tensors_index.json").read_text())["attn"]
CASES = [("n4", "none"), ("n4", "alibi"), ("n4", "alibi_bipe"), ("n16", "none"), ("full", "none")]


def golden(name: str) -> Tensor:
    """``[1, S, heads, H]`` float64"""
    return torch.from_numpy(np.load(GOLDEN / "tensors.npz")[f"attn_{name}"]).transpose(0, 1)[None].double()


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
    q, k, v = golden("q"), golden("k"), golden("v")
    bias = None
    if position != "none":
        places = layout.positions if position == "alibi" else segment_numbers(ids)
        bias = PositionBias(slopes=alibi_slopes(q.shape[2]).double(), query_positions=places, key_positions=places)
    ranges = layout.ranges(0)
    try:
        choose_core(spec_of(q, ranges, softmax=Standard(), bias=bias, dropout=0.0), core)
    except ValueError as refusal:
        with pytest.raises(ValueError, match=re.escape(str(refusal))):
            attend(q, k, v, ranges, scale=q.shape[3] ** -0.5, core=core, bias=bias)
        return
    out = attend(q, k, v, ranges, scale=q.shape[3] ** -0.5, core=core, bias=bias)
    torch.testing.assert_close(out, golden(f"{window}_{position}"), rtol=1e-5, atol=1e-6)

"""Which core is chosen, and what is refused at the door."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sepllm.attention import AttentionSpec, attend, choose_core, core_names
from sepllm.attention.registry import spec_of
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern, Standard

IDS = torch.zeros(2, 6, dtype=torch.int64)
FULL = TokenLayout.from_ids(IDS, AttentionPattern.full(1)).ranges(0)
SPARSE = TokenLayout.from_ids(IDS, AttentionPattern(windows=(2,))).ranges(0)
Q = torch.randn(2, 6, 4, 8)


def spec(ranges: object = FULL, **changes: object) -> AttentionSpec:
    return spec_of(Q, ranges, **{"softmax": Standard(), "bias": None, "dropout": 0.0} | changes)


def test_full_layers_take_torchs_own_kernel_and_sparse_ones_do_not() -> None:
    assert choose_core(spec(FULL)) == "sdpa"
    assert choose_core(spec(SPARSE)) != "sdpa"


def test_dropout_is_computed_by_the_definition() -> None:
    assert choose_core(spec(FULL, dropout=0.1)) == "dense"


def test_unknown_core_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="core 'flash' is not known: use auto or one of"):
        choose_core(spec(), "flash")


def test_core_that_cannot_is_refused_with_its_reason() -> None:
    with pytest.raises(ValueError, match="sdpa: only for layers that read every earlier key"):
        choose_core(spec(SPARSE), "sdpa")


def test_a_call_that_no_core_supports_names_every_core() -> None:
    with pytest.raises(ValueError, match="No attention core can compute this") as caught:
        choose_core(replace(spec(FULL, softmax=object()), num_queries=1000))
    assert all(f"{name}: " in str(caught.value) for name in core_names())


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        ((2, 6, 4, 8), (2, 6, 3, 8), "q has 4 heads and k 3"),
        ((2, 6, 4, 8), (2, 6, 4, 4), r"must be \[B, T, N, H\]"),
        ((2, 6, 32), (2, 6, 32), r"must be \[B, T, N, H\]"),
        ((2, 5, 4, 8), (2, 6, 4, 8), r"ranges are of \(2, 6\) queries over 6 keys"),
        ((2, 6, 4, 8), (2, 7, 4, 8), r"ranges are of \(2, 6\) queries over 6 keys"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(q: tuple[int, ...], k: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(torch.zeros(q), torch.zeros(k), torch.zeros(k), FULL, scale=1.0)

"""Which core is chosen, and what is refused at the door."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sepllm.attention import AttentionSpec, attend, choose_core, core_names, prepare, spec_of
from sepllm.attention.measured import MEASURED, UNMEASURED, is_measured
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern, Standard

IDS = torch.zeros(2, 6, dtype=torch.int64)
FULL = TokenLayout.from_ids(IDS, AttentionPattern.full(1)).ranges(0)
SPARSE = TokenLayout.from_ids(IDS, AttentionPattern(windows=(2,))).ranges(0)
Q = torch.randn(2, 6, 4, 8)


def spec(ranges: object = FULL, **changes: object) -> AttentionSpec:
    return spec_of(Q, ranges, **{"softmax": Standard(), "bias": None, "dropout": 0.0} | changes)


def test_cpu_takes_the_native_core_and_its_own_attention_for_one_token_over_everything() -> None:
    assert choose_core(spec(FULL)) == "native"
    assert choose_core(spec(SPARSE)) == "native"
    assert choose_core(replace(spec(FULL), num_queries=1)) == "sdpa"
    assert choose_core(replace(spec(FULL), num_queries=1, dtype=torch.bfloat16)) == "native"
    assert choose_core(replace(spec(SPARSE), num_queries=1)) == "native"


@pytest.mark.parametrize(("num_queries", "sparse"), [(1, "dense"), (32, "dense"), (33, "chunked")])
def test_device_that_nobody_measured_keeps_to_torchs_kernels(num_queries: int, sparse: str) -> None:
    assert not is_measured("cuda")
    assert choose_core(replace(spec(FULL), device_type="cuda", num_queries=num_queries)) == "sdpa"
    assert choose_core(replace(spec(SPARSE), device_type="cuda", num_queries=num_queries)) == sparse


def test_every_preferred_core_exists_and_the_last_is_the_definition() -> None:
    for row in (*UNMEASURED, *(row for rows in MEASURED.values() for row in rows)):
        assert set(row.cores) <= set(core_names())
        assert row.cores[-1] == "dense"


def test_preparing_ahead_names_the_core_and_fills_what_layers_share() -> None:
    ranges = TokenLayout.from_ids(IDS, AttentionPattern(windows=(2,))).ranges(0)
    assert prepare(ranges, spec(ranges), "chunked") == "chunked"
    shared = ranges.derived["chunked"]
    attend(Q, Q, Q, ranges, scale=1.0, core="chunked")
    assert ranges.derived["chunked"] is shared


def test_dropout_is_computed_by_the_definition() -> None:
    assert choose_core(spec(FULL, dropout=0.1)) == "dense"


def test_unknown_core_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="core 'flash' is not known: use auto or one of"):
        choose_core(spec(), "flash")


def test_core_that_cannot_is_refused_with_its_reason() -> None:
    with pytest.raises(ValueError, match="sdpa: only for layers that read every earlier key"):
        choose_core(spec(SPARSE), "sdpa")


def test_a_call_that_no_core_supports_names_every_core_that_was_asked() -> None:
    with pytest.raises(ValueError, match="No attention core can compute this") as caught:
        choose_core(replace(spec(FULL, softmax=object()), num_queries=1000))
    assert all(f"{name}: " in str(caught.value) for name in ("native", "sdpa", "chunked", "dense"))


@pytest.mark.parametrize("core", ["native", "chunked", "dense"])
def test_autocast_takes_rotated_keys_and_values_to_one_dtype(core: str) -> None:
    q, k, v = Q.clone().requires_grad_(), Q.flip(1).requires_grad_(), Q.sin().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(q, k, v.bfloat16(), SPARSE, scale=0.3, core=core)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attend(*(x.bfloat16() for x in (q, k, v)), SPARSE, scale=0.3, core=core))
    out.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in (q, k, v))


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

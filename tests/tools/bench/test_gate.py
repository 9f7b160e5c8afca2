"""The reference against plain autograd, and that the gate sees what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sepllm.attention import attend
from tools.bench.gate import Answers, Attention, answers, complaint, errors, reference
from tools.bench.lineup import line_up
from tools.bench.problem import Problem
from tools.bench.text import TokenStream
from tools.bench.variants import Variant, variants

CPU = torch.device("cpu")


@pytest.fixture
def problem() -> Problem:
    random = np.random.default_rng(0)
    text = TokenStream(name="text", ids=random.integers(0, 12, 4000), separator_ids=(1, 2))
    shape = {"batch": 2, "length": 320, "heads": 2, "head_size": 16}
    return Problem.of_text(text, **shape, target=None, window=32, device=CPU, layers=3)


def compute(problem: Problem, attention: Attention, dtype: torch.dtype, *, poisons: bool = True) -> Answers:
    return answers(problem, attention, problem.inputs(dtype), has_backward=True, heads_first=False, poisons=poisons)


def test_definition_and_layout_keep_the_same_pairs(problem: Problem) -> None:
    assert torch.equal(problem.dense_mask(), problem.ranges.dense())
    assert problem.kept_pairs == int(problem.dense_mask().sum())


@pytest.mark.parametrize("is_causal", [False, True])
def test_reference_is_autograd_of_masked_attention(problem: Problem, is_causal: bool) -> None:
    inputs = problem.inputs(torch.float64)
    mask = torch.ones(320, 320, dtype=torch.bool).tril() if is_causal else problem.dense_mask()[:, None]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, scale=problem.scale).transpose(1, 2)

    found = errors(compute(problem, attention, torch.float64), reference(problem, inputs, is_causal=is_causal))
    assert found.keys() == {"out", "dq", "dk", "dv"}
    assert max(found.values()) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_attention_passes(problem: Problem, dtype: torch.dtype) -> None:
    found = compute(problem, lambda q, k, v: attend(q, k, v, problem.ranges, scale=problem.scale, core="chunked"), dtype)
    assert complaint(errors(found, reference(problem, problem.inputs(dtype), is_causal=False)), dtype, length=320) is None


def window_too_short(problem: Problem) -> Attention:
    shorter = replace(problem, pattern=replace(problem.pattern, windows=(problem.window - 1,)))
    return lambda q, k, v: attend(q, k, v, shorter.ranges, scale=problem.scale, core="chunked")


def one_query_unwritten(problem: Problem) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        right = attend(q, k, v, problem.ranges, scale=problem.scale, core="chunked")
        out = torch.empty_like(right)
        out[:, :-1] = right[:, :-1]
        return out

    return attention


def gradient_of_values_doubled(problem: Problem) -> Attention:
    return lambda q, k, v: attend(q, k, 2 * v - v.detach(), problem.ranges, scale=problem.scale, core="chunked")


@pytest.mark.parametrize("wrong", [window_too_short, one_query_unwritten, gradient_of_values_doubled])
def test_wrong_attention_is_caught(problem: Problem, wrong: Callable[[Problem], Attention]) -> None:
    found = errors(compute(problem, wrong(problem), torch.float32), reference(problem, problem.inputs(torch.float32), is_causal=False))
    assert complaint(found, torch.float32, length=320) is not None


def test_complaint_names_the_tensor_and_the_limit() -> None:
    assert complaint({"out": 1e-7, "dk": 0.5}, torch.float32, length=100) == "dk is off by 0.5, and float32 allows 3e-06"
    assert complaint({"dv": 3e-2}, torch.bfloat16, length=16384) is None
    assert "out is off by nan" in (complaint({"out": float("nan")}, torch.bfloat16, length=100) or "")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_contender_of_a_cpu_that_needs_no_compiler_is_right(problem: Problem, dtype: str) -> None:
    known = [variant for variant in variants(CPU) if variant.poisons]
    assert {variant.name for variant in known} >= {"causal", "dense_mask", "two_call", "chunked", "native"}
    lineup = line_up(problem, [(variant, dtype) for variant in known])
    assert not lineup.failures
    names = ("causal", "dense_mask", "two_call", "native_causal", "chunked", "native")
    assert [contender.name for contender in lineup.contenders][:6] == [f"{name} {dtype}" for name in names]
    assert all(contender.has_backward for contender in lineup.contenders)


def test_contender_that_cannot_run_or_is_wrong_gives_the_reason(problem: Problem) -> None:
    wrong = Variant(name="wrong", build=lambda problem, dtype: window_too_short(problem), heads_first=False)
    absent = Variant(name="absent", build=lambda problem, dtype: window_too_short(problem), refusal=lambda problem, dtype: "not here")
    lineup = line_up(problem, [(wrong, "fp32"), (absent, "fp32")])
    assert not lineup.contenders
    assert lineup.notes == ["absent fp32 does not run: not here"]
    assert lineup.failures[0].startswith("wrong fp32: out is off by")

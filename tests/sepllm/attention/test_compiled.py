"""Every core in a compiled graph, under activation checkpointing, and twice: one graph, one compilation, the same numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from sepllm.attention import PositionBias, attend, choose_core, core_names, prepare, spec_of
from sepllm.layout import KeyRanges, TokenLayout
from sepllm.pattern import UNBOUNDED, AttentionPattern

LENGTH = 70
SCALE = 0.3

pytestmark = pytest.mark.parametrize("core", core_names())


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    ranges: KeyRanges
    bias: PositionBias | None

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


def random_case(core: str, seed: int, *, has_bias: bool = False, needs_grad: bool = True) -> Case:
    """Another text and other numbers for every seed; two rows, of which one has twice the separators."""
    generator = torch.Generator().manual_seed(seed)
    is_separator = torch.rand(2, LENGTH, generator=generator) < torch.tensor([[0.15], [0.3]])
    pattern = AttentionPattern(initial_tokens=2, separator_ids=(1,), windows=(UNBOUNDED if core == "sdpa" else 9,))
    layout = TokenLayout.from_ids(is_separator.long(), pattern)
    q, k, v = (torch.randn(2, LENGTH, heads, 16, generator=generator).requires_grad_(needs_grad) for heads in (4, 2, 2))
    bias = PositionBias(slopes=torch.tensor([0.5, 0.25, 0.1, 0.0]), query_positions=layout.positions, key_positions=layout.key_positions)
    return Case(q, k, v, layout.ranges(0), bias if has_bias else None)


def call(case: Case, core: str) -> Tensor:
    return attend(*case.leaves, case.ranges, scale=SCALE, core=core, bias=case.bias)


def is_refused(case: Case, core: str) -> bool:
    """Whether the core declares that it cannot compute the call; `attend` then says the same."""
    spec = spec_of(case.q, case.ranges, bias=case.bias, needs_grad=case.q.requires_grad)
    try:
        choose_core(spec, core)
    except ValueError as refusal:
        with pytest.raises(ValueError, match=re.escape(str(refusal))):
            call(case, core)
        return True
    prepare(case.ranges, spec, core)
    return False


def gradients(out: Tensor, case: Case) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, case.leaves, torch.linspace(-1, 1, out.numel()).view_as(out))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("needs_grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "alibi"])
def test_compiled_call_is_one_graph_for_all_texts_and_gives_the_definition(core: str, has_bias: bool, needs_grad: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *leaves, ranges, bias: attend(*leaves, ranges, scale=SCALE, core=core, bias=bias), fullgraph=True, backend=counter
    )
    for seed in range(3):
        case = random_case(core, seed, has_bias=has_bias, needs_grad=needs_grad)
        if is_refused(case, core):
            return
        out, expected = compiled(*case.leaves, ranges=case.ranges, bias=case.bias), call(case, "dense")
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        if needs_grad:
            for name, ours, theirs in zip("qkv", gradients(out, case), gradients(expected, case), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"d{name}: {text}")
    assert counter.frame_count == 1


def test_activation_checkpointing_changes_no_bit_of_the_gradients(core: str) -> None:
    case = random_case(core, 0)
    if is_refused(case, core):
        return

    def layer(*leaves: Tensor) -> Tensor:
        return attend(*leaves, case.ranges, scale=SCALE, core=core).tanh()

    kept, again = layer(*case.leaves), checkpoint(layer, *case.leaves, use_reentrant=False)
    assert torch.equal(kept, again)
    for ours, theirs in zip(gradients(again, case), gradients(kept, case), strict=True):
        assert torch.equal(ours, theirs)


def test_two_runs_are_the_same_to_the_bit(core: str) -> None:
    results = []
    for _ in range(2):
        case = random_case(core, 0)
        if is_refused(case, core):
            return
        out = call(case, core)
        results.append((out, *gradients(out, case)))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)

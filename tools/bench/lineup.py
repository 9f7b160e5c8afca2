"""Who takes part in the attention benchmark at one length: those that can run, and were found right on the tensors that are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from tools.bench.gate import Answers, Attention, answers, complaint, errors, reference
from tools.bench.problem import Inputs, Problem
from tools.bench.variants import Variant

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A variant in one dtype."""

    variant: Variant
    dtype: str
    attention: Attention
    inputs: Inputs
    """Its own, so that none finds in the cache what the one before it read."""
    has_backward: bool
    error: float
    """The largest of those of the output and the gradients, against float64."""

    @property
    def name(self) -> str:
        return f"{self.variant.name} {self.dtype}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineup:
    contenders: list[Contender] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Who cannot run, or only forward, and why."""
    failures: list[str] = field(default_factory=list)
    """Who is wrong."""


def line_up(problem: Problem, entries: Sequence[tuple[Variant, str]]) -> Lineup:
    """The entries, variants with the names of their dtypes, that compute the problem rightly."""
    lineup = Lineup()

    @cache
    def inputs(dtype: str, heads_first: bool) -> Inputs:
        return inputs(dtype, False).heads_first() if heads_first else problem.inputs(DTYPES[dtype])

    @cache
    def wanted(dtype: str, is_causal: bool) -> Answers:
        return reference(problem, inputs(dtype, False), is_causal=is_causal)

    for variant, dtype in entries:
        name = f"{variant.name} {dtype}"
        refusal = variant.refusal(problem, DTYPES[dtype])
        if refusal is not None:
            lineup.notes.append(f"{name} does not run: {refusal}")
            continue
        no_backward = variant.backward_refusal(problem, DTYPES[dtype])
        if no_backward is not None:
            lineup.notes.append(f"{name} runs forward only: {no_backward}")
        try:
            contender = enter(problem, variant, dtype, inputs(dtype, variant.heads_first), wanted(dtype, variant.is_causal), no_backward is None)
        except Exception as error:  # whatever it raises is this contender's failure, and the others go on
            lineup.failures.append(f"{name}: {error}")
        else:
            lineup.contenders.append(contender)
    return lineup


def enter(problem: Problem, variant: Variant, dtype: str, inputs: Inputs, wanted: Answers, has_backward: bool) -> Contender:
    """The contender, once it has given the right answers. ValueError where they are wrong."""
    attention = variant.build(problem, DTYPES[dtype])
    computed = answers(problem, attention, inputs, has_backward=has_backward, heads_first=variant.heads_first, poisons=variant.poisons)
    found = errors(computed, wanted)
    wrong = complaint(found, DTYPES[dtype], length=problem.length)
    if wrong is not None:
        raise ValueError(wrong)
    return Contender(variant=variant, dtype=dtype, attention=attention, inputs=inputs.copy(), has_backward=has_backward, error=max(found.values()))

"""Right before fast: every contender's output and gradients on the timed inputs, against attention written out in float64.

The reference goes through the queries in blocks, so it needs no S x S memory, and takes its mask from the definition (`Problem.reads`) and
not from the layout. Long rows are compared on their first and last head only; every query and key of those is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.bench.problem import Inputs, Problem

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

BLOCK = 64
"""Rows of a tensor over which an error is taken, and queries that the reference computes at a time, times four."""
ALL_HEADS_UP_TO = 4096
"""Tokens."""
LIMITS = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Largest error of the worst block of rows. torch's own attention is at 5e-7 in float32 and 5e-3 in bfloat16, at 2048 tokens,
and at 1e-2 at 8192: beyond 4096 tokens the limits grow with the root of the length, as its sums of rounded numbers do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """``[pairs, S, H]`` each, of some pairs of row and head. Gradients are None where there is no backward."""

    out: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None

    def named(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("out", "dq", "dk", "dv"):
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor


def compared_heads(problem: Problem) -> list[tuple[int, int]]:
    """The pairs of row and head that are compared."""
    if problem.length <= ALL_HEADS_UP_TO:
        return [(row, head) for row in range(problem.batch) for head in range(problem.heads)]
    return sorted({(0, 0), (problem.batch - 1, problem.heads - 1)})


def reference(problem: Problem, inputs: Inputs, *, is_causal: bool) -> Answers:
    """The definition in float64. ``inputs`` are ``[B, S, N, H]``; ``is_causal``: of full causal attention instead of the pattern's."""
    pairs = [_one_head(problem, inputs, row, head, is_causal=is_causal) for row, head in compared_heads(problem)]
    out, dq, dk, dv = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
    return Answers(out=out, dq=dq, dk=dk, dv=dv)


def answers(problem: Problem, attention: Attention, inputs: Inputs, *, has_backward: bool, heads_first: bool, poisons: bool) -> Answers:
    """What a contender computes. ``poisons``: memory that it allocates and leaves unwritten holds NaN."""
    leaves = (inputs.q, inputs.k, inputs.v)

    def chosen(tensor: Tensor) -> Tensor:
        tensor = tensor.detach() if heads_first else tensor.detach().transpose(1, 2)
        return torch.stack([tensor[row, head] for row, head in compared_heads(problem)])

    with poisoned() if poisons else _as_it_is():
        if not has_backward:
            with torch.no_grad():
                return Answers(out=chosen(attention(*(leaf.detach() for leaf in leaves))), dq=None, dk=None, dv=None)
        out = attention(*leaves)
        dq, dk, dv = torch.autograd.grad(out, leaves, inputs.out_gradient)
    return Answers(out=chosen(out), dq=chosen(dq), dk=chosen(dk), dv=chosen(dv))


def errors(ours: Answers, wanted: Answers) -> dict[str, float]:
    """The error of the worst block of rows of each tensor: its norm over that of the block (or of the mean block, where that is larger)."""
    expected = dict(wanted.named())
    return {name: _worst_block(tensor, expected[name]) for name, tensor in ours.named()}


def complaint(found: dict[str, float], dtype: torch.dtype, *, length: int) -> str | None:
    """What is wrong with such errors; None where nothing is. NaN is wrong."""
    limit = LIMITS[dtype] * math.sqrt(max(1, length / 4096))
    wrong = [f"{name} is off by {error:.2g}" for name, error in found.items() if not error <= limit]
    return f"{', '.join(wrong)}, and {str(dtype).removeprefix('torch.')} allows {limit:.2g}" if wrong else None


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh tensors hold NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def _worst_block(ours: Tensor, wanted: Tensor) -> float:
    pad = -ours.shape[1] % BLOCK
    blocks = [torch.nn.functional.pad(tensor, (0, 0, 0, pad)).unflatten(1, (-1, BLOCK)) for tensor in (ours.double() - wanted, wanted)]
    error, norm = (block.norm(dim=(2, 3)) for block in blocks)
    return float((error / torch.maximum(norm, norm.mean())).max())


def _one_head(problem: Problem, inputs: Inputs, row: int, head: int, *, is_causal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients of one head of one row, ``[S, H]`` each."""
    q, k, v, out_gradient = (tensor[row, :, head].detach().double() for tensor in (inputs.q, inputs.k, inputs.v, inputs.out_gradient))
    out, dq, dk, dv = (torch.zeros_like(q) for _ in range(4))
    for start in range(0, problem.length, 4 * BLOCK):
        queries = slice(start, min(start + 4 * BLOCK, problem.length))
        keys = slice(0, queries.stop)
        reads = problem.causal(queries) if is_causal else problem.reads(queries, row)
        scores = (q[queries] @ k[keys].T * problem.scale).masked_fill_(~reads[:, keys], -torch.inf)
        weights = scores.softmax(-1)
        out[queries] = weights @ v[keys]
        weights_gradient = out_gradient[queries] @ v[keys].T
        scores_gradient = weights * (weights_gradient - (out_gradient[queries] * out[queries]).sum(-1, keepdim=True)) * problem.scale
        dq[queries] = scores_gradient @ k[keys]
        dk[keys] += scores_gradient.T @ q[queries]
        dv[keys] += weights.T @ out_gradient[queries]
    return out, dq, dk, dv

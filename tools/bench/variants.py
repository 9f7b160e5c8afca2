"""The contenders of the attention benchmark, each behind the same few questions.

torch's own calls get their tensors with the heads first, as they like them best; this project's cores get them as the model has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from sepllm.attention import AttentionSpec, attend, choose_core, core_names, prepare, spec_of
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern
from tools.bench.gate import Attention
from tools.bench.machine import memory_bytes
from tools.bench.problem import Problem
from tools.bench.two_call import TwoCalls, refuse_two_calls

Refusal = Callable[[Problem, torch.dtype], str | None]
CORES = ("flex", "chunked", "native", "fused_triton")
MEMORY_SHARE = 1 / 6
"""Largest part of the device's memory that one contender's masks may take."""


def _never(_problem: Problem, _dtype: torch.dtype) -> str | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    name: str
    build: Callable[[Problem, torch.dtype], Attention]
    """Attention on the problem's rows, with everything made that a new batch of tokens needs."""
    refusal: Refusal = _never
    """Why it cannot run; None where it can."""
    backward_refusal: Refusal = _never
    """Why only its forward runs."""
    renewal: Callable[[Problem, torch.dtype], Callable[[], object]] | None = None
    """Makes again what a new batch of tokens needs, once for all layers. None: it needs nothing."""
    is_causal: bool = False
    """Computes every causal pair, not the pattern's only."""
    is_ours: bool = False
    heads_first: bool = True
    poisons: bool = True
    """Compiled code allocates outputs in ways that cannot be filled with NaN first, and would be compiled anew to try."""

    @property
    def is_baseline(self) -> bool:
        """Somebody else's dense causal attention, which the others are measured against."""
        return self.is_causal and not self.is_ours


def variants(device: torch.device) -> tuple[Variant, ...]:
    """All contenders on such a device, dense causal ones first."""
    return (*_causal(device), DENSE_MASK, REFERENCE, FLEX_NAIVE, TWO_CALL, NATIVE_CAUSAL, *(_core(name) for name in CORES))


def _causal(device: torch.device) -> list[Variant]:
    if device.type != "cuda":
        return [Variant(name="causal", build=lambda problem, dtype: _sdpa(problem, None), is_causal=True)]
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    return [_causal_backend(f"causal_{name}", backend) for name, backend in backends.items()]


def _causal_backend(name: str, backend: SDPBackend) -> Variant:
    def build(problem: Problem, _dtype: torch.dtype) -> Attention:
        causal = _sdpa(problem, None)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return causal(q, k, v)

        return attention

    def refusal(problem: Problem, dtype: torch.dtype) -> str | None:
        few = torch.zeros(1, 1, 128, problem.head_size, dtype=dtype, device=problem.device)
        try:
            build(problem, dtype)(few, few, few)
        except RuntimeError as error:
            return f"torch has no such kernel here ({str(error).splitlines()[0]})"
        return None

    return Variant(name=name, build=build, refusal=refusal, is_causal=True)


def _sdpa(problem: Problem, mask: Tensor | None) -> Attention:
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=problem.scale)


def _additive_mask(problem: Problem, dtype: torch.dtype) -> Tensor:
    """``[B, 1, S, S]``, minus infinity where a query does not read."""
    hidden = ~problem.dense_mask()[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=problem.device).masked_fill_(hidden, -torch.inf)


def _square_refusal(bytes_per_pair: Callable[[torch.dtype], int]) -> Refusal:
    """Of contenders that hold S x S objects."""

    def refusal(problem: Problem, dtype: torch.dtype) -> str | None:
        wanted = problem.batch * problem.length**2 * bytes_per_pair(dtype)
        limit = MEMORY_SHARE * memory_bytes(problem.device)
        return f"its masks take {wanted / 2**30:.1f} GiB, more than {limit / 2**30:.1f}, a sixth of the memory" if wanted > limit else None

    return refusal


def _no_backward_on_cpu(problem: Problem, _dtype: torch.dtype) -> str | None:
    return "flex_attention has no backward on a CPU" if problem.device.type == "cpu" else None


def _captured_mask(problem: Problem) -> BlockMask:
    """The reference's way: a dense mask of the batch, and a block mask made by reading all of it, uncompiled."""
    dense = problem.dense_mask()
    shape = (problem.batch, None, problem.length, problem.length)
    return create_block_mask(lambda b, h, q, k: dense[b, q, k], *shape, device=problem.device.type)


def _predicate_mask(problem: Problem) -> Callable[[], BlockMask]:
    """Makes the block mask of the rule itself, compiled: the best case of a block mask over the original order of keys."""
    is_far, window = problem.is_far, problem.window
    create = torch.compile(create_block_mask)
    shape = (problem.batch, None, problem.length, problem.length)

    def reads(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (is_far[b, k] | (q - k < window))

    return lambda: create(reads, *shape, device=problem.device.type)


def _flex(problem: Problem, block_mask: BlockMask) -> Attention:
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, scale=problem.scale)


def _core(name: str) -> Variant:
    """One of this project's cores, through its door."""

    def refusal(problem: Problem, dtype: torch.dtype, *, needs_grad: bool = False) -> str | None:
        if name not in core_names():
            return f"this version has no core {name!r} (it has {', '.join(core_names())})"
        try:
            choose_core(_spec(problem, dtype, needs_grad=needs_grad), name)
        except ValueError as error:
            return str(error).removeprefix(f"No attention core can compute this: {name}: ").rstrip(".")
        return None

    def renewal(problem: Problem, dtype: torch.dtype) -> Callable[[], object]:
        spec = _spec(problem, dtype, needs_grad=backward_refusal(problem, dtype) is None)
        return lambda: prepare(problem.new_ranges(), spec, name)

    def backward_refusal(problem: Problem, dtype: torch.dtype) -> str | None:
        return refusal(problem, dtype, needs_grad=True)

    return Variant(
        name=name,
        build=lambda problem, dtype: lambda q, k, v: attend(q, k, v, problem.ranges, scale=problem.scale, core=name),
        refusal=refusal,
        backward_refusal=backward_refusal,
        renewal=renewal,
        heads_first=False,
        poisons=name != "flex",
    )


def _spec(problem: Problem, dtype: torch.dtype, *, needs_grad: bool) -> AttentionSpec:
    q = torch.empty(problem.batch, problem.length, problem.heads, problem.head_size, dtype=dtype, device=problem.device)
    return spec_of(q, problem.ranges, needs_grad=needs_grad)


def _native_causal(problem: Problem, _dtype: torch.dtype) -> Attention:
    """Our kernel over every earlier key: what is left of its lead where nothing is skipped."""
    ranges = TokenLayout.from_ids(problem.ids, AttentionPattern.full(1)).ranges(0)
    return lambda q, k, v: attend(q, k, v, ranges, scale=problem.scale, core="native")


NATIVE_CAUSAL = Variant(
    name="native_causal",
    build=_native_causal,
    refusal=lambda problem, dtype: _core("native").refusal(problem, dtype),
    is_causal=True,
    is_ours=True,
    heads_first=False,
)
DENSE_MASK = Variant(
    name="dense_mask",
    build=lambda problem, dtype: _sdpa(problem, _additive_mask(problem, dtype)),
    refusal=_square_refusal(lambda dtype: dtype.itemsize + 1),
    renewal=lambda problem, dtype: lambda: _additive_mask(problem, dtype),
)
REFERENCE = Variant(
    name="reference",
    build=lambda problem, dtype: _flex(problem, _captured_mask(problem)),
    refusal=_square_refusal(lambda dtype: 10),  # create_block_mask holds the mask and int64 numbers of its pairs
    backward_refusal=_no_backward_on_cpu,
    renewal=lambda problem, dtype: lambda: _captured_mask(problem),
    poisons=False,
)
FLEX_NAIVE = Variant(
    name="flex_naive",
    build=lambda problem, dtype: _flex(problem, _predicate_mask(problem)()),
    backward_refusal=_no_backward_on_cpu,
    renewal=lambda problem, dtype: _predicate_mask(problem),
    poisons=False,
)
TWO_CALL = Variant(
    name="two_call",
    build=lambda problem, dtype: TwoCalls(problem, dtype),
    refusal=refuse_two_calls,
    renewal=lambda problem, dtype: lambda: TwoCalls(problem, dtype, ranges=problem.new_ranges()),
)

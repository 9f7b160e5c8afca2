"""Every core against the definition: masks from loops over integers, softmax written out, float64, outputs and all gradients.

A core either computes a call rightly or refuses it with the reason that it declares. What keys and values hold that no query of
their row reads is nobody's business: it may be NaN. Those that some query reads must be finite.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sepllm.attention import AttentionSpec, PositionBias, attend, choose_core, core_names
from sepllm.attention.registry import spec_of
from sepllm.layout import KeyRanges, TokenLayout, key_ranges
from sepllm.pattern import AttentionPattern, SelfAdjust, Softmax, Standard

Definition = Callable[..., Tensor]

SEPARATORS = (1, 2)
DOCUMENT_END = 3
HEAD_SIZE = 8

pytestmark = pytest.mark.parametrize("core", core_names())


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor

    def leaves(self) -> Inputs:
        return Inputs(*(tensor.detach().clone().requires_grad_() for tensor in (self.q, self.k, self.v)))


def random_inputs(batch: int, queries: int, keys: int, *, heads: tuple[int, int] = (4, 2), dtype: torch.dtype = torch.float64) -> Inputs:
    torch.manual_seed(keys)
    shapes = ((batch, queries, heads[0], HEAD_SIZE), (batch, keys, heads[1], HEAD_SIZE), (batch, keys, heads[1], HEAD_SIZE))
    return Inputs(*(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes))


def ragged_ids(length: int) -> Tensor:
    """Rows with some separators, none, only separators, many."""
    torch.manual_seed(length)
    is_separator = torch.rand(4, length) < torch.tensor([[0.15], [-1.0], [2.0], [0.5]])
    return torch.where(is_separator, torch.randint(1, 3, (4, length)), torch.randint(4, 50, (4, length)))


def by_definition(inputs: Inputs, reads: Tensor, *, scale: float, bias: Tensor | None = None, softmax: Softmax = Standard()) -> Tensor:
    """Softmax over exactly the keys read; zero for a query that reads none. ``reads [B, T, S]``."""
    group = inputs.q.shape[2] // inputs.k.shape[2]
    heads = []
    for head in range(inputs.q.shape[2]):
        q, k, v = inputs.q[:, :, head], inputs.k[:, :, head // group], inputs.v[:, :, head // group]
        used = reads.any(1)[..., None]
        k, v = torch.where(used, k, 0), torch.where(used, v, 0)
        scores = q @ k.transpose(1, 2) * scale
        if bias is not None:
            scores = scores + bias[:, head]
        weights = torch.where(reads, (scores - scores.detach().amax(2, keepdim=True)).exp(), 0)
        weights = weights / weights.sum(2, keepdim=True).clamp(min=1e-300)
        if isinstance(softmax, SelfAdjust):
            weights = weights * self_adjusted(scores, reads, softmax)
        heads.append(weights @ v)
    return torch.stack(heads, 2)


def self_adjusted(scores: Tensor, reads: Tensor, softmax: SelfAdjust) -> Tensor:
    """What arXiv 2502.18277 multiplies each weight with, one query at a time."""
    if softmax.kind == "raw":
        return scores
    rows = []
    for row, row_reads in zip(scores.flatten(0, 1), reads.flatten(0, 1), strict=True):
        read = row[row_reads] if bool(row_reads.any()) else row.new_ones(1)
        low, high = min(read.min(), row.new_zeros(())), max(read.max() + softmax.denominator_bias, row.new_zeros(())) + softmax.denominator_bias
        rows.append((row - low + softmax.numerator_bias) / (high - low))
    return torch.stack(rows).view_as(scores)


def assert_core_is_right(
    core: str, inputs: Inputs, ranges: KeyRanges, reads: Tensor, *, bias: PositionBias | None = None, softmax: Softmax = Standard()
) -> None:
    """Outputs and the gradients of q, k and v, or the declared refusal."""
    scale = 1 / math.sqrt(HEAD_SIZE)
    ours, theirs = inputs.leaves(), inputs.leaves()
    reason = refusal(core, spec_of(inputs.q, ranges, softmax=softmax, bias=bias, needs_grad=True))
    if reason is not None:
        with pytest.raises(ValueError, match=re.escape(f"{core}: {reason}")):
            attend(ours.q, ours.k, ours.v, ranges, scale=scale, core=core, bias=bias, softmax=softmax)
        return
    out = attend(ours.q, ours.k, ours.v, ranges, scale=scale, core=core, bias=bias, softmax=softmax)
    expected = by_definition(theirs, reads, scale=scale, bias=None if bias is None else dense_bias(bias), softmax=softmax)
    assert out.shape == inputs.q.shape
    assert out.dtype == inputs.q.dtype
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10, msg=lambda text: f"out: {text}")
    out_gradient = torch.randn_like(out)
    out.backward(out_gradient)
    expected.backward(out_gradient)
    for name in ("q", "k", "v"):
        gradient, wanted = getattr(ours, name).grad, getattr(theirs, name).grad
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"d{name}: {text}")


def refusal(core: str, spec: AttentionSpec) -> str | None:
    """Why the core cannot compute the call, as `choose_core` words it; None where it can."""
    try:
        assert choose_core(spec, core) == core
    except ValueError as error:
        return str(error).removeprefix(f"No attention core can compute this: {core}: ").removesuffix(".")
    return None


def dense_bias(bias: PositionBias) -> Tensor:
    """``[B, N, T, S]``"""
    distance = bias.query_positions[:, None, :, None] - bias.key_positions[:, None, None, :]
    return -bias.slopes[None, :, None, None] * distance


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("window", [1, 4, 64, 200])
def test_core_is_the_definition(core: str, length: int, window: int, definition: Definition) -> None:
    ids = ragged_ids(length)
    pattern = AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=(window,))
    ranges = TokenLayout.from_ids(ids, pattern).ranges(0)
    assert_core_is_right(core, random_inputs(4, length, length), ranges, definition(ids, pattern))


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1), (6, 2)])
@pytest.mark.parametrize("window", [5, 200])
def test_grouped_heads_share_keys_and_values(core: str, heads: tuple[int, int], window: int, definition: Definition) -> None:
    ids = ragged_ids(65)
    pattern = AttentionPattern(initial_tokens=1, separator_ids=SEPARATORS, windows=(window,))
    assert_core_is_right(core, random_inputs(4, 65, 65, heads=heads), TokenLayout.from_ids(ids, pattern).ranges(0), definition(ids, pattern))


@pytest.mark.parametrize("window", [1, 4, 64])
@pytest.mark.parametrize("token", [9, 1], ids=["no far keys", "only far keys"])
def test_batch_without_far_keys_or_with_nothing_else(core: str, window: int, token: int, definition: Definition) -> None:
    ids = torch.full((2, 66), token)
    pattern = AttentionPattern(separator_ids=SEPARATORS, windows=(window,))
    ranges = TokenLayout.from_ids(ids, pattern).ranges(0)
    assert ranges.index.shape[1] == (128 if token == 1 else 64)  # whole steps of 64, at least one: shapes repeat from batch to batch
    assert_core_is_right(core, random_inputs(2, 66, 66), ranges, definition(ids, pattern))


@pytest.mark.parametrize("window", [1, 4, 200])
@pytest.mark.parametrize("padding", [(5, 0), (0, 6), (7, 4), (63, 0)], ids=["left", "right", "both", "all but three"])
def test_padding_reads_nothing_and_is_read_by_nobody(core: str, window: int, padding: tuple[int, int], definition: Definition) -> None:
    length = 66
    ids = ragged_ids(length)
    mask = torch.ones_like(ids)
    mask[1:, : padding[0]] = 0
    mask[1:, length - padding[1] :] = 0
    pattern = AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=(window,))
    ranges = TokenLayout.from_ids(ids, pattern, attention_mask=mask).ranges(0)
    inputs = random_inputs(4, length, length)
    assert_core_is_right(core, inputs, ranges, definition(ids, pattern, attention_mask=mask))
    if refusal(core, spec_of(inputs.q, ranges, needs_grad=True)) is None:
        out = attend(inputs.q, inputs.k, inputs.v, ranges, scale=1.0, core=core)
        assert not out[~mask.bool()].any()


@pytest.mark.parametrize("window", [4, 200])
def test_row_of_padding_only_gives_zeros(core: str, window: int, definition: Definition) -> None:
    ids = ragged_ids(20)
    mask = torch.tensor([1, 0, 1, 0])[:, None].expand_as(ids)
    pattern = AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=(window,))
    ranges = TokenLayout.from_ids(ids, pattern, attention_mask=mask).ranges(0)
    assert_core_is_right(core, random_inputs(4, 20, 20), ranges, definition(ids, pattern, attention_mask=mask))


@pytest.mark.parametrize("window", [1, 4, 200])
def test_packed_documents_do_not_read_one_another(core: str, window: int, definition: Definition) -> None:
    ids = ragged_ids(70)
    ids[0, [10, 11, 40]] = DOCUMENT_END
    ids[2, [0, 69]] = DOCUMENT_END
    pattern = AttentionPattern(initial_tokens=2, separator_ids=SEPARATORS, windows=(window,))
    ranges = TokenLayout.from_ids(ids, pattern, document_end_id=DOCUMENT_END).ranges(0)
    assert_core_is_right(core, random_inputs(4, 70, 70), ranges, definition(ids, pattern, document_end_id=DOCUMENT_END))


@pytest.mark.parametrize("sliding_width", [0, 3, 40])
@pytest.mark.parametrize("window", [4, 200])
def test_sliding_width_limits_everything(core: str, window: int, sliding_width: int, definition: Definition) -> None:
    ids = ragged_ids(66)
    pattern = AttentionPattern(initial_tokens=2, separator_ids=SEPARATORS, windows=(window,), sliding_width=sliding_width)
    assert_core_is_right(core, random_inputs(4, 66, 66), TokenLayout.from_ids(ids, pattern).ranges(0), definition(ids, pattern))


def test_fixed_grid_stays_readable(core: str, definition: Definition) -> None:
    ids = ragged_ids(66)
    pattern = AttentionPattern(initial_tokens=2, windows=(4,), intervals=(5,))
    assert_core_is_right(core, random_inputs(4, 66, 66), TokenLayout.from_ids(ids, pattern).ranges(0), definition(ids, pattern))


@pytest.mark.parametrize("new", [1, 3, 64])
@pytest.mark.parametrize("window", [1, 4, 200])
@pytest.mark.parametrize("has_padding", [False, True])
def test_decoding_reads_what_the_whole_text_would(core: str, new: int, window: int, has_padding: bool, definition: Definition) -> None:
    length = 66
    ids = ragged_ids(length)
    mask = torch.ones_like(ids)
    if has_padding:
        mask[1, : min(9, length - new)] = 0
    pattern = AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=(window,))
    prompt = TokenLayout.from_ids(ids[:, :-new], pattern, attention_mask=mask[:, :-new] if has_padding else None)
    ranges = prompt.extend(ids[:, -new:]).ranges(0)
    assert_core_is_right(core, random_inputs(4, new, length), ranges, definition(ids, pattern, attention_mask=mask)[:, -new:])


@pytest.mark.parametrize("new", [1, 4])
def test_caches_with_holes_of_another_length_in_every_row(core: str, new: int) -> None:
    """Rows keep other keys each; what is missing to the longest row stands at the left as padding."""
    torch.manual_seed(0)
    length, initial, window = 50, 2, 6
    kept_places = [sorted(torch.randperm(length - new)[:count].tolist()) + list(range(length - new, length)) for count in (30, 11, 44)]
    is_far_place = torch.rand(3, length) < 0.3
    num_keys = max(map(len, kept_places))
    places = torch.full((3, num_keys), -1, dtype=torch.int32)
    far = torch.zeros(3, num_keys, dtype=torch.bool)
    for row, kept in enumerate(kept_places):
        places[row, num_keys - len(kept) :] = torch.tensor(kept)
        far[row, num_keys - len(kept) :] = torch.tensor([place < initial or bool(is_far_place[row, place]) for place in kept])
    query_places = torch.arange(length - new, length, dtype=torch.int32).expand(3, new)
    ranges = key_ranges(far, window, key_places=places, query_places=query_places, first=torch.zeros_like(query_places))
    reads = torch.zeros(3, new, num_keys, dtype=torch.bool)
    for row in range(3):
        for t, query in enumerate(query_places[row].tolist()):
            for column, place in enumerate(places[row].tolist()):
                reads[row, t, column] = 0 <= place <= query and (bool(far[row, column]) or query - place < window)
    assert_core_is_right(core, random_inputs(3, new, num_keys), ranges, reads)


@pytest.mark.parametrize("window", [4, 200])
def test_position_bias_is_added_to_the_scores(core: str, window: int, definition: Definition) -> None:
    ids = ragged_ids(66)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    pattern = AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=(window,))
    layout = TokenLayout.from_ids(ids[:, :-5], pattern, attention_mask=mask[:, :-5]).extend(ids[:, -5:])
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    bias = PositionBias(slopes=slopes, query_positions=layout.positions, key_positions=layout.key_positions)
    reads = definition(ids, pattern, attention_mask=mask)[:, -5:]
    assert_core_is_right(core, random_inputs(4, 5, 66), layout.ranges(0), reads, bias=bias)


@pytest.mark.parametrize("window", [1, 4, 200])
@pytest.mark.parametrize("padding", [(9, 0), (0, 9)], ids=["left", "right"])
def test_what_unread_keys_hold_never_shows(core: str, window: int, padding: tuple[int, int], definition: Definition) -> None:
    ids = ragged_ids(66)
    mask = torch.ones_like(ids)
    mask[1:, : padding[0]] = 0
    mask[1:, 66 - padding[1] :] = 0
    pattern = AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=(window,))
    reads = definition(ids, pattern, attention_mask=mask)
    inputs = random_inputs(4, 66, 66)
    inputs.k[~reads.any(1)] = torch.nan
    inputs.v[~reads.any(1)] = torch.nan
    assert inputs.v.isnan().any()
    assert_core_is_right(core, inputs, TokenLayout.from_ids(ids, pattern, attention_mask=mask).ranges(0), reads)


@pytest.mark.parametrize("new", [1, 5])
def test_what_evicted_keys_hold_never_shows_in_decoding(core: str, new: int, definition: Definition) -> None:
    ids = ragged_ids(66)
    pattern = AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=(7,))
    ranges = TokenLayout.from_ids(ids[:, :-new], pattern).extend(ids[:, -new:]).ranges(0)
    reads = definition(ids, pattern)[:, -new:]
    inputs = random_inputs(4, new, 66)
    inputs.k[~reads.any(1)] = torch.nan
    inputs.v[~reads.any(1)] = torch.nan
    assert_core_is_right(core, inputs, ranges, reads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [9, 200])
def test_error_in_half_precision_is_at_most_twice_that_of_the_dense_core(core: str, window: int, dtype: torch.dtype, definition: Definition) -> None:
    ids = ragged_ids(130)
    pattern = AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=(window,))
    ranges = TokenLayout.from_ids(ids, pattern).ranges(0)
    exact = random_inputs(4, 130, 130, dtype=dtype)
    if refusal(core, spec_of(exact.q, ranges, needs_grad=True)) is not None:
        assert_core_is_right(core, exact, ranges, definition(ids, pattern))
        return
    results: dict[str, list[Tensor]] = {}
    for name in ("definition", "dense", core):
        inputs = exact.leaves() if name != "definition" else Inputs(exact.q.double(), exact.k.double(), exact.v.double()).leaves()
        if name == "definition":
            out = by_definition(inputs, definition(ids, pattern), scale=0.35)
        else:
            out = attend(inputs.q, inputs.k, inputs.v, ranges, scale=0.35, core=name)
        (out * torch.linspace(-1, 1, HEAD_SIZE).to(out.dtype)).sum().backward()
        results[name] = [out.detach(), *(tensor.grad for tensor in (inputs.q, inputs.k, inputs.v))]
    for what, exactly, dense, ours in zip(("out", "dq", "dk", "dv"), results["definition"], results["dense"], results[core], strict=True):
        error, allowed = ((result.double() - exactly).abs().max().item() for result in (ours, dense))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * exactly.abs().max().item(), what


def test_core_refuses_or_computes_dropout(core: str) -> None:
    ids = ragged_ids(64)
    ranges = TokenLayout.from_ids(ids, AttentionPattern(windows=(100,))).ranges(0)
    inputs = random_inputs(4, 64, 64)
    reason = refusal(core, spec_of(inputs.q, ranges, softmax=Standard(), bias=None, dropout=0.5))
    if reason is not None:
        with pytest.raises(ValueError, match=re.escape(f"{core}: {reason}")):
            attend(inputs.q, inputs.k, inputs.v, ranges, scale=1.0, core=core, dropout=0.5)
        return
    total = attend(inputs.q * 0, inputs.k, torch.ones_like(inputs.v), ranges, scale=1.0, core=core, dropout=0.5)[:, -1]
    assert total.std() > 0
    assert abs(total.mean().item() - 1) < 0.1


@pytest.mark.parametrize("length", [300, 2048])
def test_long_texts_agree_with_the_dense_core(core: str, length: int) -> None:
    """The definition takes loops over pairs; `dense` has been compared with it above."""
    ids = ragged_ids(length)[:1]
    ranges = TokenLayout.from_ids(ids, AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=(64,))).ranges(0)
    exact = random_inputs(1, length, length, heads=(2, 1))
    if refusal(core, spec_of(exact.q, ranges, needs_grad=True)) is not None:
        return  # the refusal itself is checked by the shorter texts
    results: dict[str, list[Tensor]] = {}
    for name in ("dense", core):
        inputs = exact.leaves()
        out = attend(inputs.q, inputs.k, inputs.v, ranges, scale=0.35, core=name)
        (out * torch.linspace(-1, 1, HEAD_SIZE)).sum().backward()
        results[name] = [out.detach(), *(tensor.grad for tensor in (inputs.q, inputs.k, inputs.v))]
    for what, dense, ours in zip(("out", "dq", "dk", "dv"), results["dense"], results[core], strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-10, msg=lambda text, what=what: f"{what}: {text}")


def test_second_derivative_is_right_or_refused(core: str) -> None:
    """An operator whose gradient is taken for a constant would give wrong ones in silence."""
    ids = torch.tensor([[9, 1, 9, 9]])
    ranges = TokenLayout.from_ids(ids, AttentionPattern(initial_tokens=1, separator_ids=SEPARATORS, windows=(2,))).ranges(0)
    inputs = random_inputs(1, 4, 4, heads=(2, 1))
    if refusal(core, spec_of(inputs.q, ranges, needs_grad=True)) is not None:
        return  # the refusal itself is checked by other calls
    leaves = inputs.leaves()

    def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, ranges, scale=0.35, core=core)

    if core == "dense":
        assert torch.autograd.gradgradcheck(read, (leaves.q, leaves.k, leaves.v), fast_mode=True)
    else:
        with pytest.raises((ValueError, RuntimeError), match=r"no second derivative|no autograd formula"):
            torch.autograd.gradgradcheck(read, (leaves.q, leaves.k, leaves.v), fast_mode=True)


SELF_ADJUSTS = (SelfAdjust(kind="raw"), SelfAdjust(kind="normalised", numerator_bias=1e-3, denominator_bias=1e-2))


@pytest.mark.parametrize("softmax", SELF_ADJUSTS, ids=lambda softmax: softmax.kind)
@pytest.mark.parametrize("window", [4, 200])
def test_self_adjust_softmax_is_the_definition_under_any_pattern(core: str, window: int, softmax: SelfAdjust, definition: Definition) -> None:
    ids = ragged_ids(66)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    pattern = AttentionPattern(initial_tokens=2, separator_ids=SEPARATORS, windows=(window,), softmax=softmax)
    ranges = TokenLayout.from_ids(ids, pattern, attention_mask=mask).ranges(0)
    assert_core_is_right(core, random_inputs(4, 66, 66), ranges, definition(ids, pattern, attention_mask=mask), softmax=softmax)


@pytest.mark.parametrize("new", [1, 5])
def test_extremes_may_run_over_all_causal_keys(core: str, new: int) -> None:
    """The reference's reading: they are those of plain causal attention, whatever the pattern hides."""
    ids = ragged_ids(66)
    over_causal = SelfAdjust(kind="normalised", denominator_bias=1e-2, extremes="causal")
    sparse = AttentionPattern(initial_tokens=2, separator_ids=SEPARATORS, windows=(4,), softmax=over_causal)
    ranges = TokenLayout.from_ids(ids[:, :-new], sparse).extend(ids[:, -new:]).ranges(0)
    inputs = random_inputs(4, new, 66)
    if refusal(core, spec_of(inputs.q, ranges, softmax=over_causal)) is not None:
        return
    ours = attend(inputs.q, inputs.k, inputs.v, ranges, scale=0.3, core=core, softmax=over_causal)
    causal = torch.arange(66 - new, 66)[:, None] >= torch.arange(66)
    scores = torch.einsum("btnh,bsnh->bnts", inputs.q, inputs.k.repeat_interleave(2, 2)) * 0.3
    reads = ranges.dense()[:, None]
    low = scores.masked_fill(~causal, 0).amin(-1, keepdim=True)
    high = (scores.masked_fill(~causal, -math.inf).amax(-1, keepdim=True) + 1e-2).clamp(min=0) + 1e-2
    weights = scores.masked_fill(~reads, -math.inf).softmax(-1) * (scores - low) / (high - low)
    torch.testing.assert_close(ours, torch.einsum("bnts,bsnh->btnh", weights, inputs.v.repeat_interleave(2, 2)))

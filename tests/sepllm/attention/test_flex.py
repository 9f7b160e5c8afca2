"""The flex core: its blocks against an evaluation of the mask over all pairs, its outputs against the dense core in float64.

torch compiles a kernel for each bucket of shapes, some seconds each, so that the cases share few of them.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from sepllm.attention import PositionBias, attend, choose_core, flex
from sepllm.attention.registry import spec_of
from sepllm.layout import KeyRanges, TokenLayout, key_ranges
from sepllm.pattern import AttentionPattern, SelfAdjust

SEPARATORS = (1, 2)
DOCUMENT_END = 3
HEAD_SIZE = 8

needs_compiler = pytest.mark.skipif(not flex._COMPILES_FOR_CPU, reason="torch compiles flex_attention for CPUs with AVX2 only")


def ragged_ids(length: int) -> Tensor:
    """Rows with some separators, none, only separators, many."""
    generator = torch.Generator().manual_seed(length)
    is_separator = torch.rand(4, length, generator=generator) < torch.tensor([[0.15], [-1.0], [2.0], [0.5]])
    separators, others = (torch.randint(*span, (4, length), generator=generator) for span in ((1, 3), (4, 50)))
    return torch.where(is_separator, separators, others)


def random_inputs(
    queries: int, keys: int, *, batch: int = 4, heads: tuple[int, int] = (4, 2), head_size: int = HEAD_SIZE, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(keys)
    shapes = ((batch, queries, heads[0], head_size), (batch, keys, heads[1], head_size), (batch, keys, heads[1], head_size))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def alibi(layout: TokenLayout) -> PositionBias:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    return PositionBias(slopes=slopes, query_positions=layout.positions, key_positions=layout.key_positions)


def exactly(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, *, scale: float, bias: PositionBias | None = None) -> Tensor:
    return attend(q.double(), k.double(), v.double(), ranges, scale=scale, core="dense", bias=bias)


def assert_outputs_are_right(
    ranges: KeyRanges, *, heads: tuple[int, int] = (4, 2), head_size: int = HEAD_SIZE, bias: PositionBias | None = None
) -> None:
    """Against the dense core in float64; a query that reads nothing gives exact zeros; unread keys hold NaN."""
    q, k, v = random_inputs(ranges.band_lo.shape[1], ranges.num_keys, heads=heads, head_size=head_size)
    k[ranges.unread_keys()] = torch.nan
    v[ranges.unread_keys()] = torch.nan
    out = attend(q, k, v, ranges, scale=0.35, core="flex", bias=bias)
    assert out.shape == q.shape
    torch.testing.assert_close(out.double(), exactly(q, k, v, ranges, scale=0.35, bias=bias), rtol=1e-5, atol=5e-6)
    assert not out[ranges.read_keys() == 0].any()


# Blocks: no compilation.


def random_ranges(seed: int) -> KeyRanges:
    """Windows, padding, packed documents, a sliding width, a grid, a few last queries, caches with holes."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    batch, length = pick(1, 2, 3), 1 + int(torch.randint(60, (), generator=generator))
    ids = torch.randint(pick(4, 20), (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if pick(0, 1):
        place, left, right = torch.arange(length), *torch.randint(length + 1, (2, batch, 1), generator=generator).unbind()
        mask = ((place >= left) & (place < length - right // 3)).long()
    if pick(0, 0, 1):
        return cache_with_holes(generator, batch, length, window=pick(1, 3, 9))
    pattern = AttentionPattern(
        initial_tokens=pick(0, 1, 3),
        separator_ids=(pick(0, 1) and SEPARATORS) or (),
        windows=(pick(1, 2, 5, 16, 64),),
        intervals=(pick(2, 5),) if pick(0, 0, 1) else None,
        sliding_width=pick(0, 3, 12) if pick(0, 0, 1) else None,
    )
    new = pick(0, 0, 1, 5)
    if new and new < length and bool((mask[:, -new - 1 :] == 1).all()):
        prompt = TokenLayout.from_ids(ids[:, :-new], pattern, attention_mask=mask[:, :-new], document_end_id=DOCUMENT_END)
        return prompt.extend(ids[:, -new:]).ranges(0)
    return TokenLayout.from_ids(ids, pattern, attention_mask=mask, document_end_id=DOCUMENT_END if pick(0, 1) else None).ranges(0)


def cache_with_holes(generator: torch.Generator, batch: int, keys: int, *, window: int) -> KeyRanges:
    queries = 1 + int(torch.randint(keys, (), generator=generator))
    places = torch.rand(batch, 3 * keys, generator=generator).argsort(1)[:, :keys].sort(1).values.int()
    far = torch.rand(batch, keys, generator=generator) < 0.3
    query_places = torch.randint(3 * keys, (batch, queries), generator=generator).sort(1).values.int()
    return key_ranges(far, window, key_places=places, query_places=query_places, first=torch.zeros_like(query_places))


def prepared_for(ranges: KeyRanges, block: int, monkeypatch: pytest.MonkeyPatch) -> flex._Prepared:
    monkeypatch.setitem(flex.BLOCK, "cpu", block)
    flex.prepare(ranges)
    prepared: flex._Prepared = ranges.derived["flex"]
    return prepared


@pytest.mark.parametrize("block", [2, 4, 16])
def test_blocks_are_those_of_the_mask_evaluated_over_all_pairs(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(60):
        ours = prepared_for(random_ranges(seed), block, monkeypatch).block_mask
        batch, lengths = ours.kv_indices.shape[0], ours.seq_lengths
        theirs = create_block_mask(ours.mask_mod, batch, None, *lengths, device="cpu", BLOCK_SIZE=block)
        for name in ("kv", "full_kv", "q", "full_q"):
            for table in (f"{name}_num_blocks", f"{name}_indices"):
                mine, wanted = getattr(ours, table), getattr(theirs, table)
                assert torch.equal(mine, wanted), (seed, table)
                assert mine.dtype == wanted.dtype
                assert mine.is_contiguous(), "the CUDA kernels take it for granted"


def test_mask_over_the_columns_is_that_over_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(100):
        ranges = random_ranges(seed)
        prepared = prepared_for(ranges, 4, monkeypatch)
        batch, num_queries = ranges.band_lo.shape
        num_far = prepared.index.shape[1]
        columns = create_mask(prepared.block_mask.mask_mod, batch, 1, *prepared.block_mask.seq_lengths, device="cpu")[:, 0].int()
        keys = columns[:, :, num_far : num_far + ranges.num_keys].clone()
        keys.scatter_add_(2, prepared.index[:, None, :, 0, 0].expand(-1, keys.shape[1], -1), columns[:, :, :num_far])
        assert torch.equal(keys[:, :num_queries], ranges.dense().int()), seed
        assert torch.equal(columns.sum((1, 2)), ranges.kept_pairs()), seed


def test_gap_between_documents_leaves_blocks_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """One query that reads nothing stands where no key is read: its block of columns is no block of the mask."""
    low, high = torch.tensor([[0, 9, 20]], dtype=torch.int32), torch.tensor([[2, 9, 22]], dtype=torch.int32)
    touched, full = flex._block_tables(low, high, (4, 24), 4)
    assert touched.tolist() == [[[True, False, False, False, False, True]]]
    assert not full.any()


def test_buckets_hold_the_length_and_waste_at_most_a_quarter() -> None:
    buckets = [flex._bucket(count, 64) for count in range(20000)]
    assert all(bucket % 64 == 0 and bucket >= max(count, 1) for count, bucket in enumerate(buckets))
    assert all(bucket <= 1.25 * count for count, bucket in enumerate(buckets) if count > 4 * 64 and count % 64 == 0)
    assert all(flex._bucket(power * step, 128) == power * step for power in (1024, 8192, 131072) for step in (4, 5, 6, 7))
    assert len(set(buckets)) < 32


def test_preparation_waits_for_no_device() -> None:
    """Fake tensors have shapes and no contents: whatever needed to read them, and so to wait, would raise."""
    ranges = TokenLayout.from_ids(ragged_ids(300), AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=(9,))).ranges(0)
    fake = FakeTensorMode()
    bounds = {name: fake.from_tensor(getattr(ranges, name)) for name in ("index", "far_lo", "far_hi", "band_lo", "band_hi")}
    ranges = replace(ranges, **bounds, derived={})
    with fake:
        flex.prepare(ranges)
        with pytest.raises(DataDependentOutputException):
            bool(ranges.unread_keys().any())


def test_block_tables_stay_small() -> None:
    """Four tables of blocks, and nothing of S x S: 32768 tokens in blocks of 64, a quarter of them far."""
    ids = torch.arange(32768)[None] % 4 + 1
    ranges = TokenLayout.from_ids(ids, AttentionPattern(separator_ids=(1,), windows=(64,))).ranges(0)
    flex.prepare(ranges)
    block_mask = ranges.derived["flex"].block_mask
    blocks, columns = 32768 // 64, (32768 + 8192) // 64
    indices = [block_mask.kv_indices, block_mask.full_kv_indices, block_mask.q_indices, block_mask.full_q_indices]
    assert [table.numel() for table in indices] == [blocks * columns] * 4


# Refusals


def test_calls_that_torch_cannot_compile_are_refused() -> None:
    ranges = TokenLayout.from_ids(ragged_ids(5), AttentionPattern(windows=(3,))).ranges(0)
    q, k, v = random_inputs(5, 5)
    with pytest.raises(ValueError, match="flex: torch's flex_attention has no backward on the CPU"):
        attend(q.requires_grad_(), k, v, ranges, scale=1.0, core="flex")
    with pytest.raises(ValueError, match="flex: torch compiles flex_attention for float32, bfloat16 and float16 only"):
        choose_core(spec_of(q.double(), ranges), "flex")
    with pytest.raises(ValueError, match="flex: only the standard softmax"):
        choose_core(spec_of(q, ranges, softmax=SelfAdjust(kind="raw")), "flex")
    with pytest.raises(ValueError, match="flex: no dropout"):
        choose_core(spec_of(q, ranges, dropout=0.1), "flex")
    with pytest.raises(ValueError, match="flex: torch compiles flex_attention for CPU and CUDA only"):
        choose_core(spec_of(q.to("meta"), ranges), "flex")


def test_cpu_without_avx2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_COMPILES_FOR_CPU", False)
    ranges = TokenLayout.from_ids(ragged_ids(5), AttentionPattern(windows=(3,))).ranges(0)
    with pytest.raises(ValueError, match="flex: torch compiles flex_attention for CPUs with AVX2"):
        attend(*random_inputs(5, 5), ranges, scale=1.0, core="flex")


# Gradients: the operator's own dense backward, which torch keeps from CPUs, in float64.


@pytest.fixture
def _dense_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets flex_attention run uncompiled, with gradients, on a CPU."""
    options_of = torch_flex._apply_kernel_options

    def options(*arguments: object, **keywords: object) -> dict[str, object]:
        return {**options_of(*arguments, **keywords), "OUTPUT_LOGSUMEXP": True}

    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch_flex, "_apply_kernel_options", options)
    monkeypatch.setattr(flex, "_training", lambda: flex._attention)


def layouts() -> Iterator[tuple[str, TokenLayout]]:
    """Named cases over ragged rows of three blocks of queries. The row of separators stays whole, so that all have the same bucket."""
    length = 130
    ids, mask = ragged_ids(length), torch.ones(4, length, dtype=torch.long)
    for window in (1, 4, 64, 200):
        yield f"window {window}", TokenLayout.from_ids(ids, AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=(window,)))
    pattern = AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=(9,))
    for name, hidden in (("left", slice(0, 70)), ("right", slice(100, None)), ("whole", slice(None))):
        padded = mask.clone()
        padded[torch.tensor([0, 3])[:, None], torch.arange(length)[hidden]] = 0
        yield f"{name} padding", TokenLayout.from_ids(ids, pattern, attention_mask=padded)
    packed = ids.clone()
    packed[0, [10, 11, 64, 100]] = packed[3, [0, 128]] = DOCUMENT_END
    yield "packed documents", TokenLayout.from_ids(packed, pattern, document_end_id=DOCUMENT_END)
    for width in (0, 3, 80):
        wide = AttentionPattern(initial_tokens=2, separator_ids=SEPARATORS, windows=(9,), sliding_width=width)
        yield f"sliding width {width}", TokenLayout.from_ids(ids, wide)
    grid = AttentionPattern(initial_tokens=2, separator_ids=SEPARATORS, windows=(4,), intervals=(5,))
    yield "grid", TokenLayout.from_ids(ids, grid)


@pytest.mark.usefixtures("_dense_operator")
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("name", "layout"), [pytest.param(*case, id=case[0]) for case in layouts()])
def test_gradients_are_those_of_the_dense_core(name: str, layout: TokenLayout, has_bias: bool) -> None:
    ranges, bias = layout.ranges(0), alibi(layout) if has_bias else None
    inputs = random_inputs(layout.num_queries, ranges.num_keys, dtype=torch.float64)
    for x in inputs[1:]:
        x[ranges.unread_keys()] = torch.nan
    flex.prepare(ranges)
    ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    out = flex.attention(*ours, ranges, scale=0.35, softmax=layout.pattern.softmax, bias=bias, dropout=0.0)
    expected = attend(*theirs, ranges, scale=0.35, core="dense", bias=bias)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    for what, gradient, wanted in zip(
        "qkv", torch.autograd.grad(out, ours, direction), torch.autograd.grad(expected, theirs, direction), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-10, msg=lambda text, what=what: f"d{what}: {text}")


@pytest.mark.usefixtures("_dense_operator")
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_training_is_one_graph_also_under_activation_checkpointing(is_checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for a GPU, forward and backward, with the operator's dense mathematics in place of generated code."""
    monkeypatch.setattr(flex, "_training", lambda: torch.compile(flex._attention, fullgraph=True, dynamic=False, backend="aot_eager"))
    layout = TokenLayout.from_ids(ragged_ids(70), AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=(9,)))
    ranges = layout.ranges(0)
    flex.prepare(ranges)
    leaves = [x.requires_grad_() for x in random_inputs(70, 70, dtype=torch.float64)]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex.attention(q, k, v, ranges, scale=0.35, softmax=layout.pattern.softmax, bias=alibi(layout), dropout=0.0).cos()

    out = checkpoint(ours, *leaves, use_reentrant=False) if is_checkpointed else ours(*leaves)
    expected = attend(*leaves, ranges, scale=0.35, core="dense", bias=alibi(layout)).cos()
    for gradient, wanted in zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-10)


def test_columns_that_are_read_pass_their_gradients_on_also_compiled() -> None:
    ranges = TokenLayout.from_ids(ragged_ids(20), AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=(4,))).ranges(0)
    flex.prepare(ranges)
    prepared = ranges.derived["flex"]
    reads = create_mask(prepared.block_mask.mask_mod, 4, 1, *prepared.block_mask.seq_lengths, device="cpu")
    is_read = reads.any(2)[:, 0, :, None, None]
    x = random_inputs(1, 20, heads=(1, 1), head_size=2, dtype=torch.float64)[1].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: flex._columns(x, prepared) * is_read, x)
    compiled = torch.compile(flex._columns, fullgraph=True, backend="aot_eager")
    direction = is_read * torch.randn(is_read.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    eager, traced = (torch.autograd.grad(columns(x, prepared), x, direction.expand(-1, -1, 1, 2))[0] for columns in (flex._columns, compiled))
    assert torch.equal(eager, traced)


# Compiled outputs on the CPU


@pytest.fixture
def _one_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grows everything to 320 columns: one compilation for the cases that ask for it."""
    monkeypatch.setattr(flex, "_bucket", lambda _count, _block: 320)


@needs_compiler
@pytest.mark.usefixtures("_one_bucket")
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130, 300])
@pytest.mark.parametrize("window", [1, 4, 64, 300])
def test_outputs_at_any_length(length: int, window: int) -> None:
    pattern = AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=(window,))
    assert_outputs_are_right(TokenLayout.from_ids(ragged_ids(length), pattern).ranges(0))


@needs_compiler
@pytest.mark.usefixtures("_one_bucket")
@pytest.mark.parametrize(("name", "layout"), [pytest.param(*case, id=case[0]) for case in layouts()])
def test_outputs_of_any_layout(name: str, layout: TokenLayout) -> None:
    assert_outputs_are_right(layout.ranges(0))


@needs_compiler
def test_position_bias_is_added_to_the_scores() -> None:
    for _, layout in layouts():
        assert_outputs_are_right(layout.ranges(0), bias=alibi(layout))


@needs_compiler
@pytest.mark.parametrize("new", [1, 3, 60])
@pytest.mark.parametrize("window", [1, 4, 200])
def test_decoding(new: int, window: int) -> None:
    ids, mask = ragged_ids(130), torch.ones(4, 130 - new, dtype=torch.long)
    mask[1, :50] = 0
    pattern = AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=(window,))
    layout = TokenLayout.from_ids(ids[:, :-new], pattern, attention_mask=mask).extend(ids[:, -new:])
    assert_outputs_are_right(layout.ranges(0))


@needs_compiler
@pytest.mark.parametrize(("heads", "head_size"), [((2, 2), 1), ((6, 2), 20)])
def test_any_heads_and_head_size(heads: tuple[int, int], head_size: int) -> None:
    for window in (5, 200):
        pattern = AttentionPattern(initial_tokens=1, separator_ids=SEPARATORS, windows=(window,))
        assert_outputs_are_right(TokenLayout.from_ids(ragged_ids(64), pattern).ranges(0), heads=heads, head_size=head_size)


@needs_compiler
@pytest.mark.parametrize("token", [9, 1], ids=["no far keys", "only far keys"])
def test_batch_without_far_keys_or_with_nothing_else(token: int) -> None:
    ids = torch.full((4, 130), token)
    for window in (1, 4, 64):
        for separators in (SEPARATORS, ()):
            assert_outputs_are_right(TokenLayout.from_ids(ids, AttentionPattern(separator_ids=separators, windows=(window,))).ranges(0))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torchs_attention(dtype: torch.dtype) -> None:
    ranges = TokenLayout.from_ids(ragged_ids(130), AttentionPattern(separator_ids=SEPARATORS, windows=(130,))).ranges(0)
    q, k, v = random_inputs(130, 130, dtype=dtype)
    expected = exactly(q, k, v, ranges, scale=1 / math.sqrt(HEAD_SIZE))
    ours = attend(q, k, v, ranges, scale=1 / math.sqrt(HEAD_SIZE), core="flex")
    theirs = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True).transpose(1, 2)
    error, allowed = ((out.double() - expected).abs().max().item() for out in (ours, theirs))
    assert ours.dtype == dtype
    assert error <= 2 * allowed


@needs_compiler
def test_another_batch_of_the_same_bucket_is_not_compiled_again() -> None:
    def run(length: int, window: int, separator_every: int) -> KeyRanges:
        ids = torch.arange(length).expand(4, -1) % separator_every + 1
        ranges = TokenLayout.from_ids(ids, AttentionPattern(initial_tokens=3, separator_ids=(1,), windows=(window,))).ranges(0)
        assert_outputs_are_right(ranges)
        return ranges

    first = run(130, 9, 9)
    compiled = counters["stats"]["unique_graphs"]
    for length, window, every in ((130, 9, 9), (180, 40, 12), (192, 1, 7), (150, 192, 30)):
        assert run(length, window, every).derived["flex"].index.shape == first.derived["flex"].index.shape
    assert counters["stats"]["unique_graphs"] == compiled


def test_more_lengths_may_be_compiled_than_torch_allows_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backend that generates no code, so that it takes no time."""
    compiled = torch.compile(flex._kernel, fullgraph=True, dynamic=False, backend="eager")
    monkeypatch.setattr(flex, "_inference", lambda: compiled)
    monkeypatch.setitem(flex.BLOCK, "cpu", 4)
    lengths = range(4, 4 * (torch._dynamo.config.recompile_limit + 2), 4)
    for length in lengths:
        assert_outputs_are_right(TokenLayout.from_ids(ragged_ids(length), AttentionPattern(separator_ids=SEPARATORS, windows=(9,))).ranges(0))


@pytest.mark.usefixtures("_dense_operator")
def test_training_may_compile_more_lengths_than_torch_allows_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(flex._attention, fullgraph=True, dynamic=False, backend="eager")
    monkeypatch.setattr(flex, "_training", lambda: compiled)
    monkeypatch.setitem(flex.BLOCK, "cpu", 4)
    for length in range(4, 4 * (torch._dynamo.config.recompile_limit + 2), 4):
        layout = TokenLayout.from_ids(ragged_ids(length), AttentionPattern(separator_ids=SEPARATORS, windows=(9,)))
        ranges = layout.ranges(0)
        flex.prepare(ranges)
        leaves = [x.requires_grad_() for x in random_inputs(length, length, dtype=torch.float64)]
        out = flex.attention(*leaves, ranges, scale=0.35, softmax=layout.pattern.softmax, bias=None, dropout=0.0)
        torch.testing.assert_close(out, attend(*leaves, ranges, scale=0.35, core="dense"), rtol=1e-9, atol=1e-10)


@needs_compiler
def test_it_works_inside_a_compiled_function() -> None:
    @torch.compile(fullgraph=True)
    def doubled(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges) -> Tensor:
        return attend(2 * q, k, v, ranges, scale=0.35, core="flex")

    ranges = TokenLayout.from_ids(ragged_ids(50), AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=(9,))).ranges(0)
    flex.prepare(ranges)
    q, k, v = random_inputs(50, 50)
    with torch.inference_mode():
        out = doubled(q, k, v, ranges)
    torch.testing.assert_close(out.double(), exactly(2 * q, k, v, ranges, scale=0.35), rtol=1e-5, atol=5e-6)


LONG_TEXT = """
import resource, torch
from sepllm.attention import attend
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ids = torch.randint(7, (1, 32768), generator=torch.Generator().manual_seed(0))
ranges = TokenLayout.from_ids(ids, AttentionPattern(initial_tokens=3, separator_ids=(1,), windows=(64,))).ranges(0)
q, k, v = torch.ones(3, 1, 32768, 1, 16)
assert torch.allclose(attend(q, k, v, ranges, scale=0.1, core="flex"), v)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@needs_compiler
def test_32768_tokens_take_less_than_a_byte_for_each_pair() -> None:
    """Resident memory in KiB, what compiling takes included: so nothing of S x S was there, not even a mask."""
    result = subprocess.run([sys.executable, "-c", LONG_TEXT], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) < 32768 * 32768 / 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("head_size", [8, 64, 80])
@pytest.mark.parametrize("length", [65, 300, 1024])
def test_outputs_and_gradients_on_a_gpu(length: int, head_size: int, has_bias: bool) -> None:
    ids, mask = ragged_ids(length), torch.ones(4, length, dtype=torch.long)
    mask[1, : length // 2] = 0
    pattern = AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=(64,))
    layout = TokenLayout.from_ids(ids, pattern, attention_mask=mask).to("cuda")
    ranges, bias = layout.ranges(0), alibi(layout) if has_bias else None
    if bias is not None:
        bias = PositionBias(slopes=bias.slopes.cuda(), query_positions=bias.query_positions, key_positions=bias.key_positions)
    inputs = [x.cuda() for x in random_inputs(length, length, head_size=head_size)]
    results = []
    for core, dtype in (("dense", torch.float64), ("flex", torch.float32), ("dense", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = attend(*leaves, ranges, scale=head_size**-0.5, core=core, bias=bias)
        results.append([out, *torch.autograd.grad(out.cos().sum(), leaves)])
    for exact, ours, dense in zip(*results, strict=True):
        assert (ours - exact).abs().max() <= 4 * (dense - exact).abs().max() + 1e-5
    with torch.no_grad():
        torch.testing.assert_close(attend(*inputs, ranges, scale=head_size**-0.5, core="flex", bias=bias), results[1][0], rtol=1e-4, atol=1e-5)

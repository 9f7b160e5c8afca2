"""The Triton kernels in the interpreter against the definition in plain torch, as operators of torch, and compiled for sm_80 and sm_90."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("triton", reason="the Triton kernels need the package triton")

from sepllm.layout import KeyRanges, TokenLayout
from sepllm.ops import attention_reference
from sepllm.ops.attention_reference import Adjustment, Bias
from sepllm.ops.sep_attention import Ranges, read_mask
from sepllm.ops.sep_attention_kernels import NORMALISED, RAW
from sepllm.ops.sep_attention_tiles import INTERPRETER, Tile, Tiles, tiles
from sepllm.ops.sep_attention_triton import Tables, _numbers, backward, forward, is_interpreted, make_tables, sep_attention_triton
from sepllm.pattern import AttentionPattern

interpreted = pytest.mark.skipif(not is_interpreted(), reason="a CUDA device is here, so the kernels are compiled: see tests/gpu")

SCALE = 0.3
NAMES = ("out", "dq", "dk", "dv")
ADJUSTMENTS = {
    "standard": None,
    "raw": Adjustment(is_normalised=False),
    "normalised": Adjustment(is_normalised=True, numerator_bias=0.25, denominator_bias=0.125),
}
of_every_softmax = pytest.mark.parametrize("softmax", ADJUSTMENTS)


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """What a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def text_ranges(length: int, window: int, *, new: int | None = None, document_end_id: int | None = None) -> Ranges:
    """Two rows, the first with many separators and padding on the left."""
    torch.manual_seed(length)
    ids = torch.where(torch.rand(2, length) < torch.tensor([[0.5], [0.15]]), 1, 9)
    if document_end_id is not None:
        ids[1, :: length // 3] = document_end_id
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    pattern = AttentionPattern(initial_tokens=2, separator_ids=(1,), windows=(window,))
    old = length - (new or length)
    layout = TokenLayout.from_ids(ids[:, : old or length], pattern, attention_mask=mask[:, : old or length], document_end_id=document_end_id)
    return bounds(layout.extend(ids[:, old:]).ranges(0) if old else layout.ranges(0))


def bounds(ranges: KeyRanges) -> Ranges:
    return Ranges(ranges.index, ranges.far_lo, ranges.far_hi, ranges.band_lo, ranges.band_hi)


def any_ranges(seed: int, *, queries: int, keys: int) -> Ranges:
    """Any bounds that never decrease, with far columns and keys between them that no query reads, and queries that read nothing."""
    generator = torch.Generator().manual_seed(seed)
    rows = 3

    def ascending(highest: int) -> Tensor:
        return torch.randint(highest + 1, (rows, queries), generator=generator).sort(1).values

    is_far = torch.rand(rows, keys, generator=generator) < 0.4
    count = is_far.sum(1)
    index = torch.zeros(rows, int(count.max()) + 3, dtype=torch.int32)
    for row in range(rows):
        index[row, : count[row]] = is_far[row].nonzero()[:, 0].int()
    band_lo = ascending(keys)
    band_hi = torch.maximum(ascending(keys), band_lo)
    before = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), is_far.cumsum(1)], 1)
    far_hi = torch.minimum(before.gather(1, band_lo), ascending(keys))
    far_lo = torch.minimum(ascending(keys // 2), far_hi)
    return Ranges(index, *(bound.int() for bound in (far_lo, far_hi, band_lo, band_hi)))


def tables(ranges: Ranges, num_keys: int) -> Tables:
    return make_tables(*ranges, num_keys=num_keys)


def inputs(ranges: Ranges, num_keys: int, *, heads: tuple[int, int] = (2, 1), size: int = 16, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the gradient of out."""
    batch, queries = ranges.band_lo.shape
    generator = torch.Generator().manual_seed(0)
    of_queries, of_keys = (batch, queries, heads[0], size), (batch, num_keys, heads[1], size)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in (of_queries, of_keys, of_keys, of_queries)]


def by_definition(tensors: list[Tensor], is_read: Tensor, bias: Bias | None = None, adjustment: Adjustment | None = None) -> list[Tensor]:
    """Output and gradients."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors[:3]]
    out, _ = attention_reference.attention(*leaves, is_read, scale=SCALE, bias=bias, adjustment=adjustment)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3].to(out.dtype))]


def by_kernels(
    tensors: list[Tensor], ranges: Ranges, *, division: Tiles | None = None, bias: Bias | None = None, adjustment: Adjustment | None = None
) -> list[Tensor]:
    q, k, v, grad_out = tensors
    known, softmax = tables(ranges, k.shape[1]), _numbers(adjustment)
    result = forward(q, k, v, known, scale=SCALE, bias=bias, softmax=softmax, division=division)
    return [result.out, *backward(grad_out, q, k, v, result, known, scale=SCALE, bias=bias, softmax=softmax, division=division)]


def assert_same(ours: list[Tensor], wanted: list[Tensor], *, tolerance: float = 1e-11) -> None:
    for name, one, other in zip(NAMES, ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def small(queries: int, keys: int) -> Tiles:
    tile = Tile(queries, keys, 1, 1)
    return Tiles(forward=tile, queries=tile, far=tile, keys=tile)


@interpreted
@pytest.mark.usefixtures("fresh_memory_is_nan")
@pytest.mark.parametrize(
    ("softmax", "window", "division"),
    [
        *(("standard", window, division) for window in (1, 20, 90) for division in ((16, 16), (16, 32), (64, 16))),
        *((softmax, *case) for softmax in ("raw", "normalised") for case in ((1, (16, 16)), (20, (16, 32)), (90, (64, 16)))),
    ],
)
def test_tiles_full_on_the_edge_and_beyond_it_give_the_definition(softmax: str, window: int, division: tuple[int, int]) -> None:
    adjustment = ADJUSTMENTS[softmax]
    ranges = text_ranges(97, window, document_end_id=3 if window == 20 else None)
    tensors = inputs(ranges, 97)
    wanted = by_definition(tensors, read_mask(ranges, 97), adjustment=adjustment)
    assert_same(by_kernels(tensors, ranges, division=small(*division), adjustment=adjustment), wanted)


@interpreted
@pytest.mark.usefixtures("fresh_memory_is_nan")
@pytest.mark.parametrize(("softmax", "seed"), [*(("standard", seed) for seed in range(6)), ("raw", 1), ("normalised", 0), ("normalised", 2)])
def test_any_bounds_that_never_decrease_are_the_definition_and_unread_keys_may_be_nan(softmax: str, seed: int) -> None:
    adjustment = ADJUSTMENTS[softmax]
    queries, keys = ((50, 70), (1, 40), (70, 20))[seed % 3]
    ranges = any_ranges(seed, queries=queries, keys=keys)
    is_read = read_mask(ranges, keys)
    assert not is_read.any(1).all()
    tensors = inputs(ranges, keys)
    for tensor in tensors[1:3]:
        tensor[~is_read.any(1)] = torch.nan
    ours = by_kernels(tensors, ranges, division=small(16, 16), adjustment=adjustment)
    assert_same(ours, by_definition(tensors, is_read, adjustment=adjustment))
    assert not ours[0][~is_read.any(2)].any()


@interpreted
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("denominator_bias", [0.0, -0.5, 0.5])
def test_extremes_are_zero_where_all_scores_have_one_sign_and_ties_go_to_the_first_key(sign: int, denominator_bias: float) -> None:
    ranges = text_ranges(40, 9)
    tensors = inputs(ranges, 40)
    tensors[0] = tensors[0].abs()
    tensors[1] = sign * tensors[1].abs()
    tensors[1][:, 1::2] = tensors[1][:, ::2]
    adjustment = Adjustment(is_normalised=True, denominator_bias=denominator_bias)
    wanted = by_definition(tensors, read_mask(ranges, 40), adjustment=adjustment)
    assert_same(by_kernels(tensors, ranges, division=small(16, 16), adjustment=adjustment), wanted)


@interpreted
@pytest.mark.parametrize(("softmax", "new"), [("standard", 1), ("standard", 20), ("normalised", 1), ("raw", 20)])
def test_decoding_with_a_bias_and_grouped_heads(softmax: str, new: int) -> None:
    adjustment = ADJUSTMENTS[softmax]
    ranges = text_ranges(60, 9, new=new)
    bias = Bias(torch.tensor([0.5, 0.3, 0.1, 0.0]).double(), torch.arange(60.0)[-new:].expand(2, new), torch.arange(60.0).expand(2, 60))
    tensors = inputs(ranges, 60, heads=(4, 2))
    ours = by_kernels(tensors, ranges, division=small(16, 16), bias=bias, adjustment=adjustment)
    assert_same(ours, by_definition(tensors, read_mask(ranges, 60), bias, adjustment))


@interpreted
def test_sums_are_saved_as_logarithms_to_base_two() -> None:
    ranges = text_ranges(40, 9)
    q, k, v, _ = inputs(ranges, 40)
    lse = forward(q, k, v, tables(ranges, 40), scale=SCALE).lse
    _, wanted = attention_reference.attention(q, k, v, read_mask(ranges, 40), scale=SCALE)
    torch.testing.assert_close(lse, wanted, rtol=1e-12, atol=1e-12)
    assert lse[0, :, :5].isposinf().all()


@interpreted
def test_packed_views_and_expanded_gradients_need_no_copies() -> None:
    ranges = text_ranges(40, 9)
    packed = torch.randn(2, 40, 3, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = packed.unbind(2)
    for grad_out in (torch.ones(16, dtype=torch.float64).expand_as(q), torch.ones((), dtype=torch.float64).expand_as(q), torch.randn_like(q)):
        assert_same(by_kernels([q, k, v, grad_out], ranges), by_definition([q, k, v, grad_out], read_mask(ranges, 40)))


@interpreted
def test_heads_may_stand_further_apart_than_32_bits_count() -> None:
    """As those of ``[B, N, S, H]`` do over a very long text. Only the pages that are touched take memory."""
    ranges, apart = text_ranges(20, 9), 2**30
    far_apart = torch.empty(2 * apart + 2**20, dtype=torch.float16)
    tensors = [torch.randn(2, 20, 3, 16, generator=torch.Generator().manual_seed(0)).half() for _ in range(4)]
    views = [far_apart[place * 2**16 :].as_strided((2, 20, 3, 16), (320, 16, apart, 1)) for place in range(4)]
    for view, tensor in zip(views, tensors, strict=True):
        view.copy_(tensor)
    for one, other in zip(by_kernels(views, ranges), by_kernels(tensors, ranges), strict=True):
        assert torch.equal(one, other)


@interpreted
@pytest.mark.parametrize("head_size", [1, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_torchs_own_attention(dtype: torch.dtype, head_size: int) -> None:
    ranges = text_ranges(70, 9)
    tensors = inputs(ranges, 70, heads=(1, 1), size=head_size, dtype=dtype)
    is_read = read_mask(ranges, 70)
    exact = by_definition([tensor.double() for tensor in tensors], is_read)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors[:3]]
    mask = torch.where(is_read[:, None], 0.0, -math.inf).to(dtype).masked_fill(~is_read.any(-1)[:, None, :, None], 0)
    out = scaled_dot_product_attention(*(leaf.transpose(1, 2) for leaf in leaves), attn_mask=mask, scale=SCALE).transpose(1, 2)
    out = out.masked_fill(~is_read.any(-1)[..., None, None], 0)
    theirs = [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]
    for name, truth, one, other in zip(NAMES, exact, by_kernels(tensors, ranges), theirs, strict=True):
        assert one.dtype == dtype
        error, allowed = ((result.double() - truth).abs().max().item() for result in (one, other))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * truth.abs().max().item(), name


@interpreted
@pytest.mark.parametrize(("softmax", "has_bias"), [("standard", False), ("standard", True), ("raw", False), ("normalised", True)])
def test_operator_keeps_torchs_rules(softmax: str, has_bias: bool) -> None:
    adjustment = ADJUSTMENTS[softmax]
    ranges = text_ranges(20, 5)
    q, k, v, _ = (tensor.requires_grad_() for tensor in inputs(ranges, 20))
    bias = Bias(torch.tensor([0.5, 0.1]).double(), *[torch.arange(20.0).expand(2, 20)] * 2) if has_bias else (None, None, None)
    of_tensors, numbers = (q, k, v, *tables(ranges, 20), *bias), (SCALE, *_numbers(adjustment))
    torch.library.opcheck(torch.ops.sepllm.sep_attention_triton.default, (*of_tensors, *numbers))
    results = torch.ops.sepllm.sep_attention_triton(*of_tensors, *numbers)
    leaves = tuple(None if tensor is None else tensor.detach() for tensor in (results[0], *of_tensors, *results))
    torch.library.opcheck(torch.ops.sepllm.sep_attention_triton_backward.default, (*leaves, *numbers))


@interpreted
@of_every_softmax
def test_gradients_are_those_of_the_function(softmax: str) -> None:
    adjustment = ADJUSTMENTS[softmax]
    ranges = text_ranges(9, 3)
    q, k, v, _ = (tensor.requires_grad_() for tensor in inputs(ranges, 9, size=3))
    known = tables(ranges, 9)
    assert torch.autograd.gradcheck(
        lambda *leaves: sep_attention_triton(*leaves, known, scale=SCALE, adjustment=adjustment), (q, k, v), fast_mode=True
    )


def test_head_too_large_and_scale_not_positive_are_refused() -> None:
    ranges = text_ranges(9, 3)
    with pytest.raises(ValueError, match="head size is 257"):
        sep_attention_triton(*inputs(ranges, 9, size=257)[:3], tables(ranges, 9), scale=SCALE)
    with pytest.raises(ValueError, match=r"scale is 0\.0"):
        sep_attention_triton(*inputs(ranges, 9)[:3], tables(ranges, 9), scale=0.0)


@pytest.mark.parametrize("seed", range(4))
def test_tables_name_the_readers_of_every_far_column_and_key(seed: int) -> None:
    ranges = any_ranges(seed, queries=30, keys=40)
    known = tables(ranges, 40)
    num_far = ranges.far_keys.shape[1]
    for row in range(3):
        for entry in range(num_far + 40):
            low, high = known.bounds[row, :2] if entry < num_far else known.bounds[row, 2:]
            readers = [t for t in range(30) if low[t] <= entry < high[t]]
            first, last = known.readers[row, :, entry].tolist()
            assert readers == list(range(first, last))
            key = int(ranges.far_keys[row, entry]) if entry < num_far else entry - num_far
            assert int(known.rows[row, entry]) == (key if readers else -1)
            if entry < num_far and readers:
                assert int(known.far_column[row, key]) == entry
        is_far_read = known.readers[row, 0, :num_far] < known.readers[row, 1, :num_far]
        assert int((known.far_column[row] >= 0).sum()) == int(is_far_read.sum())


def test_tables_are_made_without_looking_at_values() -> None:
    """Under fake tensors whatever would wait for a device raises."""
    ranges = any_ranges(0, queries=30, keys=40)
    with FakeTensorMode() as mode:
        known = tables(Ranges(*map(mode.from_tensor, ranges)), 40)
    assert known.readers.shape == (3, 2, known.rows.shape[1])


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), INTERPRETER], ids=str)
@pytest.mark.parametrize("head_size", [16, 64, 80, 128, 256])
def test_every_tile_is_one_that_tensor_cores_take(head_size: int, capability: tuple[int, int]) -> None:
    for dtype, adjusts in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        division = tiles(head_size, dtype, capability, adjusts=adjusts)
        for tile in (division.forward, division.queries, division.far, division.keys):
            assert {tile.queries, tile.keys} <= {16, 32, 64, 128}
            assert capability == INTERPRETER or tile.warps in (4, 8)


def cross_compiled(
    folder: Path, *, capability: int, head_size: int, dtype: str, has_bias: bool = False, group: int = 1, softmax: int = 0
) -> dict[str, dict[str, int]]:
    """Resources and instructions of each kernel."""
    arguments = [str(value) for value in (capability, head_size, dtype, int(has_bias), group, softmax)]
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    script = Path(__file__).with_name("cross_compile.py")
    done = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 4
    return {kernel.pop("kernel"): kernel for kernel in kernels}


def assert_resources(kernels: dict[str, dict[str, int]], *, capability: int, dtype: str, stack: int, adjusts: bool = False) -> None:
    """Tensor cores of the architecture but for exact float32, nothing but a few words spilled, no atomics, shared memory that is there.
    ``adjusts``: tiles may be too small for the newest of them."""
    instruction = {80: "mma.sync", 90: "wgmma.mma_async"}[capability]
    for name, kernel in kernels.items():
        assert kernel["local"] == 0, name
        assert kernel["stack"] <= stack, (name, kernel["stack"])
        assert kernel["shared"] <= {80: 163, 90: 227}[capability] * 1024, name
        assert kernel["atomics"] == 0, name
        if dtype == "float32":
            assert not kernel["tf32"] + kernel["mma.sync"] + kernel["wgmma.mma_async"], name
        else:
            assert kernel[instruction] or (adjusts and kernel["mma.sync"]), name
            assert kernel["cp.async.cg"], name


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_a_gpu_and_keep_their_registers(capability: int, tmp_path: Path) -> None:
    kernels = cross_compiled(tmp_path, capability=capability, head_size=64, dtype="bfloat16")
    assert_resources(kernels, capability=capability, dtype="bfloat16", stack=0 if capability == 90 else 64)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("softmax", [RAW.value, NORMALISED.value])
@pytest.mark.parametrize(
    ("head_size", "dtype"), [(64, "bfloat16"), (80, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (64, "float32"), (128, "float32")]
)
def test_kernels_of_the_self_adjust_softmax_compile(capability: int, softmax: int, head_size: int, dtype: str, tmp_path: Path) -> None:
    kernels = cross_compiled(tmp_path, capability=capability, head_size=head_size, dtype=dtype, softmax=softmax)
    assert_resources(kernels, capability=capability, dtype=dtype, stack=64, adjusts=True)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("head_size", "dtype", "has_bias", "group", "stack"),
    [
        (32, "bfloat16", False, 1, 0),
        (64, "float16", False, 1, 64),
        (64, "bfloat16", True, 1, 64),
        (64, "bfloat16", False, 4, 128),
        (80, "bfloat16", False, 1, 128),
        (128, "bfloat16", False, 1, 64),
        (256, "bfloat16", False, 1, 160),
        (64, "float32", False, 1, 64),
        (128, "float32", False, 1, 160),
        (256, "float32", False, 1, 64),
    ],
)
def test_every_kind_of_kernel_compiles(capability: int, head_size: int, dtype: str, has_bias: bool, group: int, stack: int, tmp_path: Path) -> None:
    kernels = cross_compiled(tmp_path, capability=capability, head_size=head_size, dtype=dtype, has_bias=has_bias, group=group)
    assert_resources(kernels, capability=capability, dtype=dtype, stack=stack)

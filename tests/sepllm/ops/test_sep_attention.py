"""The C++ operator against its definition in plain torch, as an operator of torch, and against what it must refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sepllm.layout import KeyRanges, TokenLayout
from sepllm.ops.attention_reference import Adjustment, Bias
from sepllm.ops.sep_attention import NORMALISED, RAW, STANDARD, Ranges, register, sep_attention
from sepllm.pattern import AttentionPattern


def text_ranges(length: int, window: int, *, batch: int = 3) -> KeyRanges:
    """One row with some separators, one with none, then others with many."""
    torch.manual_seed(length)
    density = torch.tensor([0.16, 0.0, *[0.4] * (batch - 2)])[:batch, None]
    ids = torch.where(torch.rand(batch, length) < density, 1, 9)
    return TokenLayout.from_ids(ids, AttentionPattern(initial_tokens=3, separator_ids=(1,), windows=(window,))).ranges(0)


def bounds(ranges: KeyRanges) -> Ranges:
    return Ranges(ranges.index, ranges.far_lo, ranges.far_hi, ranges.band_lo, ranges.band_hi)


def inputs(ranges: KeyRanges, *, heads: tuple[int, int] = (4, 2), head_size: int = 16, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    batch, queries = ranges.band_lo.shape
    torch.manual_seed(0)
    shapes = ((batch, queries, heads[0], head_size), *[(batch, ranges.num_keys, heads[1], head_size)] * 2)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def gradients(impl: str, tensors: list[Tensor], ranges: KeyRanges, grad_out: Tensor) -> list[Tensor]:
    out, _ = sep_attention(*tensors, bounds(ranges), scale=0.3, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad_out)]


@pytest.mark.parametrize("head_size", [1, 5, 8, 32, 64, 80, 128, 256])
def test_any_head_size_is_the_definition(head_size: int) -> None:
    ranges = text_ranges(150, 20)
    tensors = inputs(ranges, head_size=head_size)
    grad_out = torch.randn_like(tensors[0])
    for name, ours, wanted in zip(
        ("out", "dq", "dk", "dv"), gradients("native", tensors, ranges, grad_out), gradients("reference", tensors, ranges, grad_out), strict=True
    ):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_logarithm_of_the_sums_is_in_base_two() -> None:
    ranges = text_ranges(100, 10)
    tensors = inputs(ranges)
    ours, wanted = (sep_attention(*tensors, bounds(ranges), scale=0.3, impl=impl)[1] for impl in ("native", "reference"))
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [300, 2048])
def test_segments_of_many_threads_give_what_one_thread_gives(length: int) -> None:
    """One row and one head, so that the threads share its queries: the sums over segments differ in rounding only."""
    ranges = text_ranges(length, 64, batch=1)
    tensors = inputs(ranges, heads=(1, 1), head_size=8)
    grad_out = torch.randn_like(tensors[0])
    threads = torch.get_num_threads()
    try:
        results = {}
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results[count] = gradients("native", tensors, ranges, grad_out)
            again = gradients("native", tensors, ranges, grad_out)
            assert all(torch.equal(one, other) for one, other in zip(results[count], again, strict=True))
    finally:
        torch.set_num_threads(threads)
    for count in (2, 5):
        for one, other in zip(results[1], results[count], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_views_of_packed_projections_are_read_in_place() -> None:
    ranges = text_ranges(70, 10)
    packed = torch.randn(3, 70, 4, 3 * 16, dtype=torch.float64)
    views = [part.detach().requires_grad_() for part in packed.chunk(3, -1)]
    copies = [view.detach().contiguous().requires_grad_() for view in views]
    grad_out = torch.ones(3, 70, 1, 1, dtype=torch.float64).expand(3, 70, 4, 16)
    assert not views[0].is_contiguous()
    for ours, wanted in zip(gradients("native", views, ranges, grad_out), gradients("native", copies, ranges, grad_out), strict=True):
        assert torch.equal(ours, wanted)


def test_bounds_may_be_views() -> None:
    """A kernel that took raw pointers of strided indices would read other rows' bounds."""
    ranges = text_ranges(70, 10)
    tensors = inputs(ranges)
    strided = [torch.stack([bound, torch.full_like(bound, 7)], -1)[..., 0] for bound in bounds(ranges)]
    assert not strided[0].is_contiguous()
    expected = sep_attention(*tensors, bounds(ranges), scale=0.3)[0]
    assert torch.equal(sep_attention(*tensors, Ranges(*strided), scale=0.3)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torchs_attention(dtype: torch.dtype) -> None:
    ranges = text_ranges(600, 64, batch=2)
    tensors = inputs(ranges, heads=(2, 2), head_size=64, dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    grad_out = torch.randn(tensors[0].shape, dtype=torch.float64).to(dtype)
    wanted = gradients("reference", exact, ranges, grad_out.double())
    ours = gradients("native", tensors, ranges, grad_out)
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors), attn_mask=ranges.dense()[:, None], scale=0.3)
    torchs = [out.transpose(1, 2).detach(), *torch.autograd.grad(out, tensors, grad_out.transpose(1, 2))]
    for name, exactly, theirs, mine in zip(("out", "dq", "dk", "dv"), wanted, torchs, ours, strict=True):
        error, allowed = ((result.double() - exactly).abs().max().item() for result in (mine, theirs))
        assert error <= 2 * allowed, (name, error, allowed)


def test_fresh_memory_of_any_content_never_shows() -> None:
    ranges = text_ranges(100, 10)
    tensors = inputs(ranges, dtype=torch.float32)
    grad_out = torch.randn_like(tensors[0])
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        assert torch.empty(8).isnan().all()
        poisoned = gradients("native", tensors, ranges, grad_out)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(poisoned, gradients("native", tensors, ranges, grad_out), strict=True))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_that_is_read_shows(which: int) -> None:
    """A run that diverges must be seen to diverge."""
    ranges = text_ranges(100, 10)
    tensors = [tensor.detach() for tensor in inputs(ranges, dtype=torch.float32)]
    tensors[which][:, 50] = torch.nan
    out, _ = sep_attention(*tensors, bounds(ranges), scale=0.3)
    assert out[:, 50].isnan().all()


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
def test_scores_of_any_magnitude_are_softened_without_overflow(magnitude: float) -> None:
    ranges = text_ranges(100, 10)
    tensors = [tensor.detach() * magnitude for tensor in inputs(ranges, dtype=torch.float32)]
    ours, wanted = (sep_attention(*tensors, bounds(ranges), scale=1.0, impl=impl)[0] for impl in ("native", "reference"))
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3 * magnitude)


def test_gradient_is_that_of_finite_differences() -> None:
    ranges = text_ranges(24, 4)
    tensors = inputs(ranges, heads=(2, 1), head_size=3)
    assert torch.autograd.gradcheck(lambda q, k, v: sep_attention(q, k, v, bounds(ranges), scale=0.5)[0], tensors)


@pytest.mark.parametrize("has_bias", [False, True])
def test_operator_keeps_torchs_rules(has_bias: bool) -> None:
    register()
    ranges = text_ranges(24, 4)
    positions = torch.arange(24).expand(3, 24)
    bias = (torch.tensor([0.5, 0.25, 0.1, 0.0]), positions, positions) if has_bias else (None, None, None)
    torch.library.opcheck(torch.ops.sepllm.sep_attention.default, (*inputs(ranges), *bounds(ranges), *bias, None, None, 0.3, STANDARD, 0.0, 0.0))


def test_bias_is_added_to_the_scores() -> None:
    ranges = text_ranges(90, 10)
    tensors = inputs(ranges)
    positions = torch.arange(90).expand(3, 90)
    bias = Bias(torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64), positions, positions)
    ours, wanted = (sep_attention(*tensors, bounds(ranges), scale=0.3, bias=bias, impl=impl)[0] for impl in ("native", "reference"))
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"far_hi": 99}, "far has a value outside 0 .. "),
        ({"band_hi": 99}, "band has a value outside 0 .. "),
        ({"far_keys": 24}, "index has a value outside 0 .. 23"),
        ({"band_lo": "falling"}, "The band bounds must not decrease with the query"),
        ({"far_lo": "long"}, "Bounds must be int32"),
    ],
)
def test_bounds_that_would_leave_the_memory_are_refused(change: dict[str, object], message: str) -> None:
    ranges = text_ranges(24, 4)
    named = bounds(ranges)._asdict()
    for name, value in change.items():
        if value == "falling":
            named[name] = torch.arange(23, -1, -1, dtype=torch.int32).expand(3, 24)
        elif value == "long":
            named[name] = named[name].long()
        else:
            named[name] = torch.full_like(named[name], value)
    with pytest.raises(ValueError, match=message):
        sep_attention(*inputs(ranges), Ranges(**named), scale=0.3)


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    ranges = text_ranges(24, 4)
    q, k, v = inputs(ranges)
    with pytest.raises(ValueError, match="one dtype"):
        sep_attention(q, k.float(), v, bounds(ranges), scale=0.3)
    with pytest.raises(ValueError, match="they must be"):
        sep_attention(q[..., :3], k, v, bounds(ranges), scale=0.3)
    with pytest.raises(ValueError, match="impl is 'fast'"):
        sep_attention(q, k, v, bounds(ranges), scale=0.3, impl="fast")


def test_query_that_reads_nothing_gives_zero_and_an_infinite_logarithm() -> None:
    ranges = text_ranges(24, 4)
    nothing = [torch.zeros_like(bound) for bound in bounds(ranges)[1:]]
    out, lse = sep_attention(*inputs(ranges), Ranges(ranges.index, *nothing), scale=0.3)
    assert not out.any()
    assert (lse == math.inf).all()


# --- self-adjust softmax ---

ADJUSTMENTS = {
    "raw": Adjustment(is_normalised=False),
    "normalised": Adjustment(is_normalised=True, numerator_bias=1e-3, denominator_bias=1e-2),
    "without biases": Adjustment(is_normalised=True),
}


def causal_extremes(ranges: KeyRanges) -> tuple[Tensor, Tensor]:
    length = ranges.num_keys
    hi = torch.arange(1, length + 1, dtype=torch.int32).expand(ranges.band_lo.shape)
    return torch.zeros_like(hi), hi


@pytest.mark.parametrize("over_causal_keys", [False, True])
@pytest.mark.parametrize("kind", list(ADJUSTMENTS))
@pytest.mark.parametrize("length", [1, 2, 65, 150])
@pytest.mark.parametrize("sign", [0, 1, -1], ids=["scores of both signs", "all positive", "all negative"])
def test_self_adjust_is_the_definition(kind: str, length: int, over_causal_keys: bool, sign: int) -> None:
    ranges = text_ranges(length, 20)
    tensors = inputs(ranges, head_size=8)
    if sign:
        tensors = [tensors[0].detach().abs().add(0.1).requires_grad_(), (sign * tensors[1].detach().abs()).requires_grad_(), tensors[2]]
    adjustment = replace(ADJUSTMENTS[kind], extremes=causal_extremes(ranges) if over_causal_keys else None)
    positions = torch.arange(length).expand(3, length)
    bias = Bias(torch.tensor([0.01, 0.002, 0.0, 0.0], dtype=torch.float64), positions, positions)
    grad_out = torch.randn_like(tensors[0])
    results = {}
    for impl in ("native", "reference"):
        out, _ = sep_attention(*tensors, bounds(ranges), scale=0.3, bias=bias, adjustment=adjustment, impl=impl)
        results[impl] = [out, *torch.autograd.grad(out, tensors, grad_out)]
    for name, ours, wanted in zip(("out", "dq", "dk", "dv"), results["native"], results["reference"], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", list(ADJUSTMENTS))
def test_gradient_of_self_adjust_is_that_of_finite_differences(kind: str) -> None:
    ranges = text_ranges(20, 4)
    tensors = inputs(ranges, heads=(2, 1), head_size=3)
    adjustment = replace(ADJUSTMENTS[kind], denominator_bias=0.01)
    assert torch.autograd.gradcheck(lambda q, k, v: sep_attention(q, k, v, bounds(ranges), scale=0.5, adjustment=adjustment)[0], tensors)


@pytest.mark.parametrize("softmax", [RAW, NORMALISED])
def test_self_adjust_operator_keeps_torchs_rules(softmax: int) -> None:
    register()
    ranges = text_ranges(24, 4)
    arguments = (*inputs(ranges), *bounds(ranges), None, None, None, *causal_extremes(ranges), 0.3, softmax, 0.1, 0.2)
    torch.library.opcheck(torch.ops.sepllm.sep_attention.default, arguments)


def test_equal_extremes_give_their_gradient_to_the_first_key() -> None:
    ranges = text_ranges(12, 12, batch=1)
    q, _, v = inputs(ranges, heads=(1, 1), head_size=2)
    k = torch.ones(1, 12, 1, 2, dtype=torch.float64, requires_grad=True)
    adjustment = Adjustment(is_normalised=True, denominator_bias=0.5)
    out, _ = sep_attention(q, k, v, bounds(ranges), scale=1.0, adjustment=adjustment)
    reference, _ = sep_attention(q, k, v, bounds(ranges), scale=1.0, adjustment=adjustment, impl="reference")
    grad_out = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, k, grad_out)[0], torch.autograd.grad(reference, k, grad_out)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_self_adjust_in_low_precision_errs_at_most_twice_as_much_as_its_dense_form(dtype: torch.dtype) -> None:
    """On average: queries of one or two keys cancel terms of size 1 / (M - m), so that single errors are a matter of luck in any form."""
    ranges = text_ranges(300, 64, batch=2)
    tensors = inputs(ranges, heads=(2, 2), head_size=64, dtype=dtype)
    adjustment = Adjustment(is_normalised=True, denominator_bias=1e-7)
    grad_out = torch.randn(tensors[0].shape, dtype=torch.float64).to(dtype)
    results = {}
    for name, impl, at in (("exact", "reference", torch.float64), ("dense", "reference", dtype), ("ours", "native", dtype)):
        leaves = [tensor.detach().to(at).requires_grad_() for tensor in tensors]
        out, _ = sep_attention(*leaves, bounds(ranges), scale=0.125, adjustment=adjustment, impl=impl)
        results[name] = [out.double(), *(gradient.double() for gradient in torch.autograd.grad(out, leaves, grad_out.to(at)))]
    for name, exact, dense, ours in zip(("out", "dq", "dk", "dv"), *results.values(), strict=True):
        assert (ours - exact).abs().mean() <= 2 * (dense - exact).abs().mean(), name

"""Masked softmax against its plain form, as an operator of torch, and where nothing is read."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sepllm.ops.masked_softmax import masked_softmax, register

SCALE = 0.3


def inputs(
    keys: int, *, batch: int = 2, heads: int = 3, mask_heads: int = 1, queries: int = 9, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries 0 and 4 of each head read nothing."""
    generator = torch.Generator().manual_seed(keys)
    scores, grad = (torch.randn(batch, heads, queries, keys, generator=generator, dtype=torch.float64) * size for size in (5, 1))
    is_read = torch.rand(batch, mask_heads, queries, keys, generator=generator) < 0.6
    is_read[:, :, ::4] = False
    return scores.to(dtype), is_read, grad.to(dtype)


def results(scores: Tensor, is_read: Tensor, grad: Tensor, *, impl: str = "native") -> dict[str, Tensor]:
    leaf = scores.detach().requires_grad_()
    weights = masked_softmax(leaf, is_read, scale=SCALE, impl=impl)
    return {"weights": weights.detach(), "gradient": torch.autograd.grad(weights, leaf, grad)[0]}


@pytest.mark.parametrize("mask_heads", [1, 3])
@pytest.mark.parametrize("keys", [1, 7, 8, 16, 17, 100, 1000])
def test_weights_and_gradient_are_those_of_the_plain_form(keys: int, mask_heads: int) -> None:
    given = inputs(keys, mask_heads=mask_heads)
    ours, wanted = results(*given), results(*given, impl="reference")
    for name in wanted:
        torch.testing.assert_close(ours[name], wanted[name], rtol=1e-11, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")
    assert not ours["weights"][:, :, ::4].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_the_plain_form(dtype: torch.dtype) -> None:
    scores, is_read, grad = inputs(333, dtype=dtype)
    truth = results(scores.double(), is_read, grad.double(), impl="reference")
    ours, theirs = (results(scores, is_read, grad, impl=impl) for impl in ("native", "reference"))
    for name, wanted in truth.items():
        assert ours[name].dtype == dtype
        error, allowed = ((result[name].double() - wanted).abs().max().item() for result in (ours, theirs))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * wanted.abs().max().item(), (name, error, allowed)


def test_what_is_not_read_never_shows() -> None:
    scores, is_read, grad = inputs(100)
    wanted = results(scores, is_read, grad)
    everywhere = is_read.expand_as(scores)
    for poison in (torch.nan, torch.inf):
        ours = results(scores.masked_fill(~everywhere, poison), is_read, grad.masked_fill(~everywhere, poison))
        assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_nan_that_is_read_shows() -> None:
    scores, is_read, grad = inputs(100)
    is_read[:, :, 1, 40] = True
    scores[:, :, 1, 40] = torch.nan
    weights = results(scores, is_read, grad)["weights"]
    assert weights[:, :, 1].isnan().any(-1).all()
    assert not weights[:, :, 2:].isnan().any()


def test_huge_scores_do_not_overflow() -> None:
    scores, is_read, grad = inputs(50, dtype=torch.float32)
    ours, wanted = (results(scores * 1e30, is_read, grad, impl=impl) for impl in ("native", "reference"))
    torch.testing.assert_close(ours["weights"], wanted["weights"])


def test_no_keys_and_no_queries_are_no_weights() -> None:
    for shape in ((1, 2, 3, 0), (1, 2, 0, 3), (0, 2, 3, 3)):
        assert masked_softmax(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), impl="native").shape == shape


def test_views_are_what_their_copies_are() -> None:
    scores, is_read, grad = inputs(20)
    views = (scores.transpose(2, 3).contiguous().transpose(2, 3), is_read.transpose(2, 3).contiguous().transpose(2, 3), grad[:1].expand_as(grad))
    ours, wanted = (results(*given) for given in (views, [view.clone(memory_format=torch.contiguous_format) for view in views]))
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    shared = is_read[:1].expand_as(is_read)
    assert torch.equal(results(scores, shared, grad)["weights"], results(scores, shared.contiguous(), grad)["weights"])


def test_bits_do_not_depend_on_threads_or_on_what_memory_held() -> None:
    given = inputs(1000, queries=40, dtype=torch.float32)
    wanted = results(*given)
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            ours = results(*given)
            assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def test_gradient_is_that_of_finite_differences() -> None:
    scores, is_read, _ = inputs(5, queries=3)
    assert torch.autograd.gradcheck(lambda scores: masked_softmax(scores, is_read, scale=SCALE, impl="native"), scores.requires_grad_())


def test_gradient_of_the_gradient_is_that_of_finite_differences() -> None:
    scores, is_read, grad = inputs(5, queries=3)
    leaves = (scores.requires_grad_(), grad.requires_grad_())
    poisoned = torch.where(is_read, 0.0, torch.nan)  # what gradients hold where nothing is read does not matter there either
    assert torch.autograd.gradgradcheck(lambda scores: masked_softmax(scores, is_read, scale=SCALE, impl="native"), *[(leaf,) for leaf in leaves])
    weights = masked_softmax(scores, is_read, scale=SCALE, impl="native")
    (gradient,) = torch.autograd.grad(weights, scores, grad.detach() + poisoned, create_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(weights, scores, grad, create_graph=True)[0])
    assert torch.autograd.grad(gradient.square().sum(), scores)[0].isfinite().all()


def test_operators_keep_torchs_rules() -> None:
    register()
    scores, is_read, grad = inputs(5)
    torch.library.opcheck(torch.ops.sepllm.masked_softmax.default, (scores.requires_grad_(), is_read, SCALE))
    torch.library.opcheck(torch.ops.sepllm.masked_softmax_backward.default, (grad, scores.detach().softmax(-1), SCALE))


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_compiles_into_one_graph(impl: str) -> None:
    torch.compiler.reset()
    scores, is_read, grad = inputs(5)
    wanted = results(scores, is_read, grad, impl="reference")
    scores.requires_grad_()
    compiled = torch.compile(lambda scores: masked_softmax(scores, is_read, scale=SCALE, impl=impl), fullgraph=True, backend="aot_eager")
    weights = compiled(scores)
    torch.testing.assert_close(weights, wanted["weights"])
    torch.testing.assert_close(torch.autograd.grad(weights, scores, grad)[0], wanted["gradient"])


def test_what_does_not_fit_is_refused() -> None:
    scores, is_read, _ = inputs(5)
    for mask in (is_read.float(), is_read[..., :4], is_read.expand(2, 3, 9, 5)[:, :2], is_read[0]):
        with pytest.raises(ValueError, match=r"they must be \[B, N, T, S\] and Bool \[B, 1 or N, T, S\]"):
            masked_softmax(scores, mask, impl="native")
    with pytest.raises(ValueError, match="scores must be float32, float64, bfloat16 or float16, but is Int"):
        masked_softmax(scores.int(), is_read, impl="native")


HOST = """
#include "masked_softmax_math.h"
using namespace sepllm;

extern "C" void forward(const float* x, const bool* is_read, int64_t count, float scale, float* to) {
  RowSum<float> sum = empty_sum<float>();
  for (int64_t i = 0; i < count; ++i) {
    const float one[1] = {score_of(x[i], is_read[i], scale)};
    sum = added(sum, one);
  }
  for (int64_t i = 0; i < count; ++i) to[i] = probability_of(score_of(x[i], is_read[i], scale), sum);
}

extern "C" void backward(const float* p, const float* dp, int64_t count, float scale, float* to) {
  float shares = 0;
  for (int64_t i = 0; i < count; ++i) shares += share_of(p[i], dp[i]);
  for (int64_t i = 0; i < count; ++i) to[i] = score_gradient(p[i], dp[i], shares, scale);
}
"""


def test_arithmetic_of_the_cuda_kernels_is_that_of_the_plain_form(host_library: Callable[[str], ctypes.CDLL]) -> None:
    library = host_library(HOST)
    scores, is_read, grad = inputs(100, batch=1, heads=1, dtype=torch.float32)
    wanted = results(scores, is_read, grad, impl="reference")
    scores, grad = (tensor.masked_fill(~is_read, torch.nan) for tensor in (scores, grad))
    weights, gradient = torch.empty_like(scores), torch.empty_like(scores)
    size = (ctypes.c_int64(100), ctypes.c_float(SCALE))
    for query in range(9):
        at = [ctypes.c_void_p(tensor[0, 0, query].data_ptr()) for tensor in (scores, is_read, grad, weights, gradient)]
        library.forward(at[0], at[1], *size, at[3])
        library.backward(at[3], at[2], *size, at[4])
    torch.testing.assert_close(weights, wanted["weights"])
    torch.testing.assert_close(gradient, wanted["gradient"])

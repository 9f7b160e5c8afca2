"""Bias + GELU against torch's own in float64, as an operator of torch, and by the error that it has far from zero."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sepllm.ops.gelu import Approximate, bias_gelu, gelu_linear, register

both_kinds = pytest.mark.parametrize("approximate", get_args(Approximate))


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x, bias, grad_out = (torch.randn(size, generator=generator, dtype=torch.float64) * 2 for size in (shape, shape[-1:], shape))
    return x.to(dtype), bias.to(dtype), grad_out.to(dtype)


def results(x: Tensor, bias: Tensor | None, grad_out: Tensor, *, approximate: Approximate, impl: str = "native") -> dict[str, Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (x, bias) if tensor is not None]
    out = bias_gelu(leaves[0], leaves[1] if bias is not None else None, approximate=approximate, impl=impl)
    return {"out": out.detach(), **dict(zip(("dx", "dbias"), torch.autograd.grad(out, leaves, grad_out), strict=False))}


def exact(x: Tensor, bias: Tensor | None, grad_out: Tensor, *, approximate: Approximate) -> dict[str, Tensor]:
    wide = [tensor.double() if tensor is not None else None for tensor in (x, bias, grad_out)]
    return results(*wide, approximate=approximate, impl="reference")


@both_kinds
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 16), (65, 33), (200, 100), (0, 8), (40000,)], ids=str)
def test_output_and_gradients_are_torchs(shape: tuple[int, ...], has_bias: bool, approximate: Approximate) -> None:
    x, bias, grad_out = inputs(*shape)
    given = (x, bias if has_bias else None, grad_out)
    ours, wanted = results(*given, approximate=approximate), results(*given, approximate=approximate, impl="reference")
    assert ours.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(ours[name], wanted[name], rtol=1e-12, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


@both_kinds
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_torchs(dtype: torch.dtype, has_bias: bool, approximate: Approximate) -> None:
    x, bias, grad_out = inputs(300, 129, dtype=dtype)
    given = (x, bias if has_bias else None, grad_out)
    truth = exact(*given, approximate=approximate)
    ours, theirs = (results(*given, approximate=approximate, impl=impl) for impl in ("native", "reference"))
    for name, wanted in truth.items():
        assert ours[name].dtype == dtype
        error, allowed = ((result[name].double() - wanted).abs().max().item() for result in (ours, theirs))
        assert error <= 2 * allowed, (name, error, allowed)


@both_kinds
def test_relative_error_is_small_for_negative_inputs_too(approximate: Approximate) -> None:
    """Torch's 1 + erf and 1 + tanh lose all digits there."""
    x = torch.linspace(-9, 9, 20001)
    truth = exact(x, None, torch.ones_like(x), approximate=approximate)["out"]
    if approximate == "tanh":  # torch's is not exact there even in float64
        wide = x.double()
        truth = wide * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))
    else:
        truth = x.double() * 0.5 * torch.special.erfc(-x.double() * 0.5**0.5)
    is_normal = truth.abs() > 1e-37
    ours = bias_gelu(x, None, approximate=approximate, impl="native").double()
    assert ((ours - truth).abs() / truth.abs())[is_normal & (x < 0)].max() < 2e-5
    assert ((ours - truth).abs() / truth.abs())[x > 0].max() < 4e-7


@both_kinds
def test_huge_inputs_pass_or_vanish_and_nan_shows(approximate: Approximate) -> None:
    x = torch.tensor([-1e30, -1e4, -200.0, -20.0, 0.0, 20.0, 200.0, 1e4, 1e30, torch.nan])
    out = bias_gelu(x, None, approximate=approximate, impl="native")
    torch.testing.assert_close(out[:9], functional.relu(x[:9]), atol=1e-7 if approximate == "none" else 1e-6, rtol=0)
    assert out[9].isnan()


def test_bits_do_not_depend_on_threads_or_on_what_memory_held() -> None:
    x, bias, grad_out = inputs(1000, 65, dtype=torch.float32)
    wanted = results(x, bias, grad_out, approximate="tanh")
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            ours = results(x, bias, grad_out, approximate="tanh")
            assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def test_views_are_what_their_copies_are() -> None:
    x, bias, grad_out = inputs(20, 30)
    views = (x.t().contiguous().t(), torch.stack([bias, bias], 1)[:, 0], grad_out[:1].expand(20, 30))
    ours, wanted = (results(*given, approximate="none") for given in (views, [view.clone() for view in views]))
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


@both_kinds
def test_gradient_is_that_of_finite_differences(approximate: Approximate) -> None:
    x, bias, _ = inputs(3, 5)
    assert torch.autograd.gradcheck(lambda x, bias: bias_gelu(x, bias, approximate=approximate), (x.requires_grad_(), bias.requires_grad_()))


@pytest.mark.parametrize("has_bias", [True, False])
def test_operators_keep_torchs_rules(has_bias: bool) -> None:
    register()
    x, bias, grad_out = inputs(3, 5)
    given = bias.requires_grad_() if has_bias else None
    torch.library.opcheck(torch.ops.sepllm.bias_gelu.default, (x.requires_grad_(), given, True))
    torch.library.opcheck(torch.ops.sepllm.bias_gelu_backward.default, (grad_out, x.detach(), bias.detach() if has_bias else None, True))


def test_second_derivative_is_refused() -> None:
    x, bias, _ = inputs(3, 5)
    for out in (
        bias_gelu(x.requires_grad_(), bias, approximate="tanh", impl="native"),
        gelu_linear(x, torch.ones(2, 5).double(), None, approximate="tanh"),
    ):
        with pytest.raises(ValueError, match=r"gelu.* has no second derivative: leave create_graph out"):
            torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_compiles_into_one_graph(impl: str) -> None:
    torch.compiler.reset()
    x, bias, grad_out = inputs(4, 8)
    wanted = results(x, bias, grad_out, approximate="tanh", impl="reference")
    leaves = x.requires_grad_(), bias.requires_grad_()
    out = torch.compile(lambda x, bias: bias_gelu(x, bias, approximate="tanh", impl=impl), fullgraph=True, backend="aot_eager")(*leaves)
    for ours, name in zip((out, *torch.autograd.grad(out, leaves, grad_out)), wanted, strict=True):
        torch.testing.assert_close(ours, wanted[name])


def test_what_does_not_fit_is_refused() -> None:
    x, bias, _ = inputs(3, 5)
    with pytest.raises(ValueError, match=r"bias \[4\] Double on cpu must be Double on cpu of the last axis of x \[3, 5\]"):
        bias_gelu(x, bias[:4], approximate="none", impl="native")
    with pytest.raises(ValueError, match=r"bias .* must be Double"):
        bias_gelu(x, bias.float(), approximate="none", impl="native")
    with pytest.raises(ValueError, match="approximate is 'sigmoid': use tanh or none"):
        bias_gelu(x, bias, approximate="sigmoid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x must be float32, float64, bfloat16 or float16, but is Long"):
        bias_gelu(x.long(), None, approximate="none", impl="native")


HOST = """
#include "gelu_math.h"
extern "C" float gelu_of(float x, bool is_tanh) { return sepllm::gelu(x, is_tanh); }
extern "C" float slope_of(float x, bool is_tanh) { return sepllm::gelu_slope(x, is_tanh); }
"""


@both_kinds
def test_arithmetic_of_the_cuda_kernels_is_torchs(approximate: Approximate, host_library: Callable[[str], ctypes.CDLL]) -> None:
    library = host_library(HOST)
    x = torch.cat([torch.linspace(-6, 6, 101), torch.tensor([-1e4, 1e4])])
    wanted = exact(x, None, torch.ones_like(x), approximate=approximate)
    for function, name in ((library.gelu_of, "out"), (library.slope_of, "dx")):
        function.restype = ctypes.c_float
        ours = torch.tensor([function(ctypes.c_float(value), ctypes.c_bool(approximate == "tanh")) for value in x.tolist()])
        torch.testing.assert_close(ours.double(), wanted[name], rtol=1e-5, atol=1e-7)


def linear_inputs(*shape: int, has_bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(len(shape))
    x, weight, bias = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, (5, shape[-1]), (5,)))
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_() if has_bias else None


@both_kinds
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 8), (2, 4, 8), (0, 8)], ids=str)
def test_a_linear_after_gelu_is_torchs(shape: tuple[int, ...], has_bias: bool, approximate: Approximate) -> None:
    x, weight, bias = linear_inputs(*shape, has_bias=has_bias)
    ours, wanted = gelu_linear(x, weight, bias, approximate=approximate), functional.linear(functional.gelu(x, approximate=approximate), weight, bias)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-13)
    leaves, grad_out = [leaf for leaf in (x, weight, bias) if leaf is not None], torch.randn_like(wanted)
    for got, expected in zip(torch.autograd.grad(ours, leaves, grad_out), torch.autograd.grad(wanted, leaves, grad_out), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@both_kinds
def test_a_linear_after_gelu_keeps_its_input_alone(approximate: Approximate) -> None:
    x, weight, bias = linear_inputs(64, 8, has_bias=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        gelu_linear(x, weight, bias, approximate=approximate)
    assert sum(tensor.numel() for tensor in kept) == x.numel() + weight.numel()


@both_kinds
def test_a_linear_after_gelu_passes_gradcheck_and_compiles(approximate: Approximate) -> None:
    x, weight, bias = linear_inputs(3, 8, has_bias=True)
    assert torch.autograd.gradcheck(lambda *given: gelu_linear(*given, approximate=approximate), (x, weight, bias))
    compiled = torch.compile(lambda *given: gelu_linear(*given, approximate=approximate), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), gelu_linear(x, weight, bias, approximate=approximate), rtol=1e-12, atol=1e-13)

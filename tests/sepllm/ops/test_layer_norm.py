"""Layer norms, one and two of one input: against their definition, as operators of torch, and against what they must refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sepllm.ops.choice import Impl
from sepllm.ops.layer_norm import Affine, layer_norm, register, two_layer_norms

NAMES = ("first", "second", "dx", "dw1", "db1", "dw2", "db2")


def inputs(*shape: int, dtype: torch.dtype = torch.float64, of_parameters: torch.dtype | None = None) -> list[Tensor]:
    """x with a mean and a deviation, then two weights and biases in turn."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) * 2 + 1
    parameters = [torch.randn(shape[-1], dtype=torch.float64) for _ in range(4)]
    return [x.to(dtype).requires_grad_(), *(parameter.to(of_parameters or dtype).requires_grad_() for parameter in parameters)]


def two(x: Tensor, *parameters: Tensor, impl: Impl = "native") -> tuple[Tensor, Tensor]:
    return two_layer_norms(x, Affine(*parameters[:2]), Affine(*parameters[2:]), epsilon=1e-5, impl=impl)


def outputs_and_gradients(tensors: list[Tensor], *, impl: Impl) -> list[Tensor]:
    outs = two(*tensors, impl=impl)
    torch.manual_seed(1)
    grads = [torch.randn(out.shape, dtype=torch.float64).to(out.dtype) for out in outs]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, tensors, grads)]


@pytest.mark.parametrize("rows", [0, 1, 63, 130])
@pytest.mark.parametrize("size", [1, 7, 80, 768, 1000])
def test_any_size_is_the_definition(rows: int, size: int) -> None:
    tensors = inputs(2, rows, size)
    ours, wanted = (outputs_and_gradients(tensors, impl=impl) for impl in ("native", "reference"))
    for name, one, other in zip(NAMES, ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_single_norm_is_torchs() -> None:
    x, weight, bias, *_ = inputs(5, 6, 70)
    ours, wanted = (layer_norm(x, weight, bias, epsilon=1e-3, impl="native"), torch.nn.functional.layer_norm(x, (70,), weight, bias, 1e-3))
    torch.testing.assert_close(ours, wanted)
    grad = torch.randn_like(ours)
    for one, other in zip(*(torch.autograd.grad(out, (x, weight, bias), grad) for out in (ours, wanted)), strict=True):
        torch.testing.assert_close(one, other)


def test_two_norms_with_the_same_weights_give_the_same_bits_as_one() -> None:
    x, weight, bias, *_ = inputs(3, 100, dtype=torch.float32)
    first, second = two(x, weight, bias, weight, bias)
    assert torch.equal(first, second)
    assert torch.equal(first, layer_norm(x, weight, bias, epsilon=1e-5, impl="native"))


@pytest.mark.parametrize("has_wide_parameters", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_torch(dtype: torch.dtype, has_wide_parameters: bool) -> None:
    tensors = inputs(300, 768, dtype=dtype, of_parameters=torch.float32 if has_wide_parameters else None)
    exact = outputs_and_gradients([tensor.detach().double().requires_grad_() for tensor in tensors], impl="reference")
    results = (outputs_and_gradients(tensors, impl=impl) for impl in ("native", "reference"))
    for name, exactly, mine, theirs in zip(NAMES, exact, *results, strict=True):
        error, allowed = ((result.double() - exactly).abs().max().item() for result in (mine, theirs))
        assert error <= 2 * allowed + torch.finfo(dtype).tiny, (name, error, allowed)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_mean_far_from_zero_costs_no_precision(offset: float) -> None:
    """The variance is of x - mean, not a difference of large sums, which would err by a tenth here."""
    x = (torch.randn(4, 768, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + offset).float()
    ones, zeros = torch.ones(768), torch.zeros(768)
    wanted = torch.nn.functional.layer_norm(x.double(), (768,))
    torch.testing.assert_close(layer_norm(x, ones, zeros, epsilon=1e-5, impl="native").double(), wanted, rtol=1e-3, atol=1e-3)


def test_gradients_have_the_same_bits_whatever_the_threads() -> None:
    tensors = inputs(200, 96, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(tensors, impl="native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for others in results[1:] for one, other in zip(results[0], others, strict=True))


def test_gradient_is_that_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(two, inputs(3, 2, 5))
    assert torch.autograd.gradcheck(lambda *t: layer_norm(*t, epsilon=1e-5, impl="native"), inputs(3, 2, 5)[:3])


def test_second_derivative_is_refused() -> None:
    tensors = inputs(3, 5)
    with pytest.raises(ValueError, match="layer_norm has no second derivative: leave create_graph out"):
        torch.autograd.grad(two(*tensors)[0].sum(), tensors[0], create_graph=True)


@pytest.mark.parametrize("norms", [1, 2])
def test_operators_keep_torchs_rules(norms: int) -> None:
    register()
    x, *parameters = inputs(3, 2, 5)
    weights, biases = parameters[: 2 * norms : 2], parameters[1 : 2 * norms : 2]
    torch.library.opcheck(torch.ops.sepllm.layer_norms.default, (x, weights, biases, 1e-5))
    _, mean, rstd = torch.ops.sepllm.layer_norms(x, weights, biases, 1e-5)
    arguments = ([torch.randn(3, 2, 5, dtype=torch.float64) for _ in range(norms)], x.detach(), weights, biases, mean.detach(), rstd.detach())
    with torch.no_grad():
        torch.library.opcheck(torch.ops.sepllm.layer_norms_backward.default, [_detached(argument) for argument in arguments])


def _detached(argument: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return argument.detach() if isinstance(argument, Tensor) else [tensor.detach() for tensor in argument]


@pytest.mark.parametrize("which", [0, 1])
def test_output_that_nobody_reads_has_gradient_zero(which: int) -> None:
    tensors = inputs(4, 9)
    ours, wanted = (
        torch.autograd.grad(two(*tensors, impl=impl)[which].square().sum(), tensors, allow_unused=True, materialize_grads=True)
        for impl in ("native", "reference")
    )
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_input_and_gradients_may_be_strided() -> None:
    x, *parameters = inputs(6, 5, 9)
    strided = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    weights = torch.stack([parameters[0], parameters[0]], -1).detach()[:, 0]
    grad = torch.ones(1, 1, 1, dtype=x.dtype).expand(6, 5, 9)
    ours, wanted = two(strided, weights, *parameters[1:]), two(x, *parameters, impl="reference")
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(torch.autograd.grad(ours, strided, (grad, grad))[0], torch.autograd.grad(wanted, x, (grad, grad))[0])


@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
def test_compiles_into_one_graph_and_is_recomputed_when_checkpointed(impl: Impl) -> None:
    tensors = inputs(3, 4, 8, dtype=torch.float32)

    def loss(*tensors: Tensor) -> Tensor:
        first, second = two(*tensors, impl=impl)
        return (first.sin() * second).sum()

    wanted = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*tensors), tensors)
    recomputed = torch.autograd.grad(checkpoint(loss, *tensors, use_reentrant=False), tensors)
    for one, two_, other in zip(compiled, recomputed, wanted, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(two_, other)


def test_nan_shows() -> None:
    """A run that diverges must be seen to diverge, in its row and no other."""
    x, *parameters = inputs(3, 20, dtype=torch.float32)
    with torch.no_grad():
        x[1, 4] = torch.nan
        first, second = two(x, *parameters)
    assert first[1].isnan().all()
    assert second[1].isnan().all()
    assert torch.isfinite(first[[0, 2]]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(4)}, r"must be \[5\] on cpu like the last axis of x"),
        ({"bias": torch.ones(5).half()}, "must all be"),
        ({"x": torch.ones(2, 5).int()}, "x must be float32, float64, bfloat16 or float16"),
        ({"impl": "fast"}, "impl is 'fast'"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_a_sentence(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.ones(2, 5), "weight": torch.ones(5), "bias": torch.ones(5), "impl": "native"}
    with pytest.raises(ValueError, match=message):
        layer_norm(**{**arguments, **change}, epsilon=1e-5)

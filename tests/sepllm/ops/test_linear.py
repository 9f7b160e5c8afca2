"""The product by oneDNN is torch's own, with all its gradients, wherever it is taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from sepllm.ops import linear as module
from sepllm.ops.linear import linear

ONEDNN = "mkldnn._linear_pointwise.default"


class CountOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN for products of every size, on any CPU."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN: torch.backends.mkldnn.is_available() is False")
    monkeypatch.delenv("SEPLLM_OPS", raising=False)
    monkeypatch.setattr(module, "SMALLEST", 0)
    monkeypatch.setattr(module, "_is_fast_here", lambda: True)


def operators(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[str]:
    with CountOperators() as counted:
        linear(x, weight, bias)
    return counted.names


def arguments(*shape: int, rows_out: int, has_bias: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape) + rows_out)
    shapes = [shape, (rows_out, shape[-1]), (rows_out,)][: 3 if has_bias else 2]
    return [torch.randn(size, generator=generator, dtype=dtype) for size in shapes]


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("shape", "rows_out"), [((1, 1), 1), ((4, 7), 5), ((3, 33), 17), ((2, 5, 16), 48), ((0, 8), 3), ((65, 130), 70)], ids=str)
def test_product_and_gradients_are_those_of_float64(shape: tuple[int, ...], rows_out: int, has_bias: bool) -> None:
    leaves = [tensor.requires_grad_() for tensor in arguments(*shape, rows_out=rows_out, has_bias=has_bias)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    assert ONEDNN in operators(*leaves)
    out, wanted = linear(*leaves), functional.linear(*wide)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(torch.autograd.grad(out, leaves, grad_out), torch.autograd.grad(wanted, wide, grad_out.double()), strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("onednn")
def test_second_derivatives_are_those_of_float64() -> None:
    leaves = [tensor.requires_grad_() for tensor in arguments(4, 6, rows_out=5, has_bias=True)]

    def second(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(linear(*tensors).pow(3).sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum((gradient.pow(2).sum() for gradient in gradients), start=torch.zeros(())), tensors)

    expected = second([leaf.detach().double().requires_grad_() for leaf in leaves])
    for gradient, wanted in zip(second(leaves), expected, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("wanted", [{0}, {1}, {2}, {0, 2}], ids=str)
def test_gradients_that_nobody_wants_are_not_computed(wanted: set[int]) -> None:
    leaves = [tensor.requires_grad_(index in wanted) for index, tensor in enumerate(arguments(3, 8, rows_out=4, has_bias=True))]
    out = linear(*leaves)
    with CountOperators() as counted:
        out.sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [index in wanted for index in range(3)]
    assert (ONEDNN in counted.names, "aten.mm.default" in counted.names) == (0 in wanted, 1 in wanted)


@pytest.mark.usefixtures("onednn")
def test_transposed_matrix_and_strided_rows_are_read_as_they_lie() -> None:
    x, weight = arguments(6, 20, rows_out=8, has_bias=False)
    torch.testing.assert_close(linear(x[:, ::2], weight[:, :10]), x[:, ::2] @ weight[:, :10].t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear(x[:, :8], weight.t()), x[:, :8] @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("onednn")
def test_what_was_not_measured_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = arguments(4, 8, rows_out=6, has_bias=True)
    assert ONEDNN in operators(x, weight, bias)
    assert ONEDNN not in operators(x.double(), weight.double(), bias.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    with monkeypatch.context() as patched:
        patched.setattr(torch.backends.mkldnn, "enabled", False)
        assert ONEDNN not in operators(x, weight, bias)
    with monkeypatch.context() as patched:
        patched.setenv("SEPLLM_OPS", "reference")
        assert ONEDNN not in operators(x, weight, bias)
    with monkeypatch.context() as patched:
        patched.setattr(module, "SMALLEST", 2 * 4 * 8 * 6 + 1)
        assert ONEDNN not in operators(x, weight, bias)
    with monkeypatch.context() as patched:
        patched.setattr(module, "LONGEST_TRANSPOSED", 5)
        assert ONEDNN in operators(x, weight)
        assert ONEDNN not in operators(torch.zeros(4, 6), weight.t())
    monkeypatch.setattr(module, "_is_fast_here", lambda: False)
    assert ONEDNN not in operators(x, weight, bias)


@pytest.mark.usefixtures("onednn")
def test_compiled_graph_gives_the_same() -> None:
    leaves = [tensor.requires_grad_() for tensor in arguments(4, 8, rows_out=6, has_bias=True)]
    torch.compiler.reset()
    out = torch.compile(linear, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(out, linear(*leaves))
    for gradient, wanted in zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(linear(*leaves).sum(), leaves), strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.zeros(4, 8), torch.zeros(6, 7), None),
        (torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(5)),
        (torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(6).double()),
        (torch.zeros(4, 8), torch.zeros(6, 8).double(), None),
    ],
    ids=["matrix", "bias", "dtype of the bias", "dtype of the matrix"],
)
def test_what_does_not_fit_raises(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    with pytest.raises(RuntimeError):
        linear(x, weight, bias)

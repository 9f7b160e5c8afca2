"""The CUDA kernels of cross-entropy, bias + GELU and masked softmax, run on the CPU (see test_cuda_sources.py), against torch."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sepllm.ops import extension
from sepllm.ops.cross_entropy import reference_gradient, reference_statistics
from sepllm.ops.gelu import bias_gelu
from sepllm.ops.masked_softmax import masked_softmax

STORAGES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ON_HOST = Path(__file__).with_name("cuda_on_host")
every_dtype = pytest.mark.parametrize("dtype", list(STORAGES), ids=str)


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels, compiled as C++."""
    library = tmp_path_factory.mktemp("cuda_on_host") / "kernels.so"
    flags = ["-std=c++20", "-O1", "-Wno-unknown-pragmas", "-fPIC", "-shared", f"-I{ON_HOST}", f"-I{extension.source_dir()}"]
    kernels = [extension.source_dir() / f"{stem}_cuda.cu" for stem in ("cross_entropy", "gelu", "masked_softmax")]
    command = [extension.find_compiler(), *flags, "-x", "c++", *map(str, kernels), str(ON_HOST / "losses.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def at(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]


def sizes(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def close(ours: Tensor, wanted: Tensor) -> None:
    """To a few units in the last place of what is stored, sums of which are float."""
    epsilon = torch.finfo(wanted.dtype).eps
    torch.testing.assert_close(ours, wanted, rtol=max(4 * epsilon, 1e-12), atol=max(2 * epsilon, 1e-12) * 0.1, equal_nan=True)


@every_dtype
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("columns", [1, 7, 1001, 5000])
def test_cross_entropy_kernels_are_the_reference(on_host: ctypes.CDLL, columns: int, offset: int, dtype: torch.dtype) -> None:
    """Rows that begin off a boundary of 16 bytes, rows without a finite logit, labels outside; in place and beside the logits."""
    torch.manual_seed(columns)
    padded = (torch.randn(5, columns + 3) * 4).to(dtype)
    logits = padded[:, offset : offset + columns]
    logits[1, : columns // 2] = logits[2] = -torch.inf
    labels = torch.tensor([10, 10 + columns - 1, 10, 9, 10 + columns])
    wide = torch.promote_types(dtype, torch.float32)
    ours = [poisoned(5, dtype=wide) for _ in range(3)]
    shape = (5, columns, padded.stride(0), 10)
    on_host.statistics(STORAGES[dtype], sizes(*shape), 1, *at(logits, labels, *ours))
    wanted = reference_statistics(logits, labels, first_label=10)
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    on_host.statistics(STORAGES[dtype], sizes(*shape), 0, *at(logits, labels, *ours))
    assert ours[2].isnan().tolist() == [False, False, False, True, True]

    grad_losses = torch.tensor([1.5, -2.0, 0.0, 1.0, 0.25], dtype=wide)
    gradient = reference_gradient(logits, labels, *wanted[:2], grad_losses, first_label=10)
    beside, rest = poisoned(5, columns, dtype=dtype), padded.clone()
    on_host.gradient(STORAGES[dtype], sizes(*shape, columns), *at(logits, labels, *wanted[:2], grad_losses, beside))
    close(beside, gradient)
    on_host.gradient(STORAGES[dtype], sizes(*shape, padded.stride(0)), *at(logits, labels, *wanted[:2], grad_losses, logits))
    assert torch.equal(logits, beside)
    logits.copy_(rest[:, offset : offset + columns])
    assert torch.equal(padded, rest)


@every_dtype
@pytest.mark.parametrize("is_tanh", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(3, 16), (130, 8), (67, 5), (1, 1)])
def test_gelu_kernels_are_the_reference(on_host: ctypes.CDLL, rows: int, columns: int, has_bias: bool, is_tanh: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x, grad_out = ((torch.randn(rows, columns) * 2).to(dtype).requires_grad_() for _ in range(2))
    bias = torch.randn(columns).to(dtype).requires_grad_() if has_bias else None
    wide = torch.promote_types(dtype, torch.float32)
    exact = [None if leaf is None else leaf.detach().to(torch.float64).requires_grad_() for leaf in (x, bias)]
    assert exact[0] is not None
    wanted = bias_gelu(exact[0], exact[1], approximate="tanh" if is_tanh else "none", impl="reference")
    gradients = torch.autograd.grad(wanted, [leaf for leaf in exact if leaf is not None], grad_out.detach().double())

    shape = sizes(rows, columns, rows * columns) if has_bias else sizes(1, 16384, rows * columns)
    out, dx = poisoned(rows, columns, dtype=dtype), poisoned(rows, columns, dtype=dtype)
    dbias, partial = poisoned(columns, dtype=dtype), poisoned((rows + 63) // 64, columns, dtype=wide)
    on_host.gelu(STORAGES[dtype], shape, int(is_tanh), *at(x, bias, out))
    on_host.gelu_backward(STORAGES[dtype], shape, int(is_tanh), *at(x, bias, grad_out, dx, dbias, partial))
    tolerance = {"rtol": max(4 * torch.finfo(dtype).eps, 1e-12), "atol": max(4 * torch.finfo(dtype).eps, 1e-13)}
    torch.testing.assert_close(out.double(), wanted.detach(), **tolerance)
    torch.testing.assert_close(dx.double(), gradients[0], **tolerance)
    if has_bias:
        torch.testing.assert_close(dbias.double(), gradients[1], rtol=tolerance["rtol"], atol=tolerance["atol"] * rows)


@every_dtype
@pytest.mark.parametrize("mask_heads", [1, 3])
@pytest.mark.parametrize("keys", [1, 31, 100])
def test_masked_softmax_kernels_are_the_reference(on_host: ctypes.CDLL, keys: int, mask_heads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(keys)
    scores, grad = ((torch.randn(2, 3, 5, keys) * 3).to(dtype) for _ in range(2))
    is_read = torch.rand(2, mask_heads, 5, keys) < 0.6
    is_read[:, :, 2] = False
    exact = scores.double().requires_grad_()
    wanted = masked_softmax(exact, is_read, scale=0.3, impl="reference")
    (gradient,) = torch.autograd.grad(wanted, exact, grad.double())

    scores, grad = (tensor.masked_fill(~is_read, torch.nan) for tensor in (scores, grad))
    weights, ours = poisoned(*scores.shape, dtype=dtype), poisoned(*scores.shape, dtype=dtype)
    shape, scale = sizes(2, 3, 5, keys, 5 * keys if mask_heads > 1 else 0), ctypes.c_double(0.3)
    on_host.softmax(STORAGES[dtype], shape, scale, *at(scores, is_read, weights))
    on_host.softmax_backward(STORAGES[dtype], shape, scale, *at(weights, grad, ours))
    tolerance = {"rtol": max(8 * torch.finfo(dtype).eps, 1e-12), "atol": max(4 * torch.finfo(dtype).eps, 1e-13)}
    torch.testing.assert_close(weights.double(), wanted.detach(), **tolerance)
    torch.testing.assert_close(ours.double(), gradient, **tolerance)

"""A product with a matrix, by the faster of the two libraries that torch brings for CPUs.

Torch sends float32 products to MKL. On AMD's processors oneDNN, which it keeps for 16 bits, is faster, and matrix products are nine tenths
of a training step. Both are torch's own builds; this module only chooses, by the processor and by the sizes and never by the clock, so that
a run that is repeated rounds the same.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

SMALLEST = 2**25
"""Operations, two a multiplication with its addition, from which oneDNN is ahead whatever the shape: what a call costs is then paid for."""
LONGEST_TRANSPOSED = 8192
"""Columns of a matrix that lies transposed, as in the gradient of ``x``, above which MKL is ahead: those of an output matrix."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, as `torch.nn.functional.linear`, which it is but for its time.

    ``x [..., D]``, ``weight [E, D]``, ``bias [E]`` or None, of one dtype. Result ``[..., E]``. Differentiable as often as wanted. In float32 on a
    CPU of AMD's with AVX-512 the result and the gradient of ``x`` are oneDNN's; the gradient of the weight, at which MKL is as fast, everything
    on other devices and in other dtypes, small products, autocast and compiled graphs are torch's usual ones, and so is all under
    ``SEPLLM_OPS=reference``. `tools.bench.products` measures both.
    """
    if not _is_onednn_faster(x, weight, bias):
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def weight_gradient(grad_out: Tensor, x: Tensor) -> Tensor:
    """``[E, D]``, of the weight of `linear`, for ``grad_out [..., E]`` and ``x [..., D]``."""
    return grad_out.flatten(0, -2).t() @ x.flatten(0, -2)


def bias_gradient(grad_out: Tensor) -> Tensor:
    """``[E]``, of the bias of `linear`, for ``grad_out [..., E]``."""
    return grad_out.flatten(0, -2).sum(0)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        wants_x, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        grad_x = None if weight is None else linear(grad_out, weight.t())
        grad_weight = None if x is None else weight_gradient(grad_out, x)
        return grad_x, grad_weight, bias_gradient(grad_out) if ctx.needs_input_grad[2] else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By oneDNN, through the operator that torch's own compiler calls. Neither argument is copied; a transposed ``weight`` is read as it lies."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _is_onednn_faster(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if any(tensor.device.type != "cpu" or tensor.dtype != torch.float32 for tensor in (x, weight, bias) if tensor is not None):
        return False
    if x.dim() < 2 or 2 * x.numel() * weight.shape[0] < SMALLEST:
        return False
    if weight.stride(0) == 1 and weight.shape[1] > LONGEST_TRANSPOSED:
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or os.environ.get("SEPLLM_OPS") == "reference":
        return False
    return torch._C._get_mkldnn_enabled() and _is_fast_here()


@functools.cache
def _is_fast_here() -> bool:
    """Where it was measured: a processor of AMD's with AVX-512, and MKL as what torch would take instead."""
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False

"""Bias + GELU (arXiv 1606.08415) as an operator: C++ for CPUs, CUDA (csrc/gelu_*), and plain torch.

The backward pass computes the sum of input and bias again, so that only the input is kept.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from sepllm.ops import choice
from sepllm.ops.linear import bias_gradient, linear, weight_gradient

Approximate = Literal["tanh", "none"]


def bias_gelu(x: Tensor, bias: Tensor | None, *, approximate: Approximate, impl: choice.Impl = "auto") -> Tensor:
    """``gelu(x + bias)``, of x's shape and dtype.

    ``x [..., D]`` float32, float64, bfloat16 or float16, ``bias [D]`` of the same dtype or None. ``approximate`` is "tanh" (as in GPT-2) or
    "none" (exact), as for `torch.nn.functional.gelu`, which is the reference. Arithmetic is fp32 (fp64 for fp64); relative to the result the
    error stays small for negative inputs too. The gradient of the bias is the same to the bit from run to run, whatever the number of threads.

    ``auto`` is native on a CPU on which the operators can be built, but for bfloat16 without a bias and with "none", where torch's is faster; else
    it is reference. Torch's time over native's, forward and backward, [2048, 3072], one thread (AMD EPYC, torch 2.13, 2026-11-22):

                          float32    bfloat16    float16
        tanh                 3.1         2.6        3.1
        none                 2.5         0.88       1.5
        tanh, with bias      3.5         2.5
        none, with bias      2.4         1.1

    A Linear adds its bias where it multiplies, at no cost: it leaves the first two rows.
    """
    _check(approximate)
    if not _is_native(impl, x, has_bias=bias is not None, approximate=approximate):
        return functional.gelu(x if bias is None else x + bias, approximate=approximate)
    register(x.device.type)
    return torch.ops.sepllm.bias_gelu(x, bias, approximate == "tanh")


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, approximate: Approximate) -> Tensor:
    """``gelu(x) @ weight.T + bias``, keeping x alone for the backward pass, which computes the activation again.

    ``x [..., D]``, ``weight [E, D]``, ``bias [E]`` or None, of one dtype as for `bias_gelu`. Result ``[..., E]``. The wide activation of
    an MLP is a quarter of what a transformer layer keeps; computing it again is about one per cent of the layer's work.
    """
    _check(approximate)
    if torch.compiler.is_compiling():  # a compiler decides itself what to compute again
        return linear(bias_gelu(x, None, approximate=approximate), weight, bias)
    return _GeluLinear.apply(x, weight, bias, approximate)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, approximate: Approximate) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.approximate = approximate
        return linear(bias_gelu(x, None, approximate=approximate), weight, bias)

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        choice.refuse_second_derivative("gelu_linear")
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_bias = bias_gradient(grad_out) if wants_bias else None
        grad_weight = weight_gradient(grad_out, bias_gelu(x, None, approximate=ctx.approximate)) if wants_weight else None
        grad_x = _gelu_backward(linear(grad_out, weight.t()), x, approximate=ctx.approximate) if wants_x else None
        return grad_x, grad_weight, grad_bias, None


def _gelu_backward(grad_out: Tensor, x: Tensor, *, approximate: Approximate) -> Tensor:
    if not _is_native("auto", x, has_bias=False, approximate=approximate):
        return torch.ops.aten.gelu_backward(grad_out, x, approximate=approximate)
    dx, _ = torch.ops.sepllm.bias_gelu_backward(grad_out, x, None, approximate == "tanh")
    return dx


def _is_native(impl: choice.Impl, x: Tensor, *, has_bias: bool, approximate: Approximate) -> bool:
    is_torchs_faster = approximate == "none" and not has_bias and x.dtype == torch.bfloat16
    return choice.is_native("reference" if impl == "auto" and is_torchs_faster else impl, x.device.type)


def _check(approximate: str) -> None:
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate is {approximate!r}: use tanh or none.")


@choice.once_loaded
def register() -> None:
    torch.library.register_fake("sepllm::bias_gelu", lambda x, *_: x.new_empty(x.shape))
    torch.library.register_fake("sepllm::bias_gelu_backward", _fake_backward)
    torch.library.register_autograd("sepllm::bias_gelu", _backward, setup_context=_save)


def _fake_backward(_grad_out: Tensor, x: Tensor, bias: Tensor | None, _is_tanh: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if bias is None else bias.shape[0])


def _save(ctx, inputs: tuple, output: Tensor) -> None:  # type: ignore[no-untyped-def]
    x, bias, ctx.is_tanh = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    choice.refuse_second_derivative("bias_gelu")
    x, bias = ctx.saved_tensors
    dx, dbias = torch.ops.sepllm.bias_gelu_backward(grad_out, x, bias, ctx.is_tanh)
    return dx, None if bias is None else dbias, None

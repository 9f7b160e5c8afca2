"""Softmax cross-entropy as an operator, over the whole vocabulary or one rank's shard of it: C++ for CPUs, CUDA
(csrc/cross_entropy_*), and plain torch.

Of the logits, the largest tensor of a training step, no second one is made: losses need three numbers a row, and the backward pass writes
the gradient over the logits. Arithmetic is fp32 for every dtype (fp64 for fp64).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sepllm.ops import choice

NO_LABEL = torch.iinfo(torch.int64).min
"""torch leaves out the rows of one label; here none is."""


class Statistics(NamedTuple):
    """What a row's loss needs of its logits: ``log(total) + maximum - target``. Each ``[T]``, fp32 (fp64 for fp64)."""

    maximum: Tensor
    total: Tensor
    """Sum of ``exp(logit - maximum)``; 0 where every logit is -inf."""
    target: Tensor
    """Logit of the label; 0 where the label is not in this shard, so that the sum over all shards is the label's logit."""


Reduce = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""``(maximum, total, target)`` of a shard -> those of the whole vocabulary."""


def cross_entropy(logits: Tensor, labels: Tensor, *, reduce: Reduce | None = None, first_label: int = 0, impl: choice.Impl = "auto") -> Tensor:
    """Loss of each row, ``[T]`` fp32 (fp64 for fp64). **The backward pass overwrites the logits with their gradient.**

    ``logits [T, V]`` float32, float64, bfloat16 or float16; ``labels [T]`` int64. With ``reduce`` the logits are the shard of the vocabulary
    that begins at ``first_label``, and labels may lie outside it; without, a label outside is an error (in the CUDA kernel, for which an error
    would have to be waited for, the loss is NaN). A row whose loss has gradient 0 gets zeros, whatever its logits hold.

    Logits that are a leaf, or a view of one, keep their values and get a gradient of its own memory, as do those under `torch.compile`,
    which writes on nothing that a graph has saved. Otherwise a second backward pass over the graph raises, as does that of anybody else
    who has saved the logits. No second derivative.

    ``impl="reference"`` is `torch.nn.functional.cross_entropy` in fp32, or with ``reduce`` its parts in plain torch; it overwrites nothing.
    ``auto`` is native on a CPU on which the operators can be built, else reference. Milliseconds of native and of torch at [2048, 50304], one
    thread (AMD EPYC, torch 2.13, 2026-11-22; other processes ran beside):

                      float32          bfloat16
        forward      33    228        35    456
        backward     25    770        43    608
    """
    is_native = choice.is_native(impl, logits.device.type)
    if not is_native and reduce is None:
        check_labels(labels, first_label, logits.shape[1])
        return functional.cross_entropy(logits.to(_wide(logits)), labels - first_label, reduction="none", ignore_index=NO_LABEL)
    if is_native:
        register(logits.device.type)
    of_shard = _statistics(logits.detach(), labels, first_label=first_label, is_shard=reduce is not None, is_native=is_native)
    combined = of_shard if reduce is None else Statistics(*reduce(*of_shard))
    if is_native:
        return torch.ops.sepllm.cross_entropy_losses(logits, labels, *combined, first_label)
    return _WrittenOut.apply(logits, labels, *combined, first_label)


def statistics(logits: Tensor, labels: Tensor, *, first_label: int = 0, impl: choice.Impl = "auto") -> Statistics:
    """Row maximum, sum of exponentials and target logit of a shard of the vocabulary that begins at ``first_label``. Not differentiable.

    ``logits [T, V]``, ``labels [T]`` int64, which may lie outside the shard. Reads the logits once.
    """
    is_native = choice.is_native(impl, logits.device.type)
    if is_native:
        register(logits.device.type)
    return _statistics(logits, labels, first_label=first_label, is_shard=True, is_native=is_native)


def write_gradient_(logits: Tensor, labels: Tensor, maximum: Tensor, total: Tensor, grad_losses: Tensor, *, first_label: int = 0) -> Tensor:
    """``logits``, overwritten with ``(softmax - onehot(label)) * grad_losses`` in their own dtype; rows whose gradient is 0 with zeros.

    ``maximum``, ``total`` and ``grad_losses`` ``[T]`` fp32 (fp64 for fp64), of the whole vocabulary.
    """
    register(logits.device.type)
    torch.ops.sepllm.cross_entropy_write_gradient(logits, labels, maximum, total, grad_losses, first_label)
    return logits


def reference_statistics(logits: Tensor, labels: Tensor, *, first_label: int = 0) -> Statistics:
    """`statistics` in plain torch."""
    wide = logits.to(_wide(logits))
    maximum = wide.amax(-1)
    is_finite = wide != -torch.inf
    total = torch.where(is_finite, (wide - maximum[:, None]).exp(), 0).sum(-1)
    column, is_here = _columns(logits, labels, first_label)
    return Statistics(maximum, total, torch.where(is_here, wide.gather(1, column[:, None])[:, 0], 0))


def reference_gradient(logits: Tensor, labels: Tensor, maximum: Tensor, total: Tensor, grad_losses: Tensor, *, first_label: int = 0) -> Tensor:
    """What `write_gradient_` writes, in plain torch and in memory of its own."""
    softmax = (logits.to(_wide(logits)) - maximum[:, None]).exp() / total[:, None]
    column, is_here = _columns(logits, labels, first_label)
    onehot = torch.zeros_like(softmax).scatter(1, column[:, None], is_here[:, None].to(softmax.dtype))
    return torch.where(grad_losses[:, None] == 0, 0, (softmax - onehot) * grad_losses[:, None]).to(logits.dtype)


def _columns(logits: Tensor, labels: Tensor, first_label: int) -> tuple[Tensor, Tensor]:
    """Column of each label, 0 where it is not in the shard, and whether it is."""
    column = labels - first_label
    is_here = (column >= 0) & (column < logits.shape[1])
    return torch.where(is_here, column, 0), is_here


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _statistics(logits: Tensor, labels: Tensor, *, first_label: int, is_shard: bool, is_native: bool) -> Statistics:
    if is_native:
        return Statistics(*torch.ops.sepllm.cross_entropy_statistics(logits, labels, first_label, is_shard))
    return reference_statistics(logits, labels, first_label=first_label)


def check_labels(labels: Tensor, first_label: int, size: int) -> None:
    """ValueError for a label outside the vocabulary ``first_label .. first_label + size - 1``. On a CPU; a GPU would have to be waited for."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    is_outside = (labels < first_label) | (labels >= first_label + size)
    if bool(is_outside.any()):
        row = int(is_outside.int().argmax())
        raise ValueError(
            f"labels[{row}] is {int(labels[row])}, outside the vocabulary {first_label} .. {first_label + size - 1}: "
            "mask a token by its loss, and give it any label inside."
        )


class _WrittenOut(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, labels: Tensor, maximum: Tensor, total: Tensor, target: Tensor, first_label: int) -> Tensor:
        return maximum - target + total.log()

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:  # type: ignore[no-untyped-def]
        logits, labels, maximum, total, _, ctx.first_label = inputs
        ctx.save_for_backward(logits, labels, maximum, total)

    @staticmethod
    def backward(ctx, grad_losses: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        choice.refuse_second_derivative("cross_entropy")
        logits, labels, maximum, total = ctx.saved_tensors
        gradient = reference_gradient(logits, labels, maximum, total, grad_losses, first_label=ctx.first_label)
        return gradient, None, None, None, None, None


@choice.once_loaded
def register() -> None:
    torch.library.register_fake("sepllm::cross_entropy_statistics", _fake_statistics)
    torch.library.register_fake("sepllm::cross_entropy_write_gradient", lambda *_: None)
    torch.library.register_fake("sepllm::cross_entropy_gradient", lambda logits, *_: logits.new_empty(logits.shape))
    torch.library.register_fake("sepllm::cross_entropy_losses", lambda _logits, _labels, maximum, *_: torch.empty_like(maximum))
    torch.library.register_autograd("sepllm::cross_entropy_losses", _backward, setup_context=_save)


def _fake_statistics(logits: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    maximum, total, target = (logits.new_empty(logits.shape[0], dtype=_wide(logits)) for _ in range(3))
    return maximum, total, target


def _save(ctx, inputs: tuple, output: Tensor) -> None:  # type: ignore[no-untyped-def]
    logits, labels, maximum, total, _, ctx.first_label = inputs
    ctx.is_ours = _may_be_overwritten(logits)
    ctx.save_for_backward(logits, labels, maximum, total)


def _may_be_overwritten(logits: Tensor) -> bool:
    """Not the memory of a parameter, nor what a compiler traces, nor rows that share memory."""
    root = logits if logits._base is None else logits._base
    return type(logits) is Tensor and not root.is_leaf and all(logits.stride())


def _backward(ctx, grad_losses: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    choice.refuse_second_derivative("cross_entropy")
    logits, labels, maximum, total = ctx.saved_tensors
    if ctx.is_ours:
        gradient = write_gradient_(logits.detach(), labels, maximum, total, grad_losses, first_label=ctx.first_label)
    else:
        gradient = torch.ops.sepllm.cross_entropy_gradient(logits, labels, maximum, total, grad_losses, ctx.first_label)
    return gradient, None, None, None, None, None

"""The output matrix and its softmax cross-entropy as one operator, a chunk of tokens at a time.

Logits are the largest tensor of a training step: T x V numbers against T x D of any other. Here a chunk of them is made, gives its losses,
its gradient is written over it, is multiplied out to the gradients of hidden state and matrix, and gives way to the next. The backward
pass has nothing left to do but to scale. In plain torch around `sepllm.ops.cross_entropy`, on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sepllm.ops import choice
from sepllm.ops.cross_entropy import check_labels, reference_gradient, statistics, write_gradient_
from sepllm.ops.linear import linear

CHUNK = 512
"""Tokens of a chunk: enough for a matrix product at full rate, an eighth of the logits of a row of 4096."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """``sum(token_weights * cross_entropy(hidden @ weight.T, labels))``, a scalar in fp32 (fp64 for fp64).

    ``hidden [T, D]`` and ``weight [V, D]`` float32 or float64, ``labels [T]`` int64 inside the vocabulary, ``token_weights [T]`` float, without
    a gradient (a mean's are ``mask / mask.sum()``). Peak memory beyond the arguments is ``chunk x V`` numbers and, where gradients are wanted,
    those of hidden state and matrix; the plain way needs ``T x V``. The sums over tokens are taken chunk by chunk, so that they differ from the
    plain ones by rounding. ValueError for 16-bit dtypes: a gradient summed over chunks in them would be rounded once a chunk.

    Its backward pass gives the gradients' own memory away, so a second one over the same graph raises. No second derivative.
    """
    if hidden.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"linear_cross_entropy sums gradients over chunks in float32 or float64, but hidden is {hidden.dtype}: use cross_entropy.")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: give a number of tokens, at least 1.")
    check_labels(labels, 0, weight.shape[0])
    if not torch.is_grad_enabled():  # autograd says what requires a gradient, wanted or not
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, labels, token_weights, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, chunk: int) -> Tensor:  # type: ignore[no-untyped-def]
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        loss = hidden.new_zeros(())
        for first in range(0, len(hidden), chunk):
            part = slice(first, first + chunk)
            logits, scales = linear(hidden[part], weight), token_weights[part].to(hidden.dtype)
            of_rows = statistics(logits, labels[part])
            loss += torch.dot(of_rows.maximum - of_rows.target + of_rows.total.log(), scales)
            if not (wants_hidden or wants_weight):
                continue
            grad_logits = _gradient(logits, labels[part], of_rows.maximum, of_rows.total, scales)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.t(), hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        choice.refuse_second_derivative("linear_cross_entropy")
        return (*(gradient if gradient is None else gradient.mul_(grad_loss) for gradient in ctx.saved_tensors), None, None, None)


def _gradient(logits: Tensor, labels: Tensor, maximum: Tensor, total: Tensor, scales: Tensor) -> Tensor:
    """Of the logits, over their own memory where an operator is there to do so."""
    if choice.is_native("auto", logits.device.type):
        return write_gradient_(logits, labels, maximum, total, scales)
    return reference_gradient(logits, labels, maximum, total, scales)

"""Adagrad (Duchi et al., JMLR 12, 2011), with weight decay in the gradient, as torch has it.

torch's makes its state when it is made. DeepSpeed 0.19 then fails in 16 bits, and builds another under ZeRO, without the parameter groups.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megatron.optim.grouped import GroupedOptimizer
from megatron.optim.groups import ParameterGroup


class Adagrad(GroupedOptimizer):
    """Divides every gradient by the root of the sum of all squares so far."""

    def __init__(self, params: Iterable[ParameterGroup], *, lr: float, eps: float) -> None:
        super().__init__(params, lr=lr, eps=eps)

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
        sums = self._kept("sum", parameters)
        torch._foreach_addcmul_(sums, gradients, gradients)
        roots = torch._foreach_sqrt(sums)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(parameters, gradients, roots, -group["lr"])

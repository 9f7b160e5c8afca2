"""Lion, the sign optimizer of Chen et al. (arXiv 2302.06675, Algorithm 2), with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megatron.optim.grouped import GroupedOptimizer
from megatron.optim.groups import ParameterGroup


class Lion(GroupedOptimizer):
    """Moves every weight by the learning rate, in the direction of a sign: ``sign(b1 * m + (1 - b1) * g)``."""

    def __init__(self, params: Iterable[ParameterGroup], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, lr=lr, betas=betas)

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        lr, (blend, keep) = group["lr"], group["betas"]
        momenta = self._kept("exp_avg", parameters)
        directions = torch._foreach_lerp(gradients, momenta, blend)
        torch._foreach_sign_(directions)
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, directions, alpha=-lr)
        torch._foreach_lerp_(momenta, gradients, 1 - keep)

"""Lion, the sign optimizer of Chen et al. (arXiv 2302.06675, Algorithm 2), with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megatron.optim.groups import ParameterGroup


class Lion(torch.optim.Optimizer):
    """Moves every weight by the learning rate, in the direction of a sign: ``sign(b1 * m + (1 - b1) * g)``."""

    def __init__(self, params: Iterable[ParameterGroup], *, lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__([dict(group) for group in params], {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update. Returns what ``closure``, if any, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            if moving:
                self._update(moving, lr=float(group["lr"]), betas=group["betas"], weight_decay=float(group["weight_decay"]))
        return loss

    def _update(self, parameters: list[Tensor], *, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        for parameter in parameters:
            if "exp_avg" not in self.state[parameter]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        momenta: list[Tensor] = [self.state[parameter]["exp_avg"] for parameter in parameters]
        directions = torch._foreach_lerp(gradients, momenta, betas[0])
        torch._foreach_sign_(directions)
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_add_(parameters, directions, alpha=-lr)
        torch._foreach_lerp_(momenta, gradients, 1 - betas[1])

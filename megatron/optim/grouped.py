"""What the optimizers of our own share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from megatron.optim.groups import ParameterGroup


class GroupedOptimizer(torch.optim.Optimizer):
    """Moves the parameters of a group at once. State is made at the first step: DeepSpeed puts other tensors in the parameters' places before."""

    def __init__(self, params: Iterable[ParameterGroup], **defaults: Any) -> None:
        super().__init__([dict(group) for group in params], {"weight_decay": 0.0, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update. Returns what ``closure``, if any, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            if moving:
                self._update(moving, [parameter.grad for parameter in moving if parameter.grad is not None], group)
        return loss

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _kept(self, key: str, parameters: list[Tensor]) -> list[Tensor]:
        """The state of that name of each parameter; zeros at first."""
        for parameter in parameters:
            if key not in self.state[parameter]:
                self.state[parameter][key] = torch.zeros_like(parameter)
        return [self.state[parameter][key] for parameter in parameters]

"""The optimizer that a configuration names, as a torch optimizer object for the DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron.config.schema import OptimizerConfig
from megatron.optim.adagrad import Adagrad
from megatron.optim.groups import ParameterGroup, parameter_groups
from megatron.optim.lion import Lion

__all__ = ["build_optimizer", "parameter_groups", "set_learning_rate"]


def build_optimizer(groups: Sequence[ParameterGroup], config: OptimizerConfig, device: torch.device, *, lr: float = 0.0) -> torch.optim.Optimizer:
    """A new optimizer over ``groups``. The trainer sets the rate before every step (`set_learning_rate`)."""
    if config.type not in _BUILDERS:
        raise ValueError(f"optimizer type {config.type!r} is not one that this project builds: use one of {', '.join(sorted(_BUILDERS))}.")
    known = _EXTRA_PARAMS.get(config.type, frozenset())
    unknown = sorted(set(config.params) - known)
    if unknown:
        rest = f"it takes {', '.join(sorted(known))} besides the usual ones" if known else "it takes none besides the usual ones"
        raise ValueError(f"optimizer params {', '.join(unknown)} mean nothing to type {config.type!r} ({rest}): remove them.")
    return _BUILDERS[config.type](groups, config, device, lr)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group the rate ``lr``, scaled where the group says so (muP)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def _adam(groups: Sequence[ParameterGroup], config: OptimizerConfig, device: torch.device, lr: float) -> torch.optim.Optimizer:
    """AdamW, or Adam whose decay joins the gradient where ``adam_w_mode: false`` asks for it."""
    kind = torch.optim.AdamW if config.params.get("adam_w_mode", True) else torch.optim.Adam
    amsgrad = bool(config.params.get("amsgrad", False))
    is_fused = device.type in ("cuda", "cpu")
    return kind([dict(group) for group in groups], lr=lr, betas=config.betas, eps=config.eps, amsgrad=amsgrad, fused=is_fused)


def _sgd(groups: Sequence[ParameterGroup], config: OptimizerConfig, device: torch.device, lr: float) -> torch.optim.Optimizer:
    is_nesterov = bool(config.params.get("nesterov", False))
    return torch.optim.SGD([dict(group) for group in groups], lr=lr, momentum=config.momentum, nesterov=is_nesterov)


def _adagrad(groups: Sequence[ParameterGroup], config: OptimizerConfig, device: torch.device, lr: float) -> torch.optim.Optimizer:
    return Adagrad(groups, lr=lr, eps=config.eps)


def _lion(groups: Sequence[ParameterGroup], config: OptimizerConfig, device: torch.device, lr: float) -> torch.optim.Optimizer:
    return Lion(groups, lr=lr, betas=config.betas)


_Builder = Callable[[Sequence[ParameterGroup], OptimizerConfig, torch.device, float], torch.optim.Optimizer]
_BUILDERS: dict[str, _Builder] = {
    "adam": _adam,
    "adamw": _adam,
    "cpu_adam": _adam,
    "cpu_torch_adam": _adam,
    "sgd": _sgd,
    "adagrad": _adagrad,
    "lion": _lion,
}
_EXTRA_PARAMS: dict[str, frozenset[str]] = {
    "adam": frozenset({"adam_w_mode", "amsgrad", "torch_adam"}),
    "adamw": frozenset({"adam_w_mode", "amsgrad", "torch_adam"}),
    "cpu_adam": frozenset({"adam_w_mode", "amsgrad"}),
    "cpu_torch_adam": frozenset({"adam_w_mode", "amsgrad"}),
    "sgd": frozenset({"nesterov"}),
}

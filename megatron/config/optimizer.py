"""The optimizer block and the learning-rate keys as `OptimizerConfig` and `ScheduleConfig`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import JsonValue

from megatron.config.keys import nearest
from megatron.config.schema import OptimizerConfig, ScheduleConfig
from megatron.config.settings import Mistake, Settings, Unreadable, copied
from megatron.config.values import NUMBER, NUMBERS

_DEFAULT_LR = 1e-3
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adam": ("adam_w_mode", "amsgrad", "torch_adam"),
    "adamw": ("adam_w_mode", "amsgrad", "torch_adam"),
    "cpu_adam": ("adam_w_mode", "amsgrad"),
    "cpu_torch_adam": ("adam_w_mode", "amsgrad"),
    "sgd": ("nesterov",),
    "adagrad": (),
    "lion": (),
}
"""Optimizers and what their `params` may hold besides lr, betas, eps, weight_decay and momentum."""
_OPTIMIZERS_REFUSED = {
    "sm3": "SM3 is not offered",
    "madgrad_wd": "MADGRAD is not offered",
    "onebitadam": "DeepSpeed 0.19 has removed the one-bit optimizers",
    "onebitlamb": "DeepSpeed 0.19 has removed the one-bit optimizers",
    "zerooneadam": "DeepSpeed 0.19 has removed the one-bit optimizers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimization:
    """What the optimizer block says beside the optimizer itself."""

    optimizer: OptimizerConfig
    lr: float


def resolve_optimizer(settings: Settings) -> Optimization:
    """The optimizer block, or GPT-NeoX's Adam where there is none."""
    block = settings.block("optimizer")
    params = dict(_params(settings, block))
    kind = _optimizer_type(settings, block)
    lr = _lr(settings, params)
    decay = settings.agreed("weight_decay", params.pop("weight_decay", None), "optimizer.params.weight_decay")
    known = ("betas", "eps", "momentum")
    own = {name: params.pop(name) for name in known if name in params}
    for name in sorted(set(params) - set(OPTIMIZERS[kind])):
        close = nearest(name, ["lr", "weight_decay", *known, *OPTIMIZERS[kind]])
        hint = f"did you mean {close}?" if close else f"{kind} takes {', '.join(['lr', 'betas', 'eps', 'weight_decay', *OPTIMIZERS[kind]])}."
        settings.report(Mistake(keys=(f"optimizer.params.{name}",), text=f"unknown member optimizer.params.{name}: {hint}"))
    default_decay = 0.0 if block is None else OptimizerConfig().weight_decay
    return Optimization(
        optimizer=copied(settings, OptimizerConfig, type=kind, weight_decay=default_decay if decay is None else decay, params=params, **own),
        lr=lr,
    )


def _params(settings: Settings, block: dict[str, JsonValue] | None) -> Iterator[tuple[str, JsonValue]]:
    """Members of `optimizer.params`, numbers as numbers."""
    params = (block or {}).get("params") or {}
    if not isinstance(params, dict):
        raise settings.fail(["optimizer.params"], "optimizer.params is no block: give {lr: 6.0e-4, ...}.")
    for name in sorted(set(block or {}) - {"type", "params"}):
        settings.report(Mistake(keys=(f"optimizer.{name}",), text=f"unknown member optimizer.{name}: optimizer holds type and params."))
    for name, value in params.items():
        kind = {"lr": NUMBER, "eps": NUMBER, "weight_decay": NUMBER, "momentum": NUMBER, "betas": NUMBERS}.get(name)
        try:
            result = value if kind is None else kind.read(value)
        except ValueError:
            raise settings.fail([f"optimizer.params.{name}"], f"optimizer.params.{name} is {value!r}: give {kind.words if kind else ''}.") from None
        if name == "betas" and (not isinstance(result, list) or len(result) != 2):
            raise settings.fail(["optimizer.params.betas"], f"optimizer.params.betas is {value!r}: give two numbers, such as [0.9, 0.95].")
        yield name, result


def _optimizer_type(settings: Settings, block: dict[str, JsonValue] | None) -> str:
    written = (block or {}).get("type") or "Adam"
    kind = str(written).lower()
    if kind in _OPTIMIZERS_REFUSED:
        raise settings.fail(["optimizer.type"], f"optimizer.type is {written}: {_OPTIMIZERS_REFUSED[kind]}: use one of {', '.join(OPTIMIZERS)}.")
    if kind not in OPTIMIZERS:
        raise settings.fail(["optimizer.type"], f"optimizer.type is {written!r}: give one of {', '.join(OPTIMIZERS)}.")
    return kind


def _lr(settings: Settings, params: dict[str, JsonValue]) -> float:
    lr = settings.agreed("lr", params.pop("lr", None), "optimizer.params.lr")
    if lr is None:
        settings.notes.append(f"optimizer.params.lr is not given: the learning rate is GPT-NeoX's default, {_DEFAULT_LR:g}.")
        return _DEFAULT_LR
    return lr


def resolve_schedule(settings: Settings, *, lr: float) -> ScheduleConfig:
    """The schedule to and from the peak rate ``lr``, with the number of steps it takes."""
    min_lr = settings.get_or("min_lr", 0.0)
    if min_lr > lr:
        settings.report(Mistake(keys=("min_lr", "optimizer.params.lr"), text=f"min_lr ({min_lr:g}) is above the learning rate ({lr:g}): lower it."))
    return copied(settings, ScheduleConfig, lr=lr, lr_decay_iters=_decay_steps(settings))


def _decay_steps(settings: Settings) -> int:
    steps, fraction, train_iters = settings.get("lr_decay_iters", int), settings.get("lr_decay_fraction", float), settings.get("train_iters", int)
    if steps is not None and fraction is not None:
        raise settings.fail(["lr_decay_iters", "lr_decay_fraction"], "lr_decay_iters and lr_decay_fraction are both given: give one of them.")
    if steps is not None:
        return steps
    if train_iters is not None:
        return max(1, train_iters if fraction is None else math.floor(train_iters * fraction))
    if settings.has("train_epochs"):
        text = "train_epochs is given without lr_decay_iters, and how many steps the epochs have is known only with the data: give lr_decay_iters."
        raise settings.fail(["train_epochs"], text)
    raise Unreadable("train_iters")

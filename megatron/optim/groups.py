"""Which parameters are decayed, and which learn at another rate. GPT-NeoX's rule: everything but norms and biases decays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NotRequired, TypedDict

from torch import nn

VECTOR_LIKE = ("word_embeddings.weight", "position_embeddings.weight", "final_linear.weight")
"""Matrices of which only one side grows with the width, so that muP leaves their rate alone (arXiv 2203.03466, Table 8)."""


class ParameterGroup(TypedDict):
    """One group of a torch optimizer."""

    params: list[nn.Parameter]
    weight_decay: float
    lr_scale: NotRequired[float]
    """The group learns at the schedule's rate times this; absent: 1."""


def parameter_groups(model: nn.Module, weight_decay: float, *, mup_width_scale: float = 1.0) -> list[ParameterGroup]:
    """The trainable parameters in the model's order: those that decay, then those that do not.

    Embeddings and the output matrix decay; norm modules, parameters named ``bias`` and those with a true ``no_weight_decay``
    attribute do not. Without weight decay there is one group. ``mup_width_scale``: how much wider the model is than its muP
    base; the rate of its hidden matrices is divided by this, in groups of their own.
    """
    sorted_out: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for module, name, parameter in _distinct_parameters(model):
        decays = weight_decay != 0 and not _is_exempt(module, name, parameter)
        is_hidden = mup_width_scale != 1 and parameter.ndim == 2 and not name.endswith(VECTOR_LIKE)
        sorted_out.setdefault((not decays, is_hidden), []).append(parameter)
    groups: list[ParameterGroup] = []
    for (is_exempt, is_hidden), parameters in sorted(sorted_out.items(), key=lambda item: item[0]):
        group = ParameterGroup(params=parameters, weight_decay=0.0 if is_exempt else weight_decay)
        groups.append(ParameterGroup(**group, lr_scale=1 / mup_width_scale) if is_hidden else group)
    return groups


def _distinct_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every trainable parameter once, with the module that owns it first and its full name."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield module, f"{path}.{name}", parameter


def _is_exempt(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    is_norm = "norm" in type(module).__name__.lower()
    return is_norm or name.endswith(".bias") or bool(getattr(parameter, "no_weight_decay", False))

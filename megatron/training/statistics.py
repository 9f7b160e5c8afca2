"""Norms of parameters, gradients and optimizer state, by parameter, and DeepSpeed's timers, for those who ask for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron.config.schema import LoggingConfig
from megatron.model.names import weight_name
from megatron.parallel.collectives import gather_stages, sum_along
from megatron.parallel.mesh import Mesh
from megatron.parallel.parameters import is_piece
from megatron.training.loss_scale import loss_scale

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


ZEROS = "pct_grad_zeros"
TIMERS = {
    "fwd": "forward",
    "bwd": "backward",
    "bwd_inner": "backward-backward",
    "bwd_allreduce": "backward-allreduce",
    "step": "optimizer",
}
"""DeepSpeed's timers of a whole step, and GPT-NeoX's names for them."""


def timer_metrics(engine: DeepSpeedEngine, config: LoggingConfig, *, waited_s: float) -> dict[str, float]:
    """Seconds of each part of the last step, under GPT-NeoX's names; nothing without `wall_clock_breakdown`."""
    if not config.wall_clock_breakdown:
        return {}
    measured_ms = engine.get_wall_clock_timers()
    metrics = {f"timers/{TIMERS[name]}": value / 1000 for name, value in measured_ms.items() if name in TIMERS}
    return metrics | {"timers/batch generator": waited_s}


def parameter_statistics(engine: DeepSpeedEngine, config: LoggingConfig, mesh: Mesh) -> dict[str, float]:
    """The norms that the configuration asks for, under GPT-NeoX's names, of whole parameters of all stages. All processes call this
    together, before the update."""
    own: dict[str, float] = {}
    of_pieces: dict[str, float] = {}
    for name, parameter in engine.module.named_parameters():
        if not getattr(parameter, "ds_pipe_replicated", False):
            (of_pieces if is_piece(parameter) else own).update(_statistics_of(engine, weight_name(name), parameter, config))
    own |= _of_whole_parameters(of_pieces, mesh)
    metrics = {name: value for of_stage in gather_stages(own, mesh) for name, value in of_stage.items()}
    if config.log_optimizer_states:
        states = [state for of_stage in gather_stages(_optimizer_state_norms(engine), mesh) for state in of_stage]
        metrics |= {f"optimizer_state_norms/{place}_{name}": norm for place, state in enumerate(states) for name, norm in state.items()}
    return metrics


def _statistics_of(engine: DeepSpeedEngine, name: str, parameter: nn.Parameter, config: LoggingConfig) -> dict[str, float]:
    """Of a parameter as far as this shard holds it."""
    metrics: dict[str, float] = {}
    if config.log_param_norm:
        metrics[f"parameter_norms/{name}"] = float(_whole(engine, parameter).float().norm())
    if config.log_grad_norm or config.log_grad_pct_zeros:
        gradient = _gradient(engine, parameter)
        if gradient is not None and config.log_grad_norm:
            metrics[f"gradient_norms/{name}"] = float(gradient.norm())
        if gradient is not None and config.log_grad_pct_zeros:
            metrics[f"{ZEROS}/{name}"] = float((gradient == 0).float().mean()) * 100
    return metrics


def _of_whole_parameters(of_pieces: dict[str, float], mesh: Mesh) -> dict[str, float]:
    """Norms and percentages of parameters, from those of the equal pieces that each shard holds."""
    if mesh.tensor.size == 1 or not of_pieces:
        return of_pieces
    is_norm = torch.tensor([not name.startswith(ZEROS) for name in of_pieces], device=mesh.device)
    own = torch.tensor(list(of_pieces.values()), dtype=torch.float64, device=mesh.device)
    total = sum_along(torch.where(is_norm, own.square(), own / mesh.tensor.size), mesh.tensor)
    return dict(zip(of_pieces, torch.where(is_norm, total.sqrt(), total).tolist(), strict=True))


def _whole(engine: DeepSpeedEngine, parameter: nn.Parameter) -> Tensor:
    """All of the parameter, which ZeRO stage 3 scatters."""
    if engine.zero_optimization_stage() < 3:
        return parameter.detach()
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def _gradient(engine: DeepSpeedEngine, parameter: nn.Parameter) -> Tensor | None:
    """The whole gradient in fp32, wherever ZeRO keeps it; without the loss scale."""
    from deepspeed.utils import safe_get_full_grad

    gradient = safe_get_full_grad(parameter) if engine.zero_optimization() else parameter.grad
    return None if gradient is None else gradient.float() / (loss_scale(engine) or 1.0)


def _optimizer_state_norms(engine: DeepSpeedEngine) -> list[dict[str, float]]:
    """By name, of each state that this process holds."""
    states = engine.basic_optimizer.state.values()
    return [{name: float(torch.as_tensor(value).float().norm()) for name, value in state.items() if name != "step"} for state in states]

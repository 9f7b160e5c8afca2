"""The optimizer's state of a checkpoint into the engine of a run that is spread otherwise: every process takes its part of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron.model.names import weight_name
from megatron.training.loss_scale import go_on_scaling
from megatron.training.optimizer_files import MASTER, SavedOptimizer

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Own = Callable[[str, str, Tensor], Tensor]
"""``(name, key, whole tensor) -> `` what this process's shard has of it, with the rows of this run's vocabulary."""
Put = Callable[[str, Tensor], None]
"""``(key, flat values of this shard)``: copies what this process holds of them to where the optimizer has it."""


def load_rearranged(engine: DeepSpeedEngine, saved: SavedOptimizer, own: Own, *, applied_steps: int, skipped_steps: int) -> None:
    """Fills the optimizer of ``engine``, whose 16-bit weights are those of the checkpoint already."""
    names = {id(parameter): weight_name(name) for name, parameter in engine.module.named_parameters()}
    for parameter, put in _parameters(engine):
        name = names[id(parameter)]
        for key in saved.keys(name):
            put(key, own(name, key, saved.whole(name, key)).flatten())
    if saved.step is not None:
        for moved, state in engine.basic_optimizer.state.items():
            state["step"] = torch.tensor(float(saved.step), device=moved.device)
    if saved.loss_scale is not None:
        go_on_scaling(engine, {"cur_scale": saved.loss_scale})
    engine.global_steps, engine.skipped_steps = applied_steps + skipped_steps, skipped_steps
    engine.global_samples = engine.global_steps * engine.train_batch_size()


def _parameters(engine: DeepSpeedEngine) -> Iterator[tuple[Tensor, Put]]:
    """The parameters of which this process moves a part, in DeepSpeed's wrapper of the optimizer, and how it takes its part."""
    wrapper, optimizer = engine.optimizer, engine.basic_optimizer
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return ((parameter, _put_scattered(engine, parameter)) for parameter in engine.module.parameters())
    if hasattr(wrapper, "bit16_groups"):
        return _in_partitions(optimizer, wrapper.bit16_groups, wrapper.single_partition_of_fp32_groups)
    if hasattr(wrapper, "bf16_groups"):
        return _in_partitions(optimizer, wrapper.bf16_groups, wrapper.fp32_groups_flat_partition)
    if hasattr(wrapper, "fp32_groups"):
        pairs = zip(_joined(wrapper.fp16_groups), _joined(wrapper.fp32_groups), strict=True)
        return ((parameter, _put_whole(optimizer, master)) for parameter, master in pairs)
    moved = _joined(group["params"] for group in optimizer.param_groups)
    return ((parameter, _put_whole(optimizer, parameter)) for parameter in moved)


def _joined(groups: Iterable[Iterable[Tensor]]) -> list[Tensor]:
    return [parameter for group in groups for parameter in group]


def _put_whole(optimizer: torch.optim.Optimizer, master: Tensor) -> Put:
    """Without ZeRO: ``master`` is what the optimizer moves, the parameter itself or its fp32 copy."""

    def put(key: str, values: Tensor) -> None:
        if key == MASTER:
            master.data.copy_(values.view_as(master))
        else:
            _state(optimizer, master, key).copy_(values.view_as(master))

    return put


def _in_partitions(
    optimizer: torch.optim.Optimizer, groups: Iterable[Iterable[Tensor]], partitions: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Put]]:
    """ZeRO 1 and 2, and DeepSpeed's optimizer for bf16 pipelines: each group is one flat partition."""
    for group, partition in zip(groups, partitions, strict=True):
        for parameter in group:
            if parameter._hp_mapping is not None:  # type: ignore[attr-defined]
                yield parameter, _put_slice(optimizer, parameter, partition)


def _put_slice(optimizer: torch.optim.Optimizer, parameter: Tensor, partition: Tensor) -> Put:
    of_parameter = parameter._hp_mapping.lp_fragment_address  # type: ignore[attr-defined]
    of_partition = parameter._hp_mapping.hp_fragment_address  # type: ignore[attr-defined]

    def put(key: str, values: Tensor) -> None:
        target = partition.data if key == MASTER else _state(optimizer, partition, key)
        slice_ = values[of_parameter.start : of_parameter.start + of_parameter.numel]
        target[of_partition.start : of_partition.start + of_partition.numel].copy_(slice_)

    return put


def _put_scattered(engine: DeepSpeedEngine, parameter: nn.Parameter) -> Put:
    """ZeRO 3: an equal piece on every rank, the last ones padded, in one flat tensor of several parameters."""
    wrapper = engine.optimizer
    group, start, length = wrapper.grad_position[wrapper.get_param_id(parameter)]
    rank = wrapper._get_param_partition_rank(parameter)
    flat = wrapper.fp32_partitioned_groups_flat[group]

    def put(key: str, values: Tensor) -> None:
        target = flat.data if key == MASTER else _state(engine.basic_optimizer, flat, key)
        piece = values[rank * length : (rank + 1) * length]
        target[start : start + len(piece)].copy_(piece)

    return put


def _state(optimizer: torch.optim.Optimizer, of: Tensor, key: str) -> Tensor:
    """An average that the optimizer keeps of the tensor that it moves; zeros where it has none yet."""
    state = optimizer.state[of]
    if key not in state:
        state[key] = torch.zeros_like(of.data)
    return state[key]

"""The few things that all processes of a run do together, apart from what DeepSpeed does itself."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor

from megatron.parallel.mesh import Axis, Mesh

T = TypeVar("T")


def mean_over_data_parallel(value: Tensor, mesh: Mesh) -> Tensor:
    """The mean of ``value`` (any shape, floating) over the data-parallel replicas, on each of them."""
    if mesh.data.size == 1:
        return value
    total = value.clone()
    distributed.all_reduce(total)  # shards and stages of one replica hold the same value, so the world's mean is the replicas'
    return total / mesh.world_size


def from_last_stage(value: Tensor, mesh: Mesh) -> Tensor:
    """What the last pipeline stage passed as ``value``, on all stages of the replica; the others' has the same shape and dtype."""
    if mesh.pipe.size == 1:
        return value
    value = value.contiguous()
    distributed.broadcast(value, group=mesh.pipe.group, group_src=mesh.pipe.size - 1)
    return value


def largest_of_stages(value: int, mesh: Mesh) -> int:
    """The largest ``value`` of any stage of the replica, on all of them."""
    if mesh.pipe.size == 1:
        return value
    largest = torch.tensor(value, device=mesh.device)
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=mesh.pipe.group)
    return int(largest)


def gather_stages(value: T, mesh: Mesh) -> list[T]:
    """The ``value`` of every pipeline stage of the replica, in order, on all of them. Any picklable object."""
    if mesh.pipe.size == 1:
        return [value]
    boxes: list[T] = [value] * mesh.pipe.size
    distributed.all_gather_object(boxes, value, group=mesh.pipe.group)
    return boxes


def sum_along(value: Tensor, axis: Axis) -> Tensor:
    """The sum of every process's ``value`` along a direction of the mesh, on each of them."""
    if axis.size == 1:
        return value
    total = value.clone()
    distributed.all_reduce(total, group=axis.group)
    return total


def mean_over_context(value: Tensor, mesh: Mesh) -> Tensor:
    """The mean of ``value`` (any shape, floating) over the pieces of the same samples, on each process that has one."""
    return sum_along(value, mesh.context) / mesh.context.size


def is_true_anywhere(flag: bool, mesh: Mesh) -> bool:
    """Whether ``flag`` is true on any process."""
    if mesh.world_size == 1:
        return flag
    together = torch.tensor([int(flag)], device=mesh.device)
    distributed.all_reduce(together, op=distributed.ReduceOp.MAX)
    return bool(together.item())


def barrier(mesh: Mesh) -> None:
    """Returns when every process has come here."""
    if mesh.world_size > 1:
        distributed.barrier()


def broadcast_object(value: T, mesh: Mesh) -> T:
    """What the first process passed as ``value``, on all of them. Any picklable object."""
    if mesh.world_size == 1:
        return value
    box = [value if mesh.is_first else None]
    distributed.broadcast_object_list(box, src=0, device=mesh.device)
    return box[0]  # type: ignore[return-value]


def gather_objects(value: T, mesh: Mesh) -> list[T]:
    """Every process's ``value`` in the order of ranks, on all of them. Any picklable object."""
    if mesh.world_size == 1:
        return [value]
    boxes: list[T] = [value] * mesh.world_size
    distributed.all_gather_object(boxes, value)
    return boxes

"""Who this process is among the others of a run, and the start of their communication through DeepSpeed."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.config.schema import Config

SHARED_MEMORY_OP = "deepspeed_shm_comm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One direction of the mesh: this process and those whose places differ from its own in this direction only."""

    size: int = 1
    rank: int = 0
    """Place of this process along it."""
    group: ProcessGroup | None = None
    """For collectives along it, in the order of ranks. None where one process is the whole run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """The place of this process in the grid of pipeline stages x data-parallel replicas x pieces of a sequence x tensor-parallel shards.

    Ranks count the last direction fastest, as in Megatron and DeepSpeed.
    """

    world_size: int
    rank: int
    local_rank: int
    """Place among the processes of this machine; also the number of its device."""
    device: torch.device
    pipe: Axis = Axis()
    """Each stage has some of the layers."""
    data: Axis = Axis()
    """Each replica has samples of its own."""
    context: Axis = Axis()
    """Each has a piece of the same samples."""
    tensor: Axis = Axis()
    """Each has a shard of every layer."""
    model: Axis = Axis()
    """Stages and shards together: the processes that hold one whole model."""
    gradients: Axis = Axis()
    """Replicas and pieces together: the processes that hold the same parameters and sum their gradients."""

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the run: prints, logs, writes what is written once."""
        return self.rank == 0

    @classmethod
    def start(cls, config: Config) -> Mesh:
        """The mesh of this process, communication started.

        Rank and size come from RANK, LOCAL_RANK and WORLD_SIZE (DeepSpeed's launcher, torchrun), else from srun's or mpirun's
        variables; without any, this process is the whole run.
        """
        _complete_environment(config)
        world_size, rank, local_rank = (int(os.environ[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
        if world_size != config.runtime.world_size:
            raise ValueError(
                f"The launcher started {world_size} processes but the configuration was resolved for {config.runtime.world_size} devices: "
                "start it again through deepy.py, or resolve it for this many."
            )
        device = _own_device(config, local_rank)
        _start_communication(device, is_alone=world_size == 1)
        return cls(world_size=world_size, rank=rank, local_rank=local_rank, device=device, **_axes(config, rank=rank))


def end_communication() -> None:
    """Leaves the other processes, as the last thing that this one does: torch's threads for them should not outlive the interpreter."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


DIRECTIONS = ("pipe", "data", "context", "tensor")


def _axes(config: Config, *, rank: int) -> dict[str, Axis]:
    """Every direction of the mesh as process ``rank`` sees it. All processes make all groups, in the same order."""
    parallel = config.parallel
    sizes = (max(parallel.pipe_parallel_size, 1), config.batch.data_parallel_size, parallel.context_parallel_size, parallel.model_parallel_size)
    grid = torch.arange(math.prod(sizes)).view(sizes)
    axes = {name: _axis(grid, [direction], rank=rank) for direction, name in enumerate(DIRECTIONS)}
    return axes | {"model": _axis(grid, [0, 3], rank=rank), "gradients": _axis(grid, [1, 2], rank=rank)}


def _axis(grid: Tensor, directions: list[int], *, rank: int) -> Axis:
    """The processes that differ from ``rank`` in these ``directions`` of the ``grid`` of ranks only."""
    lines = grid.movedim(directions, list(range(-len(directions), 0))).flatten(-len(directions)).flatten(0, -2).tolist()
    if grid.numel() == 1:
        return Axis()
    own: list[int] = next(line for line in lines if rank in line)
    group, _ = torch.distributed.new_subgroups_by_enumeration(lines)
    return Axis(size=len(own), rank=own.index(rank), group=group)


def _complete_environment(config: Config) -> None:
    """Fills in the variables that DeepSpeed reads where no launcher has set them."""
    if "RANK" not in os.environ:
        os.environ.update(_started_by_a_scheduler(config) or _alone(config))
    os.environ.setdefault("LOCAL_RANK", "0")
    if config.launch.master_addr is not None:
        os.environ.setdefault("MASTER_ADDR", config.launch.master_addr)
        os.environ.setdefault("MASTER_PORT", str(config.launch.master_port))
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"This is process {os.environ['RANK']} of several, but {' and '.join(missing)} are not set: let the launcher set them, or give "
            "master_addr and master_port in the configuration."
        )


SCHEDULERS = {
    "Slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    "PMI": ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
}


def _started_by_a_scheduler(config: Config) -> dict[str, str] | None:
    """Rank and size as srun or mpirun announce them. None where nobody does, or for another number of processes than the run has:
    a shell inside a Slurm allocation sees the allocation's variables too."""
    for names in SCHEDULERS.values():
        if all(name in os.environ for name in names) and int(os.environ[names[2]]) == config.runtime.world_size > 1:
            return dict(zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), (os.environ[name] for name in names), strict=True))
    return None


def _alone(config: Config) -> dict[str, str]:
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(config.launch.master_port)}


def _own_device(config: Config, local_rank: int) -> torch.device:
    if config.runtime.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"Process {local_rank} of this machine has no device: torch sees {torch.cuda.device_count()}. "
            "Start at most one process a device (slots in the hostfile, num_gpus)."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _start_communication(device: torch.device, *, is_alone: bool) -> None:
    """Joins the other processes: gloo on CPUs, NCCL on GPUs. A process alone needs no port."""
    import deepspeed  # the accelerator is chosen at its import, from DS_ACCELERATOR
    import deepspeed.ops

    if device.type == "cpu":
        # DeepSpeed would compile its shared-memory all-reduce here: a minute, a compiler, and a lock file that a killed process
        # leaves behind for all later ones. Only its inference engine calls that operator.
        deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor", category=FutureWarning)  # DeepSpeed 0.19 calls old names
    backend = "gloo" if device.type == "cpu" else "nccl"
    if is_alone and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)

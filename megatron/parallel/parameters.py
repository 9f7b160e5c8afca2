"""What the engine must know of a sharded model's parameters: which are pieces, which are copies, and whose gradients are parts of a sum."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.parallel.collectives import sum_along
from megatron.parallel.mesh import Axis
from megatron.parallel.regions import TensorParallel, start_sum, wait
from megatron.parallel.shards import cut_of


def prepare_parameters(named: Iterable[tuple[str, nn.Parameter]], config: ModelConfig, parallel: TensorParallel) -> None:
    """Readies parameters, named ``sequential.N.<name>``, for training in shards. Once, when their memory is theirs.

    Pieces get ``tensor_model_parallel``, by which DeepSpeed counts each number once in a gradient's norm: of other parameters it counts
    those of the first shard. Copies that have seen a piece of the sequence only, or some heads only, get the sum of all shards' gradients.
    Of a summed bias the first shard trains all, so that it moves as on one device.
    """
    if parallel.size == 1:
        return

    def summed(gradient: Tensor) -> Tensor:
        return wait(start_sum(gradient, parallel.group))

    for name, parameter in named:
        kind = cut_of(name, config).kind
        if kind in ("rows", "columns"):
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        elif kind == "summed":
            parameter.requires_grad_(parallel.rank == 0)
        elif parallel.is_sequence_cut or ".qk_layernorm." in name:
            parameter.register_hook(summed)


def is_piece(parameter: nn.Parameter) -> bool:
    """Whether other shards hold the rest of it."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def norm_over_shards(tensors: Iterable[tuple[nn.Parameter, Tensor]], *, shards: Axis, along: Axis) -> Tensor:
    """Norm of all numbers that the processes ``along`` an axis hold together, copies of shards and stages counted once. A scalar, the same on each.

    ``tensors``: parameters of this process, each with its gradient, or whatever else has its shape.
    """
    counted = [
        tensor for parameter, tensor in tensors if (shards.rank == 0 or is_piece(parameter)) and not getattr(parameter, "ds_pipe_replicated", False)
    ]
    own = torch.nn.utils.get_total_norm(counted)
    return own if along.size == 1 else sum_along(own.square(), along).sqrt()

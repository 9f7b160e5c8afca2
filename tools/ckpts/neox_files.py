"""Weights into a checkpoint folder of GPT-NeoX's layout, cut for any tensor- and pipeline-parallel size.

without pipeline stages (pp 0)    mp_rank_RR_model_states.pt holds everything of tensor-parallel rank RR
with stages (pp 1 and above)      layer_XX-model_YY-model_states.pt holds layer XX of rank YY, whatever stage computes it, and
                                  mp_rank_RR_model_states.pt of every process only counts
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron.config.schema import Config, ModelConfig
from megatron.parallel.shards import split
from megatron.training.manifest import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSizes:
    tensor: int = 1
    pipeline: int = 0


def write_weights(step: Path, state: Mapping[str, Tensor], config: Config, sizes: ParallelSizes, *, iteration: int) -> None:
    """Writes the model files of the folder ``step``. Keys of ``state`` are ``sequential.N.<name>``, its tensors whole."""
    shards = shards_of(state, config.model, ranks=sizes.tensor)
    if sizes.pipeline:
        for rank, shard in enumerate(shards):
            for place, layer in _by_layer(shard, config.model).items():
                torch.save(layer, step / f"layer_{place:02}-model_{rank:02}-model_states.pt")
    for rank in range(max(1, sizes.pipeline) * sizes.tensor):
        module = None if sizes.pipeline else shards[rank]
        torch.save(_engine_state(module, config, sizes, iteration=iteration), step / f"mp_rank_{rank:02}_model_states.pt")


def shards_of(state: Mapping[str, Tensor], model: ModelConfig, *, ranks: int) -> list[dict[str, Tensor]]:
    """The state dict of each tensor-parallel rank."""
    pieces = {name: split(name, value, model, ranks=ranks) for name, value in state.items()}
    return [{name: of_ranks[rank] for name, of_ranks in pieces.items()} for rank in range(ranks)]


def _by_layer(shard: Mapping[str, Tensor], model: ModelConfig) -> dict[int, dict[str, Tensor]]:
    """Tensors by the place of their layer. With tied embeddings the last place holds the first layer again, as in GPT-NeoX."""
    layers: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, value in shard.items():
        _, place, own = name.split(".", 2)
        layers[int(place)][own] = value
    if not model.no_weight_tying:
        layers[model.num_layers + 4] = layers[0]
    return layers


def _engine_state(module: Mapping[str, Tensor] | None, config: Config, sizes: ParallelSizes, *, iteration: int) -> dict[str, object]:
    """What DeepSpeed and GPT-NeoX look for beside the weights; there is no optimizer state."""
    return {
        "module": module,
        "optimizer": None,
        "lr_scheduler": None,
        "iteration": iteration,
        "args": Shape.of(config).model_dump(),
        "dp_world_size": 1,
        "mp_world_size": sizes.tensor,
        "global_steps": iteration,
        "global_samples": 0,
        "skipped_steps": 0,
        "micro_steps": 0,
    }

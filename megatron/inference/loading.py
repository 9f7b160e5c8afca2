"""The model of a checkpoint, whole on one device, whatever layout and parallel sizes it was saved with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.config.schema import Config
from megatron.model.gpt import DTYPES, GPTModel, build_model
from megatron.training.checkpoint import weights_of
from megatron.training.manifest import Found, find_checkpoint, finished_iterations
from megatron.training.weights import load_into


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    model: GPTModel
    """In evaluation mode, in the run's precision."""
    folder: Path
    """The checkpoint that it came from."""
    iteration: int


def load_model(config: Config, device: torch.device) -> LoadedModel:
    """The model that `load` and `iteration` name. ValueError where there is none, or where it is not this configuration's."""
    found = _checkpoint(config)
    model = build_model(config, device="meta")
    weights = weights_of(found, config.model, row_biases=config.checkpoint.row_biases)
    load_into(model, weights, source=found.folder, dtype=DTYPES[config.precision.precision], device=device)
    return LoadedModel(model=model.requires_grad_(False).eval(), folder=found.folder, iteration=found.iteration)


def _checkpoint(config: Config) -> Found:
    if config.checkpoint.load is None:
        raise ValueError("load is not set: name the folder of the checkpoint to use (load: checkpoints), as it was saved by train.py.")
    if not finished_iterations(Path(config.checkpoint.load)):
        raise ValueError(f"load ({config.checkpoint.load}) holds no finished checkpoint: name the folder above a global_stepN that train.py saved.")
    found = find_checkpoint(config.checkpoint)
    assert found is not None
    return found

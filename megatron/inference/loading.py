"""The model of a checkpoint, whole on one device, whatever layout and parallel sizes it was saved with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron.config.schema import Config
from megatron.model.gpt import DTYPES, GPTModel, build_model
from megatron.training.checkpoint import Found, find_checkpoint, finished_iterations
from megatron.training.weights import read_weights


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
    weights = read_weights(found.folder, model=config.model)
    model = build_model(config, device="meta")
    _check_shapes(weights.state, model, found)
    dtype = DTYPES[config.precision.precision]
    model.load_state_dict({name: value.to(device, dtype) for name, value in weights.state.items()}, assign=True)
    return LoadedModel(model=model.requires_grad_(False).eval(), folder=found.folder, iteration=found.iteration)


def _checkpoint(config: Config) -> Found:
    if config.checkpoint.load is None:
        raise ValueError("load is not set: name the folder of the checkpoint to use (load: checkpoints), as it was saved by train.py.")
    if not finished_iterations(Path(config.checkpoint.load)):
        raise ValueError(f"load ({config.checkpoint.load}) holds no finished checkpoint: name the folder above a global_stepN that train.py saved.")
    found = find_checkpoint(config.checkpoint)
    assert found is not None
    return found


def _check_shapes(state: Mapping[str, Tensor], model: GPTModel, found: Found) -> None:
    wanted = model.state_dict()
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    differing = [
        f"{name} is {tuple(state[name].shape)} in the checkpoint and {tuple(wanted[name].shape)} in the configuration"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name].shape
    ]
    mistakes = [f"it lacks {_some(missing)}"] * bool(missing) + [f"it also has {_some(unknown)}"] * bool(unknown) + sorted(differing)[:3]
    if mistakes:
        raise ValueError(f"The checkpoint {found.folder} is of another shape: {'; '.join(mistakes)}. Use the configuration it was trained with.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

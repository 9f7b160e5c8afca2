"""What a checkpoint folder says of the model in it: the run's YAML, and the transformers model that it began from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from megatron.config.keys import canonical
from megatron.config.loader import load_config
from megatron.config.schema import Config
from megatron.training.weights import saved_config_files, saved_overrides, step_directory
from tools.ckpts.hf_folder import read_config

HF_FOLDER = "hf"
"""Of a checkpoint that was made from a transformers model: its configuration and tokenizer."""


def run_config(directory: Path, *, config_files: Sequence[Path] | None = None) -> Config:
    """The run's configuration, as if for one device: a model is the same however many trained it.

    By default that saved with the checkpoint, command line included; ``config_files`` take its place.
    """
    overrides = {} if config_files else {canonical(key): value for key, value in saved_overrides(directory).items()}
    config_files = config_files or saved_config_files(directory)
    if not config_files:
        raise ValueError(f"{directory} has no configs/ folder: name the run's YAML files with --config_file.")
    batch = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    return load_config(config_files, overrides=overrides | batch, world_size=1, holds_whole_models=True)


def origin(directory: Path, *, like: Path | None = None) -> PreTrainedConfig | None:
    """The configuration of the transformers model that a checkpoint began from; None where nothing says."""
    folder = origin_folder(directory, like=like)
    return read_config(folder) if like is not None or (folder / "config.json").is_file() else None


def origin_folder(directory: Path, *, like: Path | None = None) -> Path:
    """Where that model's small files are, if anywhere: the folder ``like``, else what the converter left in the checkpoint."""
    return step_directory(directory) / HF_FOLDER if like is None else like

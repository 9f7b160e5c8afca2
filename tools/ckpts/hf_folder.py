"""A folder that a transformers model was saved to: its configuration, and its weights as they are in the files."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

import sepllm.hf  # noqa: F401  (makes sepllm_gpt_neox known)

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Whole, or as the parts that ``<name>.index.json`` lists."""
BESIDE_THE_WEIGHTS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)
"""Small files of a folder: its configuration and its tokenizer."""


def read_config(folder: Path) -> PreTrainedConfig:
    """The folder's configuration. No code of the folder is run."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give the local folder of a transformers model.")
    return AutoConfig.from_pretrained(folder)


def read_state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's weight files, in its own dtype, on the CPU."""
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if missing := [part for part in parts if not (folder / part).is_file()]:
                raise ValueError(f"{folder} lacks {', '.join(missing[:3])}, which {index.name} lists: copy the whole folder.")
            return {key: value for part in parts for key, value in _read_file(folder / part).items()}
        if (folder / name).is_file():
            return _read_file(folder / name)
    raise ValueError(f"{folder} has neither {' nor '.join(WEIGHT_FILES)}, whole or in parts: give the folder with the weights.")


def dtype_of(state: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of most of the numbers."""
    counts: Counter[torch.dtype] = Counter()
    for value in state.values():
        counts[value.dtype] += value.numel()
    return counts.most_common(1)[0][0]


def copy_small_files(source: Path, target: Path) -> None:
    """The configuration and the tokenizer of one folder, as they are, into another."""
    target.mkdir(parents=True, exist_ok=True)
    for name in BESIDE_THE_WEIGHTS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is a pickle of more than tensors, which could run code: take the folder's safetensors files instead.") from error

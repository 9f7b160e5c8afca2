"""What a run reads and writes: the tokenizer's files, the data, the folder of checkpoints. Looked at before anything is started."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path

from megatron.config.checks import check_startable
from megatron.config.schema import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One thing the configuration names."""

    key: str
    name: str
    files: tuple[str, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """Those that are not there. Remote ones are asked for over the network."""
        return tuple(name for name in self.files if not _exists(name))


NAMED_TOKENIZERS = ("TiktokenTokenizer", "HFGPT2Tokenizer")
"""Kinds that are opened by a name, which need not be that of a file."""


def tokenizer_inputs(config: Config) -> list[Input]:
    """The files of a tokenizer that is not opened by name."""
    if config.tokenizer.tokenizer_type in NAMED_TOKENIZERS:
        return []
    named = {"vocab_file": config.tokenizer.vocab_file, "merge_file": config.tokenizer.merge_file}
    return [Input(key=key, name=name, files=(name,)) for key, name in named.items() if name is not None]


def data_inputs(config: Config) -> list[Input]:
    """The pairs of token files, those of training first."""
    data = config.data
    named = {
        "data_path": (data.data_path,) if data.data_path is not None else None,
        "train_data_paths": data.train_data_paths,
        "valid_data_paths": data.valid_data_paths,
        "test_data_paths": data.test_data_paths,
        "train_label_data_paths": data.train_label_data_paths,
        "valid_label_data_paths": data.valid_label_data_paths,
        "test_label_data_paths": data.test_label_data_paths,
    }
    return [Input(key=key, name=prefix, files=(f"{prefix}.bin", f"{prefix}.idx")) for key, prefixes in named.items() for prefix in prefixes or ()]


def training_prefix(config: Config) -> str | None:
    """The first prefix of training data that is there."""
    training = [given for given in data_inputs(config) if given.key in ("data_path", "train_data_paths")]
    return next((given.name for given in training if not given.missing), None)


def obstacles(config: Config, *, script: str, has_fp16: bool) -> list[str]:
    """Why this script cannot be started, one sentence each. `train.py` reads data and writes `save`; every script reads the tokenizer."""
    found = check_startable(config, has_fp16=has_fp16)
    if config.model.vocab_size is not None:
        found += [f"{given.key}: {_listed(given.missing)}: correct the path." for given in tokenizer_inputs(config) if given.missing]
    if Path(script).name != "train.py":
        return found
    found += [f"{given.key}: {_listed(given.missing)}: {_prefix_remedy(given.name)}" for given in data_inputs(config) if given.missing]
    if not data_inputs(config):
        found.append("data_path and train_data_paths are both missing: name the data to train on.")
    save = config.checkpoint.save
    if save is not None and (reason := _unwritable(Path(save))):
        found.append(f"save is {save}, and {reason}: choose a folder you may write to, or leave save out.")
    return found


def nearest_folder(folder: Path) -> Path:
    """This folder, or the nearest above it that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place))


def _exists(name: str) -> bool:
    from megatron.data.remote import exists, is_remote

    return exists(name) if is_remote(name) else os.path.exists(name)


def _listed(files: tuple[str, ...]) -> str:
    return f"{' and '.join(files)} {'does' if len(files) == 1 else 'do'} not exist"


def _prefix_remedy(name: str) -> str:
    """What to write in place of a prefix that names no pair."""
    if name.endswith((".bin", ".idx")) and os.path.exists(name):
        return f"a prefix is meant, so give {name[:-4]}."
    started = sorted(Path(name).parent.glob(f"{glob.escape(Path(name).name)}_*_document.idx"))
    if started:
        return f"did you mean {str(started[0])[:-4]}?"
    return "correct the prefix, or make the data with prepare_data.py."


def _unwritable(folder: Path) -> str | None:
    """Why this folder, which need not exist yet, cannot be written to."""
    nearest = nearest_folder(folder)
    if not nearest.is_dir():
        return f"{nearest} is a file"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} is read-only for you"

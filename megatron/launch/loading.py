"""The configuration of a start, with the vocabulary of every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from megatron.config.loader import LoadedConfig, load_config_with_notes
from megatron.config.resolve import Device
from megatron.launch.inputs import NAMED_TOKENIZERS, tokenizer_inputs

WHOLE_MODELS = ("generate.py", "eval.py")
"""Scripts that hold the whole model in every process."""


def load(paths: Sequence[Path], *, overrides: Mapping[str, object], world_size: int, device: Device, script: str) -> LoadedConfig:
    """The resolved configuration of a start of ``script``, and its notes. ValueError with every mistake.

    The loader reads the size of JSON vocabularies by itself; other files that are there, and tokenizers with a name, are opened and asked.
    """
    resolve = partial(
        load_config_with_notes,
        paths,
        overrides=overrides,
        world_size=world_size,
        device=device,
        holds_whole_models=Path(script).name in WHOLE_MODELS,
    )
    loaded = resolve()
    files, is_named = tokenizer_inputs(loaded.config), loaded.config.tokenizer.tokenizer_type in NAMED_TOKENIZERS
    if loaded.config.model.vocab_size is not None or not (files or is_named) or any(given.missing for given in files):
        return loaded
    from megatron.data.tokenizer import build_tokenizer

    size = build_tokenizer(loaded.config.tokenizer).vocab_size
    return resolve(vocab_size=size)

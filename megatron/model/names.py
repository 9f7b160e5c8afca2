"""What parameters are called: GPT-NeoX's names, which checkpoints, initial weights and metrics go by."""

from __future__ import annotations

import re

TIED = "embedding"
"""Under this key a pipeline's first and last stage share the word embeddings."""


def weight_name(name: str) -> str:
    """``sequential.N.<name>`` of a parameter, whether the whole model has it or a stage, where DeepSpeed calls it ``N.<name>``.

    >>> weight_name("2.attention.dense.weight"), weight_name(f"tied_modules.{TIED}.word_embeddings.weight")
    ('sequential.2.attention.dense.weight', 'sequential.0.word_embeddings.weight')
    """
    name = name.replace(f"tied_modules.{TIED}.", "0.", 1)
    return re.sub(r"^(?=\d+\.)", "sequential.", name)


def place_of(name: str) -> int:
    """N of ``sequential.N.<name>``."""
    return int(name.split(".")[1])

"""Whether a training model and a transformers model are the same: their fp32 logits on the same tokens, with and without padding."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron.config.schema import Config
from megatron.data.indexed import IndexedDataset
from megatron.launch.inputs import training_prefix
from megatron.model.gpt import build_model
from sepllm.layout import TokenLayout

TOLERANCE = 1e-4
"""Largest difference of two fp32 logits that rounding explains, for logits up to 1; in proportion above."""
EMBEDDINGS = "sequential.0.word_embeddings.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """Largest absolute differences between the logits of two models."""

    text: float
    """Rows of text, or of random ids."""
    padding: float
    """The same rows, one padded on its left and one on its right; of the text tokens."""
    largest_logit: float

    @property
    def largest(self) -> float:
        return max(self.text, self.padding)

    @property
    def is_rounding(self) -> bool:
        return self.largest <= TOLERANCE * max(1.0, self.largest_logit)


@torch.no_grad()
def compare(state: Mapping[str, Tensor], config: Config, folder: Path, *, rows: int) -> Differences:
    """How the training model with these weights differs from the folder's model, over the first ``rows`` tokens of the vocabulary."""
    model = config.model.model_copy(update={"padded_vocab_size": state[EMBEDDINGS].shape[0], "rotary_angles": "fp32"})
    config = config.model_copy(update={"model": model})
    ids = _ids(config, rows)
    padding = _padding(ids)
    trained = build_model(config, device="meta", dtype=torch.float32)
    trained.load_state_dict({name: value.float() for name, value in state.items()}, strict=True, assign=True)
    pattern = config.attention.prefill
    expected = trained.eval()(ids, TokenLayout.from_ids(ids, pattern))[..., :rows]
    expected_padded = trained(ids, TokenLayout.from_ids(ids, pattern, attention_mask=padding))[..., :rows]
    del trained
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = other(ids, use_cache=False).logits
    found_padded = other(ids, attention_mask=padding, use_cache=False).logits
    is_text = padding.bool()
    return Differences(
        text=float((found - expected).abs().max()),
        padding=float((found_padded[is_text] - expected_padded[is_text]).abs().max()),
        largest_logit=float(found.abs().max()),
    )


def _padding(ids: Tensor) -> Tensor:
    """1 on text: the first row lacks the first third, the second the last quarter. ``[2, T]``"""
    length = ids.shape[1]
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    mask[1, length - length // 4 :] = 0
    return mask


def _ids(config: Config, rows: int) -> Tensor:
    """Two rows of the run's training text where that is here, else of seeded ids; longer than most windows. ``[2, T]``"""
    length = min(config.model.seq_length, 512)
    prefix = training_prefix(config)
    if prefix is not None:
        documents = IndexedDataset(prefix)
        stream = itertools.chain.from_iterable(documents[place].tolist() for place in range(len(documents)))
        text = torch.tensor(list(itertools.islice(stream, 2 * length)))
        if len(text) == 2 * length and int(text.max()) < rows:
            return text.view(2, length)
    return _seeded_ids(config, rows, length)


def _seeded_ids(config: Config, rows: int, length: int) -> Tensor:
    """Every tenth or so is a separator. ``[2, length]``"""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (2, length), generator=generator)
    separators = torch.tensor(sorted(config.attention.prefill.separator_ids) or [0])
    chosen = separators[torch.randint(len(separators), ids.shape, generator=generator)]
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.1, chosen, ids)

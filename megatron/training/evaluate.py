"""Loss on validation or test data, without a trace in the training run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron.data.batch import Batch
from megatron.data.tokenizer import Tokenizer
from megatron.parallel.collectives import from_last_stage, mean_over_context, mean_over_data_parallel
from megatron.parallel.mesh import Mesh
from megatron.training import stages
from megatron.training.pieces import own_piece
from megatron.training.step import batch_loss

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

LARGEST_EXPONENT = 20.0
"""Perplexities are cut at exp(20), as in GPT-NeoX, so that charts of a young model stay readable."""


@torch.no_grad()
def evaluate(
    engine: DeepSpeedEngine, batches: Iterator[Batch], mesh: Mesh, *, count: int, label: str, tokenizer: Tokenizer | None = None
) -> dict[str, float]:
    """``<label>/lm_loss`` and ``<label>/lm_loss_ppl``: mean over ``count`` micro-batches of each replica.

    With a ``tokenizer`` also ``<label>/lm_loss_char_lvl_ppl``: perplexity for each character of the labels' text.
    """
    engine.eval()
    labels = Labels(batches, tokenizer)
    losses = (stages.evaluated_losses if mesh.pipe.size > 1 else evaluated_losses)(engine, labels, mesh, count=count)
    engine.train()
    total = torch.tensor([float(losses.double().sum()), labels.tokens, labels.characters], dtype=torch.float64, device=mesh.device)
    loss, tokens, characters = mean_over_data_parallel(mean_over_context(from_last_stage(total / count, mesh), mesh), mesh).tolist()
    metrics = {f"{label}/lm_loss": loss, f"{label}/lm_loss_ppl": math.exp(min(LARGEST_EXPONENT, loss))}
    if tokenizer is not None:
        metrics[f"{label}/lm_loss_char_lvl_ppl"] = math.exp(min(LARGEST_EXPONENT, loss * tokens / max(characters, 1)))
    return metrics


def evaluated_losses(engine: DeepSpeedEngine, batches: Iterator[Batch], mesh: Mesh, *, count: int) -> Tensor:
    """The losses of ``count`` micro-batches by a model that each process has whole."""
    return torch.stack([batch_loss(engine, own_piece(next(batches), mesh)) for _ in range(count)])


class Labels:
    """An iterator of micro-batches that counts the tokens and, for a ``tokenizer``, the characters of the labels that passed."""

    def __init__(self, batches: Iterator[Batch], tokenizer: Tokenizer | None) -> None:
        self._batches, self._tokenizer = batches, tokenizer
        self.tokens = self.characters = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        if self._tokenizer is not None:
            self.tokens += batch.labels.numel()
            self.characters += sum(len(self._tokenizer.decode(row)) for row in batch.labels.tolist())
        return batch

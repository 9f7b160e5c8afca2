"""Loss on validation or test data, without a trace in the training run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from megatron.data.batch import Batch
from megatron.data.tokenizer import Tokenizer
from megatron.parallel.collectives import mean_over_data_parallel
from megatron.parallel.mesh import Mesh
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
    total = torch.zeros(3, dtype=torch.float64)  # loss, tokens, characters
    for _ in range(count):
        batch = next(batches)
        total[0] += float(batch_loss(engine, batch.to(mesh.device)))
        if tokenizer is not None:
            total[1] += batch.labels.numel()
            total[2] += sum(len(tokenizer.decode(row)) for row in batch.labels.tolist())
    engine.train()
    loss, tokens, characters = mean_over_data_parallel((total / count).to(mesh.device), mesh).tolist()
    metrics = {f"{label}/lm_loss": loss, f"{label}/lm_loss_ppl": math.exp(min(LARGEST_EXPONENT, loss))}
    if tokenizer is not None:
        metrics[f"{label}/lm_loss_char_lvl_ppl"] = math.exp(min(LARGEST_EXPONENT, loss * tokens / max(characters, 1)))
    return metrics

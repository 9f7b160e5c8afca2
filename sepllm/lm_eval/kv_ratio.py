"""Which part of its keys a text needs, each text by itself: neither padding nor the other rows of a batch count."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor
from transformers import LogitsProcessor

from sepllm.hf import Attachment, SepCache
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern


class TextRatios:
    """r.KV of each text that a model read, as fractions."""

    def __init__(self) -> None:
        self._ratios: list[float] = []

    def __len__(self) -> int:
        return len(self._ratios)

    def add(self, ratio: float) -> None:
        self._ratios.append(ratio)

    def mean(self) -> float | None:
        """Over texts, long or short alike; None before the first."""
        return fmean(self._ratios) if self._ratios else None


def text_ratio(ids: Sequence[int] | Tensor, pattern: AttentionPattern, *, pads_by_id: bool, attachment: Attachment | None) -> float:
    """Keys that the last token of the text ``ids [S]`` reads, over all its tokens: the paper's r.KV as a fraction.

    ``pads_by_id``: a leading run of the pattern's padding id is no text, as in models that are given no attention mask. ``attachment``: of the
    model that reads, whose own sliding window counts too.
    """
    row = torch.as_tensor(ids, dtype=torch.long)[None]
    layout = TokenLayout.from_ids(row, pattern, attention_mask=None if pads_by_id else torch.ones_like(row))
    return layout.kv_ratio() if attachment is None else attachment.ratio_of(layout)


class StoredKeys(LogitsProcessor):
    """Notes after each forward pass what a SepCache stores for each row; in ``generate`` as a processor that leaves the scores as they are."""

    def __init__(self, cache: SepCache) -> None:
        self.cache = cache
        self._stored: list[Tensor] = []
        self._seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.note()
        return scores

    def note(self) -> None:
        """What is stored after a forward pass."""
        histories = [layer.history.stored for layer in self.cache.layers]
        self._stored.append(torch.stack([stored.counts for stored in histories]).sum(0))
        self._seen.append(torch.stack([stored.texts for stored in histories]).sum(0))

    def ratio(self, row: int, *, num_steps: int, num_rows: int | None = None) -> float:
        """Tokens stored over tokens seen, both added up over the first ``num_steps`` passes, layers and the row's beams.

        ``num_rows``: of the batch, where the cache has a row for each beam.
        """
        num_rows = num_rows or len(self._stored[0])
        stored, seen = (torch.stack(steps[:num_steps]).unflatten(1, (num_rows, -1))[:, row].sum() for steps in (self._stored, self._seen))
        return float(stored / seen)

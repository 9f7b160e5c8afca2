"""One micro-batch as the model takes it: inputs, labels, which of them count, and what the pattern lets each query read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    ids: Tensor
    """``[B, S]`` int64: what the model reads."""
    labels: Tensor
    """``[B, S]`` int64: the token after each."""
    loss_mask: Tensor
    """``[B, S]`` float32: 1 where the label counts, else 0."""
    layout: TokenLayout
    """Of ``ids``, with the key ranges of every layer made."""

    @classmethod
    def from_rows(
        cls,
        text: Tensor,
        pattern: AttentionPattern,
        *,
        label: Tensor | None = None,
        masked_id: int | None = None,
        document_end_id: int | None = None,
    ) -> Batch:
        """Batch of the rows ``text [B, S + 1]`` int64: all but the last token are read, all but the first are labels.

        ``label [B, S + 1]``: labels of their own, below 0 where none counts. ``masked_id``: no loss where this token is the input
        (`eod_mask_loss`). ``document_end_id``: attention and positions start anew after it; by default a row is one text.
        """
        ids = text[:, :-1].contiguous()
        labels = (text if label is None else label)[:, 1:]
        counts = labels >= 0
        if masked_id is not None:
            counts &= ids != masked_id
        layout = TokenLayout.from_ids(ids, pattern, document_end_id=document_end_id)
        for layer in range(pattern.num_layers):
            layout.ranges(layer)
        return cls(ids=ids, labels=labels.clamp(min=0), loss_mask=counts.float(), layout=layout)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device (the copy does not wait for it)."""
        ids, labels, mask = (tensor.to(device, non_blocking=True) for tensor in (self.ids, self.labels, self.loss_mask))
        return Batch(ids=ids, labels=labels, loss_mask=mask, layout=self.layout.to(device))

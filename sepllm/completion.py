"""New tokens for a batch of prompts, chosen one after another: the loop behind generate.py and behind `sepllm.hf.complete`.

What reads the tokens is a `Reader`; this file knows logits and token ids only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sepllm.sampling import Sampling, next_tokens


class Reader(Protocol):
    """A model in the middle of some texts, one a row."""

    def read(self, tokens: Tensor | None) -> Tensor:
        """What follows the texts, as logits ``[B, V]``, after ``tokens [B]`` joined them; None: after the prompts, in the first call."""

    def select(self, rows: Tensor) -> None:
        """Go on with these rows only. ``rows`` int64, ascending"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What followed one prompt."""

    ids: tuple[int, ...]
    """The new tokens. A token of ``stop_ids`` ends them and is not among them."""
    finished: bool
    """Whether a stop token or ``should_stop`` ended it; otherwise a limit did."""
    logits: Tensor | None
    """``[len(ids), V]`` float32 on the CPU: what each new token was chosen from. None unless asked for."""


@torch.inference_mode()
def complete(
    make_reader: Callable[[Sequence[int]], Reader],
    *,
    limits: Sequence[int],
    stop_ids: Collection[int] = (),
    should_stop: Callable[[Sequence[int]], bool] | None = None,
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
    return_logits: bool = False,
) -> list[Completion]:
    """One completion per limit, each of at most so many tokens.

    ``make_reader`` is given the numbers of the rows whose limit leaves room. A row that is done leaves the batch. ``should_stop`` sees the new
    tokens of one row after each step. ``generator`` lives on the device of the logits.
    """
    rows = [_Row(limit=limit) for limit in limits]
    open_rows = [row for row in rows if row.limit > 0]
    if open_rows:
        reader = make_reader([number for number, row in enumerate(rows) if row.limit > 0])
        logits = reader.read(None)
    while open_rows:
        tokens = next_tokens(logits, sampling, generator=generator)
        for index, (row, token) in enumerate(zip(open_rows, tokens.tolist(), strict=True)):
            row.take(token, logits[index] if return_logits else None, stop_ids, should_stop)
        going_on = [index for index, row in enumerate(open_rows) if not row.is_done]
        if going_on and len(going_on) < len(open_rows):
            kept = torch.tensor(going_on, device=tokens.device)
            tokens = tokens[kept]
            reader.select(kept)
        open_rows = [open_rows[index] for index in going_on]
        if open_rows:
            logits = reader.read(tokens)
    return [row.completion(return_logits) for row in rows]


def room(prompts: Sequence[Sequence[int]], *, maximum_tokens: int, max_length: int) -> list[int]:
    """How many tokens may follow each prompt. ValueError for a prompt that cannot be read."""
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"Prompt {number} has no tokens: give at least one, such as the end-of-document token.")
        if len(prompt) > max_length:
            raise ValueError(f"Prompt {number} has {len(prompt)} tokens, but the model reads at most {max_length}: shorten it.")
    return [min(maximum_tokens, max_length - len(prompt)) for prompt in prompts]


def left_padded(prompts: Sequence[Sequence[int]], padding_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The prompts ``[B, S]``, and 1 where they are text, 0 where they are padding."""
    width = max(map(len, prompts))
    ids = torch.tensor([[padding_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    return ids, torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)


@dataclass(slots=True, kw_only=True)
class _Row:
    """A completion in the making."""

    limit: int
    ids: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    finished: bool = False

    @property
    def is_done(self) -> bool:
        return self.finished or len(self.ids) >= self.limit

    def take(self, token: int, logits: Tensor | None, stop_ids: Collection[int], should_stop: Callable[[Sequence[int]], bool] | None) -> None:
        if token in stop_ids:
            self.finished = True
            return
        self.ids.append(token)
        if logits is not None:
            self.logits.append(logits.float().cpu())
        self.finished = should_stop is not None and should_stop(self.ids)

    def completion(self, return_logits: bool) -> Completion:
        logits = (torch.stack(self.logits) if self.logits else torch.empty(0, 0)) if return_logits else None
        return Completion(ids=tuple(self.ids), finished=self.finished, logits=logits)

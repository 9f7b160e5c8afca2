"""New tokens for a batch of prompts, with the KV cache or without it. Knows token ids only; `text` makes words of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.model.cache import KeyValueCache
from megatron.model.gpt import GPTModel
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern
from sepllm.sampling import Sampling, next_tokens


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
def generate(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    *,
    prefill: AttentionPattern,
    decode: AttentionPattern,
    maximum_tokens: int,
    max_length: int,
    vocab_size: int | None = None,
    document_end_id: int | None = None,
    stop_ids: Collection[int] = (),
    should_stop: Callable[[Sequence[int]], bool] | None = None,
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
    recompute: bool = False,
    return_logits: bool = False,
    on_pass: Callable[[TokenLayout], None] | None = None,
) -> list[Completion]:
    """One completion per prompt, each of at most ``maximum_tokens`` tokens and ``max_length`` with its prompt.

    Prompts are padded on the left; a row that is done leaves the batch. ``prefill`` is the pattern of the prompt, ``decode`` that of
    the tokens after it. ``recompute``: no KV cache; every step reads the whole text afresh, so all of it under ``prefill``.
    ``vocab_size``: token ids from here on pad the output matrix and are never chosen; None: any may be.
    ``document_end_id``: attention and positions start anew after this token; None: a row is one text.
    ``should_stop`` sees the new tokens of one row after each step. ``generator`` lives on the model's device.
    ``on_pass`` sees the layout of every forward pass, whose queries are the tokens that it read.
    """
    _check_prompts(prompts, max_length)
    device = next(model.parameters()).device
    rows = [_Row(limit=min(maximum_tokens, max_length - len(prompt))) for prompt in prompts]
    open_rows = [row for row in rows if row.limit > 0]
    if not open_rows:
        return [row.completion(return_logits) for row in rows]
    layout = _prompt_layout([prompt for prompt, row in zip(prompts, rows, strict=True) if row.limit > 0], prefill, document_end_id, device)
    cache = None if recompute else KeyValueCache(prefill.num_layers, capacity=layout.ids.shape[1] + maximum_tokens)
    logits = _last_logits(model, layout, cache, on_pass)[:, :vocab_size]
    while True:
        tokens = next_tokens(logits, sampling, generator=generator)
        for index, (row, token) in enumerate(zip(open_rows, tokens.tolist(), strict=True)):
            row.take(token, logits[index] if return_logits else None, stop_ids, should_stop)
        going_on = [index for index, row in enumerate(open_rows) if not row.is_done]
        if not going_on:
            return [row.completion(return_logits) for row in rows]
        if len(going_on) < len(open_rows):
            kept = torch.tensor(going_on, device=device)
            open_rows, tokens, layout = [open_rows[index] for index in going_on], tokens[kept], layout.select(kept)
            if cache is not None:
                cache.select(kept)
        layout = _extended(layout, tokens[:, None], decode=decode, recompute=recompute)
        logits = _last_logits(model, layout, cache, on_pass)[:, :vocab_size]


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


def _last_logits(model: GPTModel, layout: TokenLayout, cache: KeyValueCache | None, on_pass: Callable[[TokenLayout], None] | None) -> Tensor:
    """What the model says after the last query of each row. ``[B, V]``"""
    logits = model(layout.ids[:, -layout.num_queries :], layout, cache=cache)
    if on_pass is not None:
        on_pass(layout)
    return logits[:, -1]


def _prompt_layout(prompts: Sequence[Sequence[int]], pattern: AttentionPattern, document_end_id: int | None, device: torch.device) -> TokenLayout:
    """Layout of the prompts, padded on the left to the longest."""
    width = max(map(len, prompts))
    padding_id = pattern.padding_id if pattern.padding_id is not None else 0
    ids = torch.tensor([[padding_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    is_text = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return TokenLayout.from_ids(ids, pattern, attention_mask=is_text, document_end_id=document_end_id)


def _extended(layout: TokenLayout, tokens: Tensor, *, decode: AttentionPattern, recompute: bool) -> TokenLayout:
    """The layout with one more token per row: only that one is a query, or, without a cache, every token."""
    if not recompute:
        return layout.extend(tokens, pattern=decode)
    is_text = torch.cat([layout.is_text, torch.ones_like(tokens, dtype=torch.bool)], 1)
    return TokenLayout.from_ids(torch.cat([layout.ids, tokens], 1), layout.pattern, attention_mask=is_text, document_end_id=layout.document_end_id)


def _check_prompts(prompts: Sequence[Sequence[int]], max_length: int) -> None:
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"Prompt {number} has no tokens: give at least one, such as the end-of-document token.")
        if len(prompt) > max_length:
            raise ValueError(f"Prompt {number} has {len(prompt)} tokens, but the model reads at most {max_length}: shorten it.")

"""New tokens for a batch of prompts from a checkpoint's model, with the KV cache or without it. Knows token ids only; `text` makes words of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from megatron.model.cache import KeyValueCache
from megatron.model.gpt import GPTModel
from sepllm.completion import Completion, complete, left_padded, room
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern
from sepllm.sampling import Sampling


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

    def reader(rows: Sequence[int]) -> _Reader:
        layout = _prompt_layout([prompts[row] for row in rows], prefill, document_end_id, next(model.parameters()).device)
        cache = None if recompute else KeyValueCache(prefill.num_layers, capacity=layout.ids.shape[1] + maximum_tokens)
        return _Reader(model, layout, cache, decode=decode, vocab_size=vocab_size, on_pass=on_pass)

    return complete(
        reader,
        limits=room(prompts, maximum_tokens=maximum_tokens, max_length=max_length),
        stop_ids=stop_ids,
        should_stop=should_stop,
        sampling=sampling,
        generator=generator,
        return_logits=return_logits,
    )


class _Reader:
    """The model, and the layout and the keys of what it has read. Without a cache every step reads everything."""

    def __init__(
        self,
        model: GPTModel,
        layout: TokenLayout,
        cache: KeyValueCache | None,
        *,
        decode: AttentionPattern,
        vocab_size: int | None,
        on_pass: Callable[[TokenLayout], None] | None,
    ) -> None:
        self.model, self.layout, self.cache = model, layout, cache
        self.decode, self.vocab_size, self.on_pass = decode, vocab_size, on_pass

    def read(self, tokens: Tensor | None) -> Tensor:
        if tokens is not None:
            self.layout = _extended(self.layout, tokens[:, None], decode=None if self.cache is None else self.decode)
        logits = self.model(self.layout.ids[:, -self.layout.num_queries :], self.layout, cache=self.cache, logits_to_keep=1)
        if self.on_pass is not None:
            self.on_pass(self.layout)
        return logits[:, -1, : self.vocab_size]

    def select(self, rows: Tensor) -> None:
        self.layout = self.layout.select(rows)
        if self.cache is not None:
            self.cache.select(rows)


def _prompt_layout(prompts: Sequence[Sequence[int]], pattern: AttentionPattern, document_end_id: int | None, device: torch.device) -> TokenLayout:
    """Layout of the prompts, padded on the left to the longest."""
    ids, is_text = left_padded(prompts, pattern.padding_id if pattern.padding_id is not None else 0, device)
    return TokenLayout.from_ids(ids, pattern, attention_mask=is_text, document_end_id=document_end_id)


def _extended(layout: TokenLayout, tokens: Tensor, *, decode: AttentionPattern | None) -> TokenLayout:
    """The layout with one more token per row: under ``decode`` only that one is a query; without it, every token."""
    if decode is not None:
        return layout.extend(tokens, pattern=decode)
    is_text = torch.cat([layout.is_text, torch.ones_like(tokens, dtype=torch.bool)], 1)
    return TokenLayout.from_ids(torch.cat([layout.ids, tokens], 1), layout.pattern, attention_mask=is_text, document_end_id=layout.document_end_id)

"""New tokens from a model of transformers by the loop that generate.py has: the same seed gives the same text before and after conversion."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from sepllm import completion
from sepllm.completion import Completion, left_padded, room
from sepllm.hf.cache import SepCache
from sepllm.sampling import Sampling


def complete(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    maximum_tokens: int,
    max_length: int | None = None,
    cache: SepCache | None = None,
    vocab_size: int | None = None,
    stop_ids: Collection[int] = (),
    should_stop: Callable[[Sequence[int]], bool] | None = None,
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
    return_logits: bool = False,
) -> list[Completion]:
    """One completion per prompt of token ids, each of at most ``maximum_tokens`` tokens and ``max_length`` (the model's) with its prompt.

    As generate.py does it: prompts are padded on the left, a row that is done leaves the batch, and every token that goes on is drawn from
    ``generator``, which lives on the model's device. ``cache``: an empty SepCache, else a DynamicCache is made. ``vocab_size``: token
    ids from here on are never chosen. ``should_stop`` sees the new tokens of one row after each step.
    """
    if cache is not None and cache.get_seq_length():
        raise ValueError(f"cache has seen {cache.get_seq_length()} tokens already: give an empty one, the prompts are read from their beginning.")

    def reader(rows: Sequence[int]) -> _Reader:
        return _Reader(model, [prompts[row] for row in rows], DynamicCache() if cache is None else cache, vocab_size)

    return completion.complete(
        reader,
        limits=room(prompts, maximum_tokens=maximum_tokens, max_length=max_length or model.get_decoder().config.max_position_embeddings),
        stop_ids=stop_ids,
        should_stop=should_stop,
        sampling=sampling,
        generator=generator,
        return_logits=return_logits,
    )


class _Reader:
    """The model, what it has read, and the cache of its keys."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], cache: Cache, vocab_size: int | None) -> None:
        self.model, self.cache, self.vocab_size = model, cache, vocab_size
        self._only_last: dict[str, int] = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        """The logits of all tokens of a long prompt would take more memory than all else."""
        padding_id = model.get_decoder().config.pad_token_id
        self._prompts, self._mask = left_padded(prompts, 0 if padding_id is None else padding_id, model.device)

    def read(self, tokens: Tensor | None) -> Tensor:
        ids = self._prompts if tokens is None else tokens[:, None]
        if tokens is not None:
            self._mask = torch.cat([self._mask, torch.ones_like(ids)], 1)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self.model(
            input_ids=ids, attention_mask=self._mask, position_ids=positions, past_key_values=self.cache, use_cache=True, **self._only_last
        )
        return out.logits[:, -1, : self.vocab_size]

    def select(self, rows: Tensor) -> None:
        self._mask = self._mask[rows]
        self.cache.batch_select_indices(rows)

"""A transformers cache that also knows the texts whose keys it holds: which tokens are separators, which are padding.

This is state of the cache, so it follows beams, crops and row selections, and two conversations on one model never meet. Only the
first layer carries it: the layout is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from sepllm.layout import KeyRanges, TokenLayout


@runtime_checkable
class TokenCache(Protocol):
    """A cache that is told of the tokens of each forward pass, and says what they may read: a SepCache, wherever its code came from."""

    shifts_positions: bool

    def begin_pass(self, input_ids: Tensor, *, attention_mask: Tensor | None = None) -> Tensor | None: ...

    def check_fits(self, num_layers: int, *, has_sliding_window: bool) -> None: ...

    def pass_group(self, layer_idx: int) -> int: ...

    def pass_ranges(self, layer_idx: int, *, sliding_width: int | None = None) -> KeyRanges: ...

    def pass_places(self) -> Tensor: ...

    def pass_turns(self, layer_idx: int, make: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None: ...

    def end_pass(self) -> None: ...

    def kv_ratio(self) -> float: ...


class LayoutLayer(DynamicLayer):
    """The ordinary growing layer, and the layout of the tokens whose keys it stores."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.layout: TokenLayout | None = None
        """None while the layer is empty."""

    def reset(self) -> None:
        super().reset()
        self.layout = None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.layout is not None:
            self.layout = self.layout.crop(self.get_seq_length())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._keep_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.layout is not None:
            self._keep_rows(torch.arange(self.layout.ids.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.layout is not None:
            self._keep_rows(torch.arange(self.layout.ids.shape[0], device=indices.device)[indices])

    def _keep_rows(self, rows: Tensor) -> None:
        if self.layout is not None:
            self.layout = self.layout.select(rows)


def layout_layer(cache: Cache) -> LayoutLayer:
    """The layer of the cache that carries the layout. In an empty DynamicCache it takes the first layer's place."""
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}: this model needs a DynamicCache or a SepCache, leave cache_implementation out."
        )
    if not cache.layers:
        cache.layers.append(LayoutLayer())
    first = cache.layers[0]
    if isinstance(first, LayoutLayer):
        return first
    if type(first) is not DynamicLayer:
        raise ValueError(f"The layers of past_key_values are {type(first).__name__}: this model needs a DynamicCache of plain layers.")
    if first.get_seq_length():
        raise ValueError(
            "past_key_values holds keys of tokens that are not known: give the cache that this model filled, or an empty DynamicCache()."
        )
    cache.layers[0] = LayoutLayer()
    return cache.layers[0]

"""Keys and values of tokens that were already read, for generation."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """One growing tensor of keys and one of values per layer, ``[B, S, K, H]``, in the order of the text's columns.

    Room doubles when it runs out, so that appending a token costs O(1) copies; ``capacity`` reserves columns at the start. What the
    columns mean (padding, separators, positions) is the business of the `TokenLayout` that goes with it.
    """

    def __init__(self, num_layers: int, *, capacity: int = 0) -> None:
        self.capacity = capacity
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        self._lengths = [0] * num_layers

    @property
    def length(self) -> int:
        """Columns that every layer holds."""
        return min(self._lengths)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all columns of this layer after ``k``, ``v`` ``[B, T, K, H]`` were added, ``[B, S, K, H]`` each."""
        start = self._lengths[layer]
        end = start + k.shape[1]
        keys = self._keys[layer] = _with_room(self._keys[layer], k, start=start, end=end, least=self.capacity)
        values = self._values[layer] = _with_room(self._values[layer], v, start=start, end=end, least=self.capacity)
        keys[:, start:end] = k
        values[:, start:end] = v
        self._lengths[layer] = end
        return keys[:, :end], values[:, :end]

    def crop(self, length: int) -> None:
        """Forget the columns from ``length`` on."""
        self._lengths = [min(kept, length) for kept in self._lengths]

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; rows may repeat (beams). ``rows`` int64."""
        self._keys = [None if keys is None else keys.index_select(0, rows) for keys in self._keys]
        self._values = [None if values is None else values.index_select(0, rows) for values in self._values]


def _with_room(stored: Tensor | None, new: Tensor, *, start: int, end: int, least: int) -> Tensor:
    """The stored tensor if ``end`` columns fit, else a copy of its first ``start`` columns with twice the room or more."""
    if stored is not None and stored.shape[1] >= end:
        return stored
    room = max(end, least, 2 * stored.shape[1] if stored is not None else 0)
    grown = torch.empty(new.shape[0], room, *new.shape[2:], dtype=new.dtype, device=new.device)
    if stored is not None:
        grown[:, :start] = stored[:, :start]
    return grown

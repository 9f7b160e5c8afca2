"""What one batch of token ids means for a pattern: O(S) integers instead of an S x S mask, made once and shared by all layers.

A key is *far* when every later query may read it: an initial token, a separator, a FixLLM grid token. Far keys are gathered, in
order, into a compact list. A query then reads two contiguous, disjoint ranges under one softmax:

    keys          a a . . , . . . . ? . . . [n n n n]          [ ] the band: the window that ends with the query
    far columns  [a a     ,         ?]                         [ ] the far prefix: far keys that stand before the band

As the query moves on, both ranges only move to the right. Padding, packed documents, a sliding width, decoding and caches with
holes are other integers in the same four bounds, so an attention core needs to know none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sepllm.pattern import AttentionPattern

NEVER = 2**30
"""Place of a right-padding column: after every query's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRanges:
    """The keys that each query of one layer reads. All bounds are int32, never decrease with the query, and count columns of
    the ``k`` that is passed to the attention core (never text positions).

    Query ``t`` of row ``b`` reads the far columns ``far_lo <= c < far_hi``, which are the keys ``index[b, c]``, and the keys
    ``band_lo <= j < band_hi``. The two never overlap. A query whose ranges are empty (padding) yields zero.
    """

    index: Tensor
    """``[B, M]``: key column of each far column, ascending. Columns that a row does not use hold 0 and are in nobody's range."""
    far_lo: Tensor
    """``[B, T]``"""
    far_hi: Tensor
    """``[B, T]``"""
    band_lo: Tensor
    """``[B, T]``"""
    band_hi: Tensor
    """``[B, T]``"""
    num_keys: int
    """``S``"""
    longest_band: int
    """Upper bound on the keys of a query's band, known without looking at the tensors."""
    is_causal: bool = False
    """Likewise: query ``t`` reads exactly the keys ``0 .. S - T + t``."""
    derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What an attention core worked out from these ranges, under its own name; every layer that shares them finds it here."""

    def kept_pairs(self) -> Tensor:
        """Number of (query, key) pairs that each row computes. ``[B]`` int64.

        The far and the band range of a query are disjoint, so this is the sum of their lengths: exact, O(S), no mask. Divided
        by ``S * (S + 1) / 2`` it is the paper's Attn(%) (arXiv 2412.12094, Table 3).
        """
        return self.read_keys().sum(1)

    def read_keys(self) -> Tensor:
        """Number of keys that each query reads. ``[B, T]`` int64."""
        return (self.far_hi - self.far_lo + self.band_hi - self.band_lo).long()

    def unread_keys(self) -> Tensor:
        """Keys that no query reads: padding, and what the windows have left behind. ``[B, S]`` bool, O(T + S)."""
        is_far_read = _covered(self.far_lo, self.far_hi, self.index.shape[1]).int()
        reads = _covered(self.band_lo, self.band_hi, self.num_keys).int()
        return reads.scatter_add_(1, self.index.long(), is_far_read) == 0

    def dense(self) -> Tensor:
        """The mask that these ranges stand for. ``[B, T, S]`` bool, True where the query reads the key."""
        column = torch.arange(self.num_keys, device=self.index.device)
        far_column = torch.arange(self.index.shape[1], device=self.index.device)
        band = (column >= self.band_lo[..., None]) & (column < self.band_hi[..., None])
        far = (far_column >= self.far_lo[..., None]) & (far_column < self.far_hi[..., None])
        reads = torch.zeros(band.shape, dtype=torch.int32, device=band.device)
        reads.scatter_add_(2, self.index[:, None].expand_as(far).long(), far.int())
        return band | (reads > 0)

    def to(self, device: torch.device | str) -> KeyRanges:
        """The same ranges on another device (the copy does not wait for it)."""
        return replace(
            self,
            index=self.index.to(device, non_blocking=True),
            far_lo=self.far_lo.to(device, non_blocking=True),
            far_hi=self.far_hi.to(device, non_blocking=True),
            band_lo=self.band_lo.to(device, non_blocking=True),
            band_hi=self.band_hi.to(device, non_blocking=True),
            derived={},
        )


def key_ranges(
    far: Tensor, window: int, *, key_places: Tensor, query_places: Tensor, first: Tensor, sliding_width: int | None = None, is_causal: bool = False
) -> KeyRanges:
    """`KeyRanges` of the queries at ``query_places`` over the stored keys at ``key_places``.

    A place is a column of the whole text, so a cache that dropped keys passes the places that it kept. ``far [B, S]`` bool, false
    on padding. ``key_places [B, S]`` ascending: -1 on left padding, `NEVER` on right padding. ``query_places`` and ``first``
    ``[B, T]``: where the query stands and the first place it may read (where its document starts).
    """
    batch, num_keys = far.shape
    before = torch.zeros(batch, num_keys + 1, dtype=torch.int32, device=far.device)  # far keys in columns < c
    torch.cumsum(far, 1, dtype=torch.int32, out=before[:, 1:])
    index = torch.zeros(batch, int(before[:, -1].max()), dtype=torch.int32, device=far.device)
    row, column = far.nonzero(as_tuple=True)
    index[row, before[row, column].long()] = column.int()
    if sliding_width is not None:
        first = torch.maximum(first, query_places - sliding_width)
    key_places = key_places.contiguous()
    band_hi = torch.searchsorted(key_places, query_places.contiguous(), right=True)
    band_lo = torch.searchsorted(key_places, torch.maximum(query_places - window + 1, first))
    band_lo = torch.minimum(band_lo, band_hi)
    far_hi = before.gather(1, band_lo)
    far_lo = torch.minimum(before.gather(1, torch.searchsorted(key_places, first.contiguous())), far_hi)
    return KeyRanges(
        index=index,
        far_lo=far_lo,
        far_hi=far_hi,
        band_lo=band_lo.int(),
        band_hi=band_hi.int(),
        num_keys=num_keys,
        longest_band=min(window, num_keys),
        is_causal=is_causal,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLayout:
    """One batch of texts under one pattern. The last ``T`` of its ``S`` columns are the queries of the coming forward pass.

    >>> pattern = AttentionPattern(initial_tokens=3, separator_ids=(13, 15), windows=(64,))
    >>> TokenLayout.from_ids(ids, pattern).ranges(layer=0).kept_pairs()
    """

    pattern: AttentionPattern
    num_queries: int
    ids: Tensor
    """``[B, S]`` integers"""
    is_text: Tensor
    """``[B, S]`` bool, False on padding (leading or trailing columns of a row)."""
    is_separator: Tensor
    """``[B, S]`` bool"""
    is_initial: Tensor
    """``[B, S]`` bool"""
    document_start: Tensor
    """``[B, S]`` int32: the column at which the token's document starts."""
    has_padding: bool = False
    """Whether any column may be padding, known without looking at the tensors."""
    document_end_id: int | None = None
    """Attention, initial tokens and positions start anew after each of these tokens. None: a row is one text."""
    _ranges: dict[tuple[int, int | None], KeyRanges] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_ids(
        cls, ids: Tensor, pattern: AttentionPattern, *, attention_mask: Tensor | None = None, document_end_id: int | None = None
    ) -> TokenLayout:
        """Layout of new texts: all columns are queries.

        ``ids [B, S]`` integers. ``attention_mask [B, S]``: 0 on padding, which must lead or trail; without one, a leading run of
        ``pattern.padding_id`` is padding. ``document_end_id``: where packed documents end, if they are to be separated; by
        default a packed row is one text, as in GPT-NeoX.
        """
        if ids.ndim != 2:
            raise ValueError(f"ids has shape {tuple(ids.shape)}: give a batch of rows, [B, S].")
        if pattern.reference_padding and document_end_id is not None:
            raise ValueError("reference_padding reads a row as one text: leave document_end_id out, or reference_padding off.")
        flags = ids.new_zeros(ids.shape[0], 0, dtype=torch.bool)
        empty = cls(
            pattern=pattern,
            num_queries=0,
            ids=ids[:, :0],
            is_text=flags,
            is_separator=flags,
            is_initial=flags,
            document_start=flags.int(),
            document_end_id=document_end_id,
        )
        is_text = _text_columns(ids, pattern, attention_mask)
        layout = empty._append(ids, pattern, is_text)
        return replace(layout, is_initial=_reference_initial(ids, pattern) & layout.is_text) if pattern.reference_padding else layout

    def extend(self, ids: Tensor, *, pattern: AttentionPattern | None = None, attention_mask: Tensor | None = None) -> TokenLayout:
        """Layout after ``ids [B, T]`` were appended, in O(T); only these are queries now.

        ``pattern`` may differ in its windows (decoding). ``attention_mask [B, T]`` speaks of the new columns only.
        """
        pattern = pattern or self.pattern
        is_text = None if attention_mask is None else _checked_mask(attention_mask, ids)
        if not pattern.reference_padding:
            if self.has_padding and bool((self.is_text.any(1) & ~self.is_text[:, -1]).any()):
                raise ValueError("A row that ends in padding cannot go on: the padding would lie inside its text. Pad on the left.")
            if is_text is not None and bool((self.is_text.any(1) & ~is_text[:, :1].all(1) & is_text.any(1)).any()):
                raise ValueError("attention_mask puts padding between a row's text and what continues it: pad on the right, or start anew.")
            return self._append(ids, pattern, is_text)
        everything = replace(self, is_text=torch.ones_like(self.is_text), has_padding=False)
        grown = everything._append(ids, pattern, None)
        return replace(grown, is_initial=torch.cat([self.is_initial, torch.zeros_like(ids, dtype=torch.bool)], 1))

    def _append(self, ids: Tensor, pattern: AttentionPattern, is_text: Tensor | None) -> TokenLayout:
        """New columns. A document starts at the first text column of a row and after each ``document_end_id``."""
        old = self.ids.shape[1]
        columns = torch.arange(old, old + ids.shape[1], dtype=torch.int32, device=ids.device).expand(ids.shape)
        has_padding = is_text is not None and not bool(is_text.all())
        if is_text is None:
            is_text = torch.ones_like(ids, dtype=torch.bool)
        all_text, all_ids = torch.cat([self.is_text, is_text], 1), torch.cat([self.ids, ids], 1)
        restarts = torch.where(is_text & ~_shifted(all_text, old, ids.shape[1], fill=False), columns, 0)
        if self.document_end_id is not None:
            ended = _shifted(all_ids, old, ids.shape[1], fill=-1) == self.document_end_id
            restarts = torch.where(ended, columns, restarts)
        start = restarts.cummax(1).values if ids.shape[1] else restarts
        start = torch.zeros_like(start) if pattern.reference_padding else torch.maximum(start, self.document_start[:, -1:]) if old else start
        return replace(
            self,
            pattern=pattern,
            num_queries=ids.shape[1],
            ids=all_ids,
            is_text=all_text,
            is_separator=torch.cat([self.is_separator, _is_in(ids, pattern.separator_ids) & is_text], 1),
            is_initial=torch.cat([self.is_initial, (columns - start < pattern.initial_tokens) & is_text], 1),
            document_start=torch.cat([self.document_start, start], 1),
            has_padding=self.has_padding or has_padding,
            _ranges={},
        )

    @property
    def positions(self) -> Tensor:
        """Place of each query in its own text (or document), for position embeddings; 0 on padding. ``[B, T]`` int64."""
        start = self.document_start[:, -self.num_queries :]
        return torch.where(self.is_text[:, -self.num_queries :], self._query_columns() - start, 0).long()

    @property
    def key_positions(self) -> Tensor:
        """The same for every column. ``[B, S]`` int64."""
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        return torch.where(self.is_text, columns - self.document_start, 0).long()

    def is_far(self, layer: int) -> Tensor:
        """Which keys every later query of this layer may read. ``[B, S]`` bool."""
        far = self.is_separator | self.is_initial
        if self.pattern.intervals is not None:
            place = torch.arange(self.ids.shape[1], device=self.ids.device) - self.document_start - self.pattern.initial_tokens
            far = far | ((place >= 0) & ((place + 1) % self.pattern.intervals[layer] == 0) & self.is_text)
        return far

    def ranges(self, layer: int) -> KeyRanges:
        """What the queries of this layer read. Layers with the same window and grid share one object."""
        interval = self.pattern.intervals[layer] if self.pattern.intervals is not None else None
        wanted = (self.pattern.windows[layer], interval)
        if wanted not in self._ranges:
            self._ranges[wanted] = self._make_ranges(layer)
        return self._ranges[wanted]

    def _make_ranges(self, layer: int) -> KeyRanges:
        length = self.ids.shape[1]
        key_places = torch.arange(length, dtype=torch.int32, device=self.ids.device).expand(self.ids.shape)
        first = self.document_start[:, -self.num_queries :]
        if self.has_padding:
            trailing = self.is_text.cummax(1).values
            key_places = torch.where(self.is_text, key_places, torch.where(trailing, NEVER, -1))
            first = torch.where(key_places[:, -self.num_queries :] == NEVER, NEVER + 1, first)
        return key_ranges(
            self.is_far(layer),
            self.pattern.windows[layer],
            key_places=key_places,
            query_places=key_places[:, -self.num_queries :],
            first=first,
            sliding_width=self.pattern.sliding_width,
            is_causal=self.pattern.is_full(length, layer=layer) and not self.has_padding and self.document_end_id is None,
        )

    def attention_map_ratio(self) -> float:
        """Kept pairs over causal pairs, all layers and rows: the paper's Attn(%) as a fraction (arXiv 2412.12094, Table 3)."""
        kept = sum(int(self.ranges(layer).kept_pairs().sum()) for layer in range(self.pattern.num_layers))
        rows, length = self.ids.shape
        causal = sum(range(length - self.num_queries + 1, length + 1))
        return kept / (causal * rows * self.pattern.num_layers)

    def kv_ratio(self) -> float:
        """Keys that the last query of each row reads, over all keys, all layers and rows: the paper's r.KV as a fraction."""
        kept = sum(int(self.ranges(layer).read_keys()[:, -1].sum()) for layer in range(self.pattern.num_layers))
        return kept / (self.ids.numel() * self.pattern.num_layers)

    def select(self, rows: Tensor) -> TokenLayout:
        """The layout of these rows, in this order; rows may repeat (beams). ``rows`` int64."""
        return self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def crop(self, length: int) -> TokenLayout:
        """The layout of the first ``length`` columns; the next `extend` goes on from there."""
        return replace(self._map(lambda tensor: tensor[:, :length]), num_queries=min(self.num_queries, length))

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same layout, ranges made so far included, on another device (the copy does not wait for it)."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, _ranges={wanted: ranges.to(device) for wanted, ranges in self._ranges.items()})

    def _map(self, change: Callable[[Tensor], Tensor]) -> TokenLayout:
        return replace(
            self,
            ids=change(self.ids),
            is_text=change(self.is_text),
            is_separator=change(self.is_separator),
            is_initial=change(self.is_initial),
            document_start=change(self.document_start),
            _ranges={},
        )

    def _query_columns(self) -> Tensor:
        length = self.ids.shape[1]
        return torch.arange(length - self.num_queries, length, dtype=torch.int32, device=self.ids.device)


def _text_columns(ids: Tensor, pattern: AttentionPattern, attention_mask: Tensor | None) -> Tensor | None:
    """``[B, S]`` bool, or None where every column is text by construction."""
    if attention_mask is not None:
        return _checked_mask(attention_mask, ids)
    if pattern.padding_id is None or pattern.reference_padding:
        return None
    return (ids != pattern.padding_id).cummax(1).values


def _checked_mask(attention_mask: Tensor, ids: Tensor) -> Tensor:
    if attention_mask.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)} and ids {tuple(ids.shape)}: give one entry per token.")
    is_text = attention_mask.bool()
    blocks = (is_text[:, 1:] & ~is_text[:, :-1]).sum(1) + is_text[:, :1].sum(1)
    if bool((blocks > 1).any()):
        row = int((blocks > 1).nonzero()[0])
        raise ValueError(f"attention_mask hides columns inside the text of row {row}: padding may only lead or trail.")
    return is_text


def _reference_initial(ids: Tensor, pattern: AttentionPattern) -> Tensor:
    """Initial tokens as the reference places them: after as many columns as there are padding ids anywhere in the prompt."""
    last = ids.shape[1] - 1
    offset = (ids == pattern.padding_id).sum(1, keepdim=True) if pattern.padding_id is not None else torch.zeros_like(ids[:, :1])
    column = torch.arange(ids.shape[1], device=ids.device)
    return (column >= offset.clamp(max=last)) & (column < offset + pattern.initial_tokens) if pattern.initial_tokens else ids < ids


def _is_in(ids: Tensor, wanted: frozenset[int]) -> Tensor:
    if not wanted:
        return torch.zeros_like(ids, dtype=torch.bool)
    return torch.isin(ids, torch.tensor(sorted(wanted), dtype=ids.dtype, device=ids.device))


def _shifted(whole: Tensor, start: int, count: int, *, fill: int | bool) -> Tensor:
    """For each of ``count`` columns from ``start`` on, what stands one column before it; ``fill`` before the first."""
    before = torch.cat([torch.full_like(whole[:, :1], fill), whole], 1)
    return before[:, start : start + count]


def _covered(low: Tensor, high: Tensor, count: int) -> Tensor:
    """Which of ``count`` columns lie in any of a row's ranges ``low <= c < high``, each ``[B, T]``. ``[B, count]`` bool."""
    change = torch.zeros(low.shape[0], count + 1, dtype=torch.int32, device=low.device)
    is_used = (high > low).int()
    change.scatter_add_(1, low.long(), is_used).scatter_add_(1, high.long(), -is_used)
    return change[:, :count].cumsum(1) > 0

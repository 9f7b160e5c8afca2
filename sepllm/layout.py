"""What one batch of token ids means for a pattern: O(S) integers instead of an S x S mask, made once and shared by all layers.

A key is *far* when every later query may read it: an initial token, a separator, a FixLLM grid token. Far keys are gathered, in
order, into a compact list. A query then reads two contiguous, disjoint ranges under one softmax:

    keys          a a . . , . . . . ? . . . [n n n n]          [ ] the band: the window that ends with the query
    far columns  [a a     ,         ?]                         [ ] the far prefix: far keys that stand before the band

As the query moves on, both ranges only move to the right. Padding, packed documents, a sliding width, decoding and caches with
holes are other integers in the same four bounds, so an attention core needs to know none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sepllm.pattern import AttentionPattern

NEVER = 2**30
"""Place of a right-padding column: after every query's."""

CAPACITY_STEP = 64
"""Far columns come in multiples of this many, and of an eighth of the keys, so that shapes repeat from batch to batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRanges:
    """The keys that each query of one layer reads. All bounds are int32, never decrease with the query, and count columns of
    the ``k`` that is passed to the attention core (never text positions).

    Query ``t`` of row ``b`` reads the far columns ``far_lo <= c < far_hi``, which are the keys ``index[b, c]``, and the keys
    ``band_lo <= j < band_hi``. The two never overlap. A query whose ranges are empty (padding) yields zero.
    """

    index: Tensor
    """``[B, M]``: key column of each far column, ascending; M is `far_capacity`'s. Columns that a row does not use hold 0 and are in
    nobody's range."""
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
    extremes: tuple[Tensor, Tensor] | None = None
    """``[B, T]`` int32: every key that a query could read under any window is one of ``lo <= j < hi``. The self-adjust softmax may take
    its extremes over these."""
    host: KeyRanges | None = field(default=None, repr=False, compare=False)
    """The same ranges on the CPU, where they were moved from there: sizes can be read from them without waiting for a device."""
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
        is_far_read = covered(self.far_lo, self.far_hi, self.index.shape[1]).int()
        reads = covered(self.band_lo, self.band_hi, self.num_keys).int()
        return reads.scatter_add_(1, self.index.long(), is_far_read) == 0

    def at(self, queries: Tensor) -> KeyRanges:
        """The ranges of these ``queries [T]`` alone, ascending, over the same keys."""
        return replace(
            self,
            far_lo=self.far_lo[:, queries],
            far_hi=self.far_hi[:, queries],
            band_lo=self.band_lo[:, queries],
            band_hi=self.band_hi[:, queries],
            is_causal=False,
            extremes=self.extremes and (self.extremes[0][:, queries], self.extremes[1][:, queries]),
            host=self.host and self.host.at(queries.to("cpu")),
            derived={},
        )

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
        """The same ranges on another device (the copy does not wait for it, except on the way to the CPU)."""
        is_here, stays_here = self.index.device.type == "cpu", torch.device(device).type == "cpu"
        return replace(
            self,
            index=_moved(self.index, device),
            far_lo=_moved(self.far_lo, device),
            far_hi=_moved(self.far_hi, device),
            band_lo=_moved(self.band_lo, device),
            band_hi=_moved(self.band_hi, device),
            extremes=self.extremes and (_moved(self.extremes[0], device), _moved(self.extremes[1], device)),
            host=None if stays_here else self if is_here else self.host,
            derived={},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What queries may read under any window: the columns ``first <= j < end``, and which of them are far keys."""

    first: Tensor
    """``[B, T]`` int32"""
    end: Tensor
    """``[B, T]`` int32; equal to `first` for a query that reads nothing."""
    index: Tensor
    """``[B, M]`` int32, as in `KeyRanges`."""
    far_before: Tensor
    """``[B, S + 1]`` int32: how many far keys stand before column j, and so the far column of the next one."""
    far_lo: Tensor
    """``[B, T]`` int32"""

    @classmethod
    def of(cls, is_far: Tensor, *, first: Tensor, end: Tensor, starts_at_0: bool = False, index: Tensor | None = None) -> Reach:
        """``is_far [B, S]`` bool. ``starts_at_0``: ``first`` is 0 everywhere. ``index``: the list of far columns, where it is known already.
        Without it M is, on an accelerator, the most that there can be, because to count would be to wait."""
        num_keys, device = is_far.shape[1], is_far.device
        before = pad(is_far, (1, 0)).cumsum(1, dtype=torch.int32)
        if index is None:
            most = max(before[:, -1].tolist(), default=0) if device.type == "cpu" else num_keys
            index = torch.zeros(len(is_far), far_capacity(most, num_keys), dtype=torch.int32, device=device)
            slots = before[:, :-1].clamp(max=index.shape[1] - 1)
            index.scatter_add_(1, slots, is_far * _columns(0, num_keys, device))  # a key that is not far adds 0 to some slot
        return cls(first=first, end=end, index=index, far_before=before, far_lo=first if starts_at_0 else before.gather(1, first))

    @classmethod
    def without_far_keys(cls, *, num_keys: int, first: Tensor, end: Tensor) -> Reach:
        """Where no batch of the pattern has far keys."""
        before = torch.zeros(len(first), num_keys + 1, dtype=torch.int32, device=first.device)
        return cls(first=first, end=end, index=before[:, :0], far_before=before, far_lo=torch.zeros_like(first))

    def ranges(self, window_start: Tensor, *, longest_band: int, is_causal: bool = False) -> KeyRanges:
        """The ranges of queries whose windows begin at ``window_start [B, T]``, or where their reach does if that is later."""
        band_lo = torch.maximum(window_start, self.first)
        return KeyRanges(
            index=self.index,
            far_lo=self.far_lo,
            far_hi=self.far_before.gather(1, band_lo),
            band_lo=band_lo,
            band_hi=self.end,
            num_keys=self.far_before.shape[1] - 1,
            longest_band=longest_band,
            is_causal=is_causal,
            extremes=(self.first, self.end),
        )


def far_capacity(most: int, num_keys: int) -> int:
    """Columns of the list that holds the ``most`` far keys of a row: at least one step where a pattern may have far keys at all."""
    step = CAPACITY_STEP * max(1, math.ceil(num_keys / (8 * CAPACITY_STEP)))
    return min(step * math.ceil(max(most, 1) / step), CAPACITY_STEP * math.ceil(num_keys / CAPACITY_STEP))


def key_ranges(far: Tensor, window: int, *, key_places: Tensor, query_places: Tensor, first: Tensor, sliding_width: int | None = None) -> KeyRanges:
    """`KeyRanges` of the queries at ``query_places`` over stored keys at ``key_places``: a cache with holes.

    A place is a column of the whole text, so a cache that dropped keys passes the places that it kept. ``far [B, S]`` bool, false
    on padding. ``key_places [B, S]`` ascending: -1 on left padding, `NEVER` on right padding. ``query_places`` and ``first``
    ``[B, T]``: where the query stands and the first place it may read (where its document starts).
    """
    key_places = key_places.contiguous()

    def column_of(place: Tensor, *, right: bool = False) -> Tensor:
        return torch.searchsorted(key_places, place.contiguous(), right=right, out_int32=True)

    if sliding_width is not None:
        first = torch.maximum(first, query_places - sliding_width)
    num_keys, end = far.shape[1], column_of(query_places, right=True)
    reach = Reach.of(far, first=torch.minimum(column_of(first), end), end=end)
    return reach.ranges(column_of(query_places - (window - 1)), longest_band=min(window, num_keys))


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
    _far_lists: dict[int | None, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """`KeyRanges.index` by grid, where the layout came with it."""

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
        is_text = _text_columns(ids, pattern, attention_mask)
        layout = cls._of_columns(ids, pattern, is_text, document_end_id=document_end_id)
        return replace(layout, is_initial=_reference_initial(ids, pattern) & layout.is_text) if pattern.reference_padding else layout

    @property
    def far_capacity(self) -> int:
        """Columns of its longest list of far keys, known without looking at the tensors."""
        return max(index.shape[1] for index in self._lists())

    def pack(self, *, far_capacity: int = 0) -> Tensor:
        """The layout as one tensor, ``[B, S + G * M]`` int32: what the later stages of a pipeline need to know of a batch (`unpack`).

            S columns             a token's id, and two bits: whether it is text, whether a document starts there
            G lists of M columns  `KeyRanges.index` of each grid: one, unless FixLLM's intervals differ from layer to layer

        Ids, text and document starts are all that a batch adds to the pattern, which every stage has: separators, initial tokens, positions
        and the bounds of every window are comparisons and sums over them. So are the lists, but how long one is could only be said by
        waiting for the device; the width of the tensor says it instead. M is ``far_capacity``, or the layout's own where that is more:
        batches that are packed with the same one have the same shape.
        """
        if self.num_queries != self.ids.shape[1]:
            raise ValueError(
                f"The layout has {self.num_queries} queries in {self.ids.shape[1]} columns: only whole texts are packed, without a cache."
            )
        starts = self.document_start == _columns(0, self.ids.shape[1], self.ids.device)
        columns = (self.ids.int() << 2) | (self.is_text.int() << 1) | starts.int()
        width = max(far_capacity, self.far_capacity)
        return torch.cat([columns, *(pad(index, (0, width - index.shape[1])) for index in self._lists())], 1)

    @classmethod
    def unpack(cls, packed: Tensor, pattern: AttentionPattern, *, length: int, has_padding: bool, document_end_id: int | None = None) -> TokenLayout:
        """The layout of ``length`` columns that was packed, on the same device, which is not waited for.

        ``has_padding``, ``document_end_id``: what may occur in a batch of the run, even if it did not in this one.
        """
        columns, place = packed[:, :length], _columns(0, length, packed.device)
        ids, is_text = (columns >> 2).long(), (columns & 2).bool()
        start = torch.where((columns & 1).bool(), place, 0).cummax(1).values
        is_initial = _reference_initial(ids, pattern) if pattern.reference_padding else place - start < pattern.initial_tokens
        grids = _grids(pattern)
        return cls(
            pattern=pattern,
            num_queries=length,
            ids=ids,
            is_text=is_text,
            is_separator=_is_in(ids, pattern.separator_ids) & is_text,
            is_initial=is_initial & is_text,
            document_start=start,
            has_padding=has_padding,
            document_end_id=document_end_id,
            _far_lists=dict(zip(grids, packed[:, length:].chunk(len(grids), 1), strict=True)),
        )

    def _lists(self) -> list[Tensor]:
        intervals = self.pattern.intervals
        return [self.ranges(0 if intervals is None or grid is None else intervals.index(grid)).index for grid in _grids(self.pattern)]

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
        old = self if self.ids.shape[1] else None
        new = self._of_columns(ids, pattern, is_text, document_end_id=self.document_end_id, old=old)
        return replace(
            new,
            ids=torch.cat([self.ids, new.ids], 1),
            is_text=torch.cat([self.is_text, new.is_text], 1),
            is_separator=torch.cat([self.is_separator, new.is_separator], 1),
            is_initial=torch.cat([self.is_initial, new.is_initial], 1),
            document_start=torch.cat([self.document_start, new.document_start], 1),
        )

    @classmethod
    def _of_columns(
        cls, ids: Tensor, pattern: AttentionPattern, is_text: Tensor | None, *, document_end_id: int | None, old: TokenLayout | None = None
    ) -> TokenLayout:
        """The columns ``ids [B, T]`` alone, as they are after the ``old`` ones. ``is_text`` None: all of them are."""
        has_padding = (old is not None and old.has_padding) or (is_text is not None and not bool(is_text.all()))
        is_text = torch.ones_like(ids, dtype=torch.bool) if is_text is None else is_text
        columns = _columns(0 if old is None else old.ids.shape[1], ids.shape[1], ids.device)
        is_separator = _is_in(ids, pattern.separator_ids)
        if pattern.reference_padding or not (has_padding or document_end_id is not None):
            start = torch.zeros_like(ids, dtype=torch.int32)
            is_initial = (columns < pattern.initial_tokens).expand(ids.shape)
        else:
            start = _document_starts(ids, is_text, columns, document_end_id=document_end_id, old=old)
            is_initial = columns - start < pattern.initial_tokens
        if has_padding:
            is_separator, is_initial = is_separator & is_text, is_initial & is_text
        return cls(
            pattern=pattern,
            num_queries=ids.shape[1],
            ids=ids,
            is_text=is_text,
            is_separator=is_separator,
            is_initial=is_initial,
            document_start=start,
            has_padding=has_padding,
            document_end_id=document_end_id,
        )

    @property
    def positions(self) -> Tensor:
        """Place of each query in its own text (or document), for position embeddings; 0 on padding. ``[B, T]`` int64."""
        return self._of_queries(self.key_positions)

    @property
    def key_positions(self) -> Tensor:
        """The same for every column. ``[B, S]`` int64."""
        columns = _columns(0, self.ids.shape[1], self.ids.device)
        return torch.where(self.is_text, columns - self.document_start, 0).long()

    def bilevel_positions(self, separator_ids: Iterable[int]) -> BilevelPositions:
        """BiPE's positions of every column, those of the queries last (arXiv 2401.16421). A separator ends its segment."""
        is_end = _is_in(self.ids, frozenset(separator_ids)) & self.is_text
        columns, start = _columns(0, self.ids.shape[1], self.ids.device), self.document_start
        ended = is_end.cumsum(1) - is_end.long()  # segments that ended before this column, in this row
        segment_start = torch.where(_one_before(is_end, torch.zeros_like(is_end[:, :1])), columns, start).cummax(1).values
        return BilevelPositions(
            inter=torch.where(self.is_text, ended - ended.gather(1, start.long()), 0),
            intra=torch.where(self.is_text, columns - segment_start, 0).long(),
        )

    def is_far(self, layer: int) -> Tensor:
        """Which keys every later query of this layer may read. ``[B, S]`` bool."""
        far, interval = self.is_separator | self.is_initial, self._interval(layer)
        if interval is not None:
            place = _columns(0, self.ids.shape[1], self.ids.device) - self.document_start - self.pattern.initial_tokens
            far = far | ((place >= 0) & ((place + 1) % interval == 0) & self.is_text)
        return far

    def ranges(self, layer: int) -> KeyRanges:
        """What the queries of this layer read. Layers with the same window and grid share one object; the first call makes all."""
        if not self._ranges:
            self._make_ranges()
        return self._ranges[self.pattern.windows[layer], self._interval(layer)]

    def _make_ranges(self) -> None:
        is_one_text, length = not self.has_padding and self.document_end_id is None, self.ids.shape[1]
        reaches: dict[int | None, Reach] = {}
        for layer, window in enumerate(self.pattern.windows):
            interval = self._interval(layer)
            if interval not in reaches:
                reaches[interval] = self._reach(layer)
            if (window, interval) not in self._ranges:
                reach, is_causal = reaches[interval], is_one_text and self.pattern.is_full(length, layer=layer)
                self._ranges[window, interval] = reach.ranges(reach.end - window, longest_band=min(window, length), is_causal=is_causal)

    def _reach(self, layer: int) -> Reach:
        """A query reaches from its document's start to itself. Padding reaches nothing, at the edge of the row's text."""
        length, width = self.ids.shape[1], self.pattern.sliding_width
        first = self._of_queries(self.document_start).contiguous()
        end = _columns(length - self.num_queries + 1, self.num_queries, self.ids.device).expand_as(first).contiguous()
        if width is not None:
            first = torch.maximum(first, end - (1 + width))
        if self.has_padding:
            text_start = self.is_text.int().argmax(1, keepdim=True).int()
            end = torch.clamp(end, text_start, text_start + self.is_text.sum(1, keepdim=True, dtype=torch.int32))
            first = torch.where(self._of_queries(self.is_text), torch.maximum(first, text_start), end)
        if not self.pattern.has_far_keys:
            return Reach.without_far_keys(num_keys=length, first=first, end=end)
        starts_at_0 = width is None and not self.has_padding and self.document_end_id is None
        index = self._far_lists.get(self._interval(layer))
        return Reach.of(self.is_far(layer), first=first, end=end, starts_at_0=starts_at_0, index=index)

    def _interval(self, layer: int) -> int | None:
        return None if self.pattern.intervals is None else self.pattern.intervals[layer]

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
        """The same layout, ranges made so far included, on another device (the copy does not wait for it, except on the way to the CPU)."""
        moved = self._map(lambda tensor: _moved(tensor, device))
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
            _far_lists={},
        )

    def _of_queries(self, whole: Tensor) -> Tensor:
        """The last columns of ``whole [B, S]``, which are the queries. ``[B, T]``"""
        return whole[:, whole.shape[1] - self.num_queries :]


@dataclass(frozen=True, slots=True, kw_only=True)
class BilevelPositions:
    """Positions of BiPE, each ``[B, S]`` int64, 0 on padding. Both begin anew with each document."""

    inter: Tensor
    """Number of the token's segment: how many separators stand before it."""
    intra: Tensor
    """Place of the token in its segment."""


def _grids(pattern: AttentionPattern) -> list[int | None]:
    """FixLLM's intervals, each once, in the order of layers; None alone stands for no grid."""
    return list(dict.fromkeys(pattern.intervals or (None,)))


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
    """Which of ``ids [B, S]`` are wanted, looked up in a table whose last entry stands for all ids outside. bool."""
    table = torch.zeros(max(wanted, default=-1) + 2, dtype=torch.bool, device=ids.device)
    table.index_fill_(0, torch.tensor(sorted(wanted), dtype=torch.int64).to(ids.device, non_blocking=True), True)
    return table.take(ids.clamp(-1, len(table) - 1).long())


def _document_starts(ids: Tensor, is_text: Tensor, columns: Tensor, *, document_end_id: int | None, old: TokenLayout | None) -> Tensor:
    """Where the document of each of ``columns`` starts: at a row's first text and after each ``document_end_id``. ``[B, T]`` int32."""
    was_text = _one_before(is_text, torch.zeros_like(is_text[:, :1]) if old is None else old.is_text[:, -1:])
    restarts = torch.where(is_text & ~was_text, columns, 0)
    if document_end_id is not None:
        has_ended = _one_before(ids, torch.full_like(ids[:, :1], -1) if old is None else old.ids[:, -1:]) == document_end_id
        restarts = torch.where(has_ended, columns, restarts)
    if old is not None:
        restarts = torch.maximum(restarts, old.document_start[:, -1:])
    return restarts.cummax(1).values if len(columns) else restarts


def _one_before(x: Tensor, first: Tensor) -> Tensor:
    """For each column what stands one column before it: ``first [B, 1]`` before the first. ``[B, T]``"""
    return torch.cat([first, x[:, :-1]], 1)[:, : x.shape[1]]


def _moved(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on the device. A copy to the CPU is waited for: torch would hand it out before it is there."""
    return x.to(device, non_blocking=torch.device(device).type != "cpu")


def _columns(start: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(start, start + count, dtype=torch.int32, device=device)


def covered(low: Tensor, high: Tensor, count: int) -> Tensor:
    """Which of ``count`` columns lie in any of a row's ranges ``low <= c < high``, each ``[B, T]``. ``[B, count]`` bool."""
    change = torch.zeros(low.shape[0], count + 1, dtype=torch.int32, device=low.device)
    is_used = (high > low).int()
    change.scatter_add_(1, low.long(), is_used).scatter_add_(1, high.long(), -is_used)
    return change[:, :count].cumsum(1) > 0

"""Which tokens a small key-value cache keeps, row by row, on plain tensors: the policy of SepCache (arXiv 2412.12094, section 3.2).

    initial | separators | past window | local window          a row of the cache, newest token last
       a         <= s                         w

A row grows until it holds ``c`` tokens. Then it keeps its first ``a``, its separators, of which there may be ``s``, and its last ``w``.
Rows stand side by side with their newest tokens in the last column, so a row that keeps fewer begins with empty columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypedDict

import torch
from torch import Tensor

from sepllm.layout import KeyRanges

EMPTY = -1
"""Place of a column that holds no text: the row has fewer tokens than others, or padding stood there."""

ROOM = 256
"""Columns that are made at once for tokens to come."""

When = Literal["never", "before reading", "after reading"]
"""Whether a compression comes before the new tokens read, so that they see what it left, or after, so that they see all that was there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheBudget:
    """How many tokens of each kind one layer keeps."""

    initial: int
    """``a`` in the paper: first tokens of the text."""
    separators: int
    """``s``: separators that stand between the initial tokens and the local window. 0: none do, which is StreamingLLM."""
    local: int
    """``w``: newest tokens, all of which survive."""
    total: int
    """``c``: a row that holds this many is compressed."""

    def __post_init__(self) -> None:
        sizes = (("init_cache_size", self.initial, 0), ("sep_cache_size", self.separators, 0), ("local_size", self.local, 1))
        for name, size, least in sizes:
            if size < least:
                raise ValueError(f"{name} is {size}: it counts tokens and must be {least} or more.")
        if self.after_compression >= self.total:
            raise ValueError(
                f"init_cache_size ({self.initial}) + sep_cache_size ({self.separators}) + local_size ({self.local}) must be less than cache_size "
                f"({self.total}): raise cache_size above {self.after_compression}, or lower the others."
            )

    @property
    def after_compression(self) -> int:
        """The most tokens that a compressed row holds."""
        return self.initial + self.separators + self.local


@dataclass(frozen=True, kw_only=True)
class RowSizes:
    """In what rows differ, each ``[B]`` int64 on the CPU. All of it, and what is worked out from it, stays as it is while every row gets text."""

    empty: Tensor
    """Columns before the row's first token."""
    dropped: Tensor
    """Tokens of its text that are no longer stored."""
    growth: Tensor
    """By how much an unbounded row has outgrown its budget of separators, and so its total."""

    @cached_property
    def num_empty(self) -> int:
        """Over all rows, like the next."""
        return int(self.empty.sum())

    @cached_property
    def num_dropped(self) -> int:
        return int(self.dropped.sum())

    @cached_property
    def most_empty(self) -> int:
        """Of any row, like the next."""
        return int(self.empty.max())

    @cached_property
    def most_growth(self) -> int:
        return int(self.growth.max())

    @cached_property
    def earliest(self) -> int:
        """By how many columns more than a row's total the cache is wider when the first row is due."""
        return int((self.empty + self.growth).min())

    def select(self, rows: Tensor) -> RowSizes:
        """These rows, in this order. Waits for the device of ``rows`` where rows differ."""
        sizes = torch.stack([self.empty, self.dropped, self.growth])
        are_equal = bool((sizes == sizes[:, :1]).all())
        empty, dropped, growth = sizes[:, :1].expand(-1, len(rows)) if are_equal else sizes[:, rows.cpu()]
        return RowSizes(empty=empty, dropped=dropped, growth=growth)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTokens:
    """The tokens that a cache holds: each column of a row is one token, oldest first, newest last."""

    columns: Tensor
    """``[3, B, S or more]`` int64: ids, places and positions. What is behind the ``S`` columns is room, where places and positions are those of
    text to come: a token that joins writes its id only."""
    width: int
    """``S``"""
    first: Tensor
    """``[B, 1]`` int32: the column of each row's first token."""
    window_start: Tensor
    """``[B, 1]`` int64: place at which the past window begins; every token from there on is stored."""
    sizes: RowSizes
    lockstep: Lockstep | None = None

    @classmethod
    def none(cls, rows: int, device: torch.device | str | None = None) -> StoredTokens:
        """No tokens yet, in so many rows."""
        start, zeros = torch.zeros(rows, 1, dtype=torch.int64, device=device), torch.zeros(rows, dtype=torch.int64)
        return cls(
            columns=start.new_zeros(3, rows, 0),
            width=0,
            first=start.int(),
            window_start=start,
            sizes=RowSizes(empty=zeros, dropped=zeros, growth=zeros),
        )

    @property
    def ids(self) -> Tensor:
        """``[B, S]`` int64"""
        return self.columns[0, :, : self.width]

    @property
    def places(self) -> Tensor:
        """``[B, S]`` int64: the token's place in its text, ascending; `EMPTY` in the columns before a row's first token."""
        return self.columns[1, :, : self.width]

    @property
    def positions(self) -> Tensor:
        """``[B, S]`` int64: the position that the model was told when the token came; its place where nobody said."""
        return self.columns[2, :, : self.width]

    @property
    def num_rows(self) -> int:
        """``B``"""
        return self.columns.shape[1]

    @property
    def counts(self) -> Tensor:
        """``[B]`` int64 on the CPU, like the next: how many columns of each row hold text."""
        return self.width - self.sizes.empty

    @property
    def texts(self) -> Tensor:
        """Tokens of each row that ever came."""
        return self.counts + self.sizes.dropped

    @property
    def growth(self) -> Tensor:
        """By how much an unbounded row has outgrown its budget."""
        return self.sizes.growth

    @property
    def has_empty_columns(self) -> bool:
        """Whether any row holds fewer tokens than there are columns."""
        return self.sizes.most_empty > 0

    @property
    def has_text_in_every_row(self) -> bool:
        return self.sizes.most_empty < self.width

    def slots(self, start: int = 0) -> Tensor:
        """The number of each token among those its row holds, from column ``start`` on; 0 in empty columns. ``[B, S - start]`` int64"""
        return (torch.arange(start, self.width, device=self.first.device) - self.first).clamp_(min=0)

    def append(self, ids: Tensor, *, is_text: Tensor | None = None, positions: Tensor | None = None) -> StoredTokens:
        """With ``ids [B, T]`` in T more columns, which may share memory with these: what is here is not to be appended to again.

        ``is_text [B, T]`` bool: False on padding, which may only stand before a row's text; without it no device is waited for. ``positions
        [B, T]`` (by default the places in the text) are only kept, not looked at.
        """
        grown = self._with_room(ids.shape[1]) if is_text is None else self._with_padding(is_text)
        grown.columns[0, :, self.width : grown.width].copy_(ids)
        if positions is not None:
            grown.columns[2, :, self.width : grown.width].copy_(positions)
        return grown

    def _with_room(self, length: int) -> StoredTokens:
        """The next ``length`` columns are text."""
        columns, width = self.columns, self.width + length
        if columns.shape[2] < width:
            ahead = self._last_places() + torch.arange(1, length + ROOM + 1, device=columns.device)
            columns = torch.cat([columns[:, :, : self.width], ahead.expand(3, -1, -1)], 2)
        return replace(self, columns=columns, width=width)

    def _with_padding(self, is_text: Tensor) -> StoredTokens:
        """The next columns are what ``is_text [B, T]`` says."""
        places = torch.where(is_text, self._last_places() + is_text.cumsum(1), EMPTY)
        columns = torch.cat([self.columns[:, :, : self.width], torch.stack([places, places, places.clamp(min=0)])], 2)
        first = (columns[1] == EMPTY).sum(1, keepdim=True)
        sizes = replace(self.sizes, empty=first[:, 0].cpu())
        return replace(self, columns=columns, width=columns.shape[2], first=first.int(), sizes=sizes)

    def _last_places(self) -> Tensor:
        return self.places[:, -1:] if self.width else torch.full_like(self.window_start, EMPTY)

    def select(self, rows: Tensor) -> StoredTokens:
        """These rows, in this order; rows may repeat (beams). ``rows`` int64. Waits for a device where rows differ in size."""
        here = rows.to(self.columns.device)
        return replace(
            self,
            columns=self.columns.index_select(1, here),
            first=self.first.index_select(0, here),
            window_start=self.window_start.index_select(0, here),
            sizes=self.sizes.select(rows),
        )

    def state(self) -> TokenState:
        """A copy of all that `restored` needs. Not under a `ReferencePolicy`."""
        sizes = self.sizes
        return TokenState(
            columns=self.columns[:, :, : self.width].clone(),
            window_start=self.window_start,
            empty=sizes.empty,
            dropped=sizes.dropped,
            growth=sizes.growth,
        )

    @classmethod
    def restored(cls, state: TokenState, device: torch.device | str) -> StoredTokens:
        """The tokens that `state` was taken of, on a device."""
        columns, empty = state["columns"].to(device), state["empty"].cpu()
        return cls(
            columns=columns,
            width=columns.shape[2],
            first=empty[:, None].to(device, torch.int32),
            window_start=state["window_start"].to(device),
            sizes=RowSizes(empty=empty, dropped=state["dropped"].cpu(), growth=state["growth"].cpu()),
        )

    def keep(self, source: Tensor, *, counts: Tensor, growth: Tensor) -> StoredTokens:
        """With column ``source[b, s]`` of row b in its column s. ``source [B, S']`` int64

        ``counts [B]`` on the CPU: tokens that each row has then, at its end. ``growth``: as in `RowSizes`.
        """
        width = source.shape[1]
        sizes = RowSizes(empty=width - counts, dropped=self.texts - counts, growth=growth)
        first = sizes.empty.to(source.device)[:, None]
        columns = self.columns.gather(2, source.expand(3, -1, -1))
        columns[1].masked_fill_(torch.arange(width, device=source.device) < first, EMPTY)
        return replace(self, columns=columns, width=width, first=first.int(), sizes=sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """What a cache holds after some rows were compressed, and where that was before."""

    stored: StoredTokens
    source: Tensor
    """``[B, S']`` int64: the old column of each new one. In empty columns it is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePolicy:
    """Each row by itself: what it keeps depends on its own text only, neither on padding nor on the other rows."""

    budget: CacheBudget
    separator_ids: frozenset[int]
    accumulates: bool = True
    """Keep separators that earlier compressions kept. Otherwise only those of the latest past window."""
    is_bounded: bool = True
    """Keep the newest ``s`` separators. Otherwise all of them, and ``c`` grows with what exceeds ``s``."""

    def begin(self, stored: StoredTokens) -> StoredTokens:
        """What this policy has to know of the prompt, ``stored``: nothing."""
        return stored

    def limits(self, stored: StoredTokens) -> Tensor:
        """How many tokens make each row due for compression. ``[B]`` int64 on the CPU"""
        return self.budget.total + stored.growth

    def compress(self, stored: StoredTokens) -> Compression | None:
        """What is kept of the rows that are due; None if none is. Only then is a device waited for, once, to learn the new counts."""
        if stored.width < self.budget.total + stored.sizes.earliest:
            return None
        due = stored.counts >= self.limits(stored)
        is_due = due.to(stored.columns.device)[:, None]
        local_start = stored.places[:, -1:] - (self.budget.local - 1)
        is_separator = self._kept_separators(stored, local_start)
        is_initial = stored.places < self.budget.initial
        is_kept = (stored.places != EMPTY) & (~is_due | is_initial | is_separator | (stored.places >= local_start))
        counts, separators = torch.stack([is_kept.sum(1), is_separator.sum(1)]).cpu()
        growth = stored.growth if self.is_bounded else torch.maximum(stored.growth, (separators - self.budget.separators) * due)
        source = _newest_last(is_kept, int(counts.max()))
        kept = stored.keep(source, counts=counts, growth=growth)
        return Compression(stored=replace(kept, window_start=torch.where(is_due, local_start, stored.window_start)), source=source)

    def _kept_separators(self, stored: StoredTokens, local_start: Tensor) -> Tensor:
        """Which columns a compression keeps because they are separators. ``[B, S]`` bool"""
        between = (stored.places >= self.budget.initial) & (stored.places < local_start)
        if not self.accumulates:
            between &= stored.places >= stored.window_start
        is_separator = _is_any(stored.ids, self.separator_ids) & between
        return is_separator & (_rank_from_last(is_separator) <= self.budget.separators) if self.is_bounded else is_separator


@dataclass(frozen=True, slots=True, kw_only=True)
class Lockstep:
    """What the reference implementation remembers of all rows together."""

    offset: int = 0
    """The most padding ids that any row had in the prompt, wherever they stood: so many more columns count as initial."""
    separators_end: int = 0
    """Column after the separators; 0 before the first compression."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferencePolicy:
    """All rows in lockstep, as the reference implementation has it, for comparison with published traces.

    Padding is stored and counted. Rows get equally many separators: as many as the poorest row has, the oldest ones first; or, with
    ``fills_rows``, as many as the richest, where the others repeat tokens of their past window.
    """

    budget: CacheBudget
    separator_ids: frozenset[int]
    padding_id: int
    accumulates: bool = True
    is_bounded: bool = True
    fills_rows: bool = False

    def begin(self, stored: StoredTokens) -> StoredTokens:
        """With the offset that the prompt, ``stored``, leads to."""
        return replace(stored, lockstep=Lockstep(offset=int((stored.ids == self.padding_id).sum(1).max())))

    def limits(self, stored: StoredTokens) -> Tensor:
        """How many columns make the rows due for compression. ``[B]`` int64 on the CPU, all equal"""
        return self.budget.total + stored.growth

    def compress(self, stored: StoredTokens) -> Compression | None:
        """What is kept when the columns have reached ``c``; None before that."""
        growth = stored.sizes.most_growth
        if stored.width < self.budget.total + growth:
            return None
        assert stored.lockstep is not None
        offset = stored.lockstep.offset
        if self.budget.after_compression + offset >= self.budget.total:
            raise ValueError(
                f"The prompt holds {offset} padding ids in some row, and init_cache_size + sep_cache_size + local_size + {offset} must stay less "
                f"than cache_size ({self.budget.total}): raise cache_size, or leave reference_compat off, where padding costs nothing."
            )
        head, local_start = self.budget.initial + offset, stored.width - self.budget.local
        old_end = stored.lockstep.separators_end or head
        columns = torch.arange(stored.width, device=stored.columns.device).expand(stored.num_rows, -1)
        separators = self._new_separators(stored, old_end, local_start)
        if self.accumulates:
            separators = torch.cat([columns[:, head:old_end], separators], 1)
        if self.is_bounded:
            separators = separators[:, max(0, separators.shape[1] - self.budget.separators) :]
        else:
            growth = max(growth, separators.shape[1] - self.budget.separators)
        source = torch.cat([columns[:, :head], separators, columns[:, local_start:]], 1)
        counts = (stored.places.gather(1, source) != EMPTY).sum(1).cpu()
        kept = stored.keep(source, counts=counts, growth=torch.full_like(counts, growth))
        return Compression(stored=replace(kept, lockstep=Lockstep(offset=offset, separators_end=head + separators.shape[1])), source=source)

    def _new_separators(self, stored: StoredTokens, start: int, end: int) -> Tensor:
        """Columns of what the past window ``start .. end`` gives to the separators. ``[B, equally many]``"""
        is_separator = _is_any(stored.ids[:, start:end], self.separator_ids)
        counts = is_separator.sum(1, keepdim=True)
        most = int(counts.max() if self.fills_rows else counts.min())
        number = torch.arange(most, device=stored.ids.device)
        rank = is_separator.cumsum(1) - 1
        slots = torch.where(is_separator & (rank < most), rank, most)
        columns = torch.arange(start, end, device=stored.ids.device).expand_as(slots)
        chosen = torch.zeros(len(slots), most + 1, dtype=torch.int64, device=slots.device).scatter_(1, slots, columns)[:, :most]
        return torch.where(number < counts, chosen, end - most + number)


Policy = CachePolicy | ReferencePolicy


class TokenState(TypedDict):
    """What `StoredTokens.restored` needs."""

    columns: Tensor
    window_start: Tensor
    empty: Tensor
    dropped: Tensor
    growth: Tensor


class HistoryState(TypedDict):
    """What `TokenHistory.restore` needs."""

    tokens: TokenState
    num_columns: int
    kept_sum: int
    seen_sum: int
    has_compressed: bool


@dataclass(slots=True, kw_only=True)
class TokenHistory:
    """The tokens that layers of equal budgets hold, and what the latest of them changed; the keys are elsewhere."""

    policy: Policy
    stored: StoredTokens | None = None
    num_columns: int = 0
    """Columns that ever came, padding included."""
    step: Step | None = None
    """The latest."""
    kept_sum: int = 0
    """Tokens stored, added up over all steps so far and over rows."""
    seen_sum: int = 0
    """Tokens seen, likewise: the quotient is the share of the keys that this cache needs."""
    has_compressed: bool = False

    def advance(self, ids: Tensor, *, is_text: Tensor | None, positions: Tensor | None, compresses: When) -> Step:
        """What becomes of the rows when ``ids [B, T]`` come."""
        is_first = self.stored is None
        stored = StoredTokens.none(len(ids), ids.device) if self.stored is None else self.stored
        stored = stored.append(ids, is_text=is_text, positions=positions)
        stored = self.policy.begin(stored) if is_first else stored
        compression = None if compresses == "never" else self.policy.compress(stored)
        self.stored = stored if compression is None else compression.stored
        self.has_compressed |= compression is not None
        self.num_columns += ids.shape[1]
        sizes = self.stored.sizes
        self.step = Step(
            reads=self.stored if compresses == "before reading" else stored,
            source=None if compression is None else compression.source,
            num_new=ids.shape[1],
            is_first=is_first,
            compresses=compresses,
            limit=self.policy.budget.total + sizes.most_growth,
        )
        is_reference = isinstance(self.policy, ReferencePolicy)
        kept = self.stored.width if is_reference else self.stored.width * self.stored.num_rows - sizes.num_empty
        self.kept_sum += kept
        self.seen_sum += self.num_columns if is_reference else kept + sizes.num_dropped
        return self.step

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.stored is not None:
            self.stored = self.stored.select(rows)

    def state(self) -> HistoryState:
        """All of it, for `restore` under the same policy, in tensors and numbers. Not under a `ReferencePolicy`."""
        if self.stored is None or self.stored.lockstep is not None:
            raise ValueError("Only a cache that holds tokens, and without reference_compat, has a state to save.")
        return HistoryState(
            tokens=self.stored.state(),
            num_columns=self.num_columns,
            kept_sum=self.kept_sum,
            seen_sum=self.seen_sum,
            has_compressed=self.has_compressed,
        )

    def restore(self, state: HistoryState, device: torch.device | str) -> None:
        """As it was when `state` was called, with the tokens on a device."""
        self.stored = StoredTokens.restored(state["tokens"], device)
        self.num_columns, self.step = state["num_columns"], None
        self.kept_sum, self.seen_sum, self.has_compressed = state["kept_sum"], state["seen_sum"], state["has_compressed"]

    def reset(self) -> None:
        """Forget everything."""
        self.stored, self.step, self.num_columns, self.kept_sum, self.seen_sum, self.has_compressed = None, None, 0, 0, 0, False


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What the latest tokens changed, for the layers that hold their keys."""

    reads: StoredTokens
    """What the new tokens may read, themselves included: they are the last `num_new` columns."""
    source: Tensor | None
    """As in `Compression`; None where nothing was compressed."""
    num_new: int
    is_first: bool
    """Whether nothing was stored before."""
    compresses: When
    limit: int
    """The most columns that a row may hold before it is compressed."""

    def ranges(self, *, sliding_width: int | None = None) -> KeyRanges:
        """What the new tokens read: all that their row holds up to themselves, ``sliding_width`` aside. Waits for no device."""
        stored, width = self.reads, self.reads.width
        if self.num_new == 1 and stored.has_text_in_every_row:
            end, first = torch.full_like(stored.first, width), stored.first
        else:
            end = torch.arange(width - self.num_new + 1, width + 1, dtype=torch.int32, device=stored.first.device)
            end = end.expand(stored.num_rows, -1).contiguous()
            first = torch.minimum(stored.first, end)
        start = first
        if sliding_width is not None:
            places = stored.places[:, width - self.num_new :]
            earliest = torch.searchsorted(stored.places.contiguous(), (places - sliding_width).clamp(min=0), out_int32=True)
            start = torch.minimum(torch.maximum(earliest, first), end)
        no_far_keys = torch.zeros_like(end)
        return KeyRanges(
            index=no_far_keys[:, :0],
            far_lo=no_far_keys,
            far_hi=no_far_keys,
            band_lo=start,
            band_hi=end,
            num_keys=width,
            longest_band=width,
            is_causal=sliding_width is None and not stored.has_empty_columns,
            extremes=(first, end),
        )


def _is_any(ids: Tensor, wanted: frozenset[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted(wanted), dtype=ids.dtype, device=ids.device))


def _rank_from_last(flags: Tensor) -> Tensor:
    """How many flags of a row stand in a column or after it. ``[B, S]`` int64"""
    return flags.flip(1).cumsum(1).flip(1)


def _newest_last(is_kept: Tensor, width: int) -> Tensor:
    """The kept columns of each row, in order, at the right of ``width`` columns; 0 in those left over. ``[B, width]`` int64"""
    rows, old_width = is_kept.shape
    target = torch.where(is_kept, width - _rank_from_last(is_kept), width)
    columns = torch.arange(old_width, device=is_kept.device).expand(rows, -1)
    return torch.zeros(rows, width + 1, dtype=torch.int64, device=is_kept.device).scatter_(1, target, columns)[:, :width]

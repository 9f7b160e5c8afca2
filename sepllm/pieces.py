"""Rows of text cut into pieces, one a process: which keys the queries of a piece read, and which of them other pieces hold.

A piece needs its own keys, the far keys before it and the windows that reach into it, and nothing else. In the order of the text,
without the columns between, they are the keys of an attention of their own:

    text    a a . , . . . . , . . . . . . ? . . . .        a piece of two chunks:  . . . .  and  . . . .
            [own  ]         [n n]                           it borrows what is far before its last query (a a , ,) and the n - 1
    keys    a a . , . . . .                                 neighbours before each chunk

In that order bounds still never decrease, bands are still contiguous, and no attention core can tell the difference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from sepllm.layout import KeyRanges, covered, far_capacity


def zigzag_columns(length: int, count: int) -> Tensor:
    """The columns of each of ``count`` pieces of a row, ascending. ``[count, length / count]`` int64.

    A row is cut into ``2 * count`` chunks, and piece p has chunk p and the p-th from the end. Late queries read more far keys than early
    ones; a piece that has both has the mean.
    """
    if length % (2 * count):
        raise ValueError(f"A row of {length} tokens does not cut into {count} pieces of two chunks: use a multiple of {2 * count} tokens.")
    chunks = torch.arange(length).view(2 * count, -1)
    return torch.cat([chunks[:count], chunks[count:].flip(0)], 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Where the keys come from that a piece reads. Places are rows of flat ``[B * T]`` (its own keys) and ``[B * S]`` (those it reads)."""

    kept_from: Tensor
    """``[own keys read here]`` int64: places among the own keys"""
    kept_at: Tensor
    """and among the keys read."""
    sent: Tensor
    """``[keys sent]`` int64: places among the own keys, those for the first piece first."""
    received_at: Tensor
    """``[keys received]`` int64: places among the keys read, those from the first piece first."""
    counts: Tensor
    """``[2, pieces]`` int64, always on the CPU: how many keys each piece is sent, and how many come from it."""
    num_keys: int
    """``S``: keys read per row, rounded up. Places that nothing fills belong to no key."""

    @property
    def num_sent(self) -> int:
        """Keys that leave this process, each with its value, for each layer and forward pass; backward as many gradients come back."""
        return len(self.sent)

    def to(self, device: torch.device | str) -> Exchange:
        """The same on another device (the copy does not wait for it)."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("kept_from", "kept_at", "sent", "received_at")}
        return replace(self, **moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceRanges:
    """What the queries of a piece read, over the keys that it reads."""

    ranges: KeyRanges
    exchange: Exchange
    columns: Tensor
    """``[B, S]`` int64: the column of the text of each key; 0 where there is none."""

    @classmethod
    def of(cls, ranges: KeyRanges, columns: Tensor, *, piece: int, needs_extremes: bool = False) -> PieceRanges:
        """Those of one ``piece``, from ``ranges`` of all columns of the text and the ``columns [pieces, T]`` of every piece, on the CPU.

        O(pieces * S). ``needs_extremes``: the softmax looks at every key that a query could read, so all of these are fetched.
        """
        is_read = _read_by_pieces(ranges, columns, needs_extremes=needs_extremes)
        keys = _Numbering.of(is_read[piece], step_of=ranges.num_keys)
        return cls(
            ranges=_over_keys(ranges, columns[piece], keys, needs_extremes=needs_extremes),
            exchange=_exchange(is_read, columns, keys, piece=piece),
            columns=keys.move(torch.arange(ranges.num_keys).expand(is_read.shape[1:])),
        )

    def to(self, device: torch.device | str) -> PieceRanges:
        """The same on another device (the copy does not wait for it)."""
        columns = self.columns.to(device, non_blocking=True)
        return replace(self, ranges=self.ranges.to(device), exchange=self.exchange.to(device), columns=columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Numbering:
    """New numbers of those columns that stay, in their order."""

    stays: Tensor
    """``[B, columns]`` bool"""
    before: Tensor
    """``[B, columns + 1]`` int32: how many stay before each, so the new number of one that stays."""
    size: int
    """New columns, rounded up so that shapes repeat."""

    @classmethod
    def of(cls, stays: Tensor, *, step_of: int) -> _Numbering:
        before = pad(stays, (1, 0)).cumsum(1, dtype=torch.int32)
        return cls(stays=stays, before=before, size=far_capacity(int(before[:, -1].max()), step_of) if stays.shape[1] else 0)

    def bounds(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The same ranges ``low <= c < high`` of columns that all stay, by their new numbers."""
        return self.before.gather(1, low.long()), self.before.gather(1, high.long())

    def move(self, x: Tensor) -> Tensor:
        """``x [B, columns]`` of the columns that stay, in their new places; 0 in the others. ``[B, size]``"""
        places = torch.where(self.stays, self.before[:, :-1], self.size).long()
        return x.new_zeros(len(x), self.size + 1).scatter_(1, places, x)[:, :-1]


def _read_by_pieces(ranges: KeyRanges, columns: Tensor, *, needs_extremes: bool) -> Tensor:
    """Which keys the queries of each piece read. ``[pieces, B, S]`` bool."""
    read = []
    for queries in columns:
        own = ranges.at(queries)
        read.append(~own.unread_keys())
        if needs_extremes and own.extremes is not None:
            read[-1] |= covered(*own.extremes, ranges.num_keys)
    return torch.stack(read)


def _over_keys(ranges: KeyRanges, queries: Tensor, keys: _Numbering, *, needs_extremes: bool) -> KeyRanges:
    """What ``queries`` read when only the numbered ``keys`` are there, and of the far columns those that they read."""
    own = ranges.at(queries)
    far = _Numbering.of(covered(own.far_lo, own.far_hi, ranges.index.shape[1]), step_of=keys.size)
    far_lo, far_hi = far.bounds(own.far_lo, own.far_hi)
    band_lo, band_hi = keys.bounds(own.band_lo, own.band_hi)
    return replace(
        own,
        index=far.move(keys.before.gather(1, ranges.index.long())),
        far_lo=far_lo,
        far_hi=far_hi,
        band_lo=band_lo,
        band_hi=band_hi,
        num_keys=keys.size,
        longest_band=min(ranges.longest_band, keys.size),
        extremes=keys.bounds(*own.extremes) if needs_extremes and own.extremes is not None else None,
    )


def _exchange(is_read: Tensor, columns: Tensor, keys: _Numbering, *, piece: int) -> Exchange:
    """``is_read [pieces, B, S]``. Sender and receiver list the same keys in the same order: by row, then by column."""
    own = columns[piece]
    wanted, offered = is_read[piece][:, columns].transpose(0, 1), is_read[:, :, own]  # [pieces, B, T]: of each piece, and by each
    place = keys.before[:, :-1].long() + torch.arange(len(keys.before))[:, None] * keys.size
    kept_from = wanted[piece].flatten().nonzero()[:, 0]
    elsewhere = (torch.arange(len(columns)) != piece)[:, None, None]
    wanted, offered = wanted & elsewhere, offered & elsewhere
    return Exchange(
        kept_from=kept_from,
        kept_at=place[:, own].flatten()[kept_from],
        sent=offered.flatten().nonzero()[:, 0] % offered[0].numel(),
        received_at=place[:, columns].transpose(0, 1).flatten()[wanted.flatten().nonzero()[:, 0]],
        counts=torch.stack([offered.sum((1, 2)), wanted.sum((1, 2))]),
        num_keys=keys.size,
    )

"""Pieces in one process: every piece reads what the whole row reads, and what it fetches is exactly what others hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sepllm.attention import PositionBias, attend
from sepllm.layout import KeyRanges, TokenLayout
from sepllm.pattern import UNBOUNDED, AttentionPattern, SelfAdjust, Softmax, Standard
from sepllm.pieces import PieceRanges, zigzag_columns
from sepllm.positions import Positions, alibi_slopes

SEPARATORS = (1, 2)
DOCUMENT_END = 3
LENGTH = 96


def random_ids(*, rows: int = 3, length: int = LENGTH) -> Tensor:
    """Rows with few, no and many separators."""
    torch.manual_seed(length)
    is_separator = torch.rand(rows, length) < torch.tensor([[0.15], [-1.0], [0.5]])[:rows]
    return torch.where(is_separator, torch.randint(1, 3, (rows, length)), torch.randint(4, 50, (rows, length)))


@dataclass(frozen=True)
class Text:
    pattern: AttentionPattern
    left: int = 0
    right: int = 0
    document_ends: tuple[int, ...] = ()

    def layout(self) -> TokenLayout:
        ids = random_ids()
        mask = torch.ones_like(ids)
        mask[1:, : self.left] = 0
        mask[1:, LENGTH - self.right :] = 0
        ids[0, list(self.document_ends)] = DOCUMENT_END
        return TokenLayout.from_ids(
            ids,
            self.pattern,
            attention_mask=mask if self.left or self.right else None,
            document_end_id=DOCUMENT_END if self.document_ends else None,
        )


def sepllm(*windows: int, **others: object) -> AttentionPattern:
    return AttentionPattern(initial_tokens=3, separator_ids=SEPARATORS, windows=windows, **others)  # type: ignore[arg-type]


TEXTS = {
    "window 1": Text(sepllm(1)),
    "window below a chunk": Text(sepllm(7)),
    "window over several chunks": Text(sepllm(40)),
    "H layers": Text(sepllm(5, UNBOUNDED, 30)),
    "full attention": Text(AttentionPattern.full(1)),
    "no far keys": Text(AttentionPattern(windows=(6,))),
    "initial tokens beyond a chunk": Text(AttentionPattern(initial_tokens=20, windows=(4,))),
    "grids": Text(AttentionPattern(initial_tokens=2, windows=(4, 9), intervals=(5, 7))),
    "sliding width": Text(sepllm(6, sliding_width=33)),
    "padding": Text(sepllm(9), left=17, right=30),
    "nearly all padding": Text(sepllm(9), left=90),
    "packed documents": Text(sepllm(9), document_ends=(0, 13, 14, 50, 90)),
    "padded documents": Text(sepllm(30), left=5, document_ends=(0, 13, 14, 50, 90)),
}
EVERY_TEXT = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
COUNTS = pytest.mark.parametrize("count", [1, 2, 4, 8])


def pieces_of(ranges: KeyRanges, count: int, *, needs_extremes: bool = False) -> Iterator[tuple[Tensor, PieceRanges]]:
    """The columns and the ranges of each piece."""
    columns = zigzag_columns(LENGTH, count)
    for piece, own in enumerate(columns):
        yield own, PieceRanges.of(ranges, columns, piece=piece, needs_extremes=needs_extremes)


def distinct(layout: TokenLayout) -> list[KeyRanges]:
    return list({id(ranges): ranges for ranges in map(layout.ranges, range(layout.pattern.num_layers))}.values())


@EVERY_TEXT
@COUNTS
def test_queries_of_a_piece_read_what_they_read_in_the_whole_row(text: Text, count: int) -> None:
    for whole in distinct(text.layout()):
        for own, made in pieces_of(whole, count):
            reads = torch.zeros(3, len(own), LENGTH, dtype=torch.int64)
            columns = made.columns[:, None].expand(-1, len(own), -1)
            reads.scatter_add_(2, columns, made.ranges.dense().long())
            assert torch.equal(reads, whole.dense()[:, own].long())
            assert torch.equal(made.ranges.read_keys(), whole.read_keys()[:, own])


@EVERY_TEXT
@COUNTS
def test_bounds_of_a_piece_keep_the_promises_that_cores_rely_on(text: Text, count: int) -> None:
    for whole in distinct(text.layout()):
        for _, made in pieces_of(whole, count):
            ranges = made.ranges
            for bound in (ranges.far_lo, ranges.far_hi, ranges.band_lo, ranges.band_hi):
                assert bound.dtype == torch.int32
                assert bool((bound.diff(dim=1) >= 0).all())
            assert int((ranges.band_hi - ranges.band_lo).max()) <= ranges.longest_band <= ranges.num_keys
            assert bool((ranges.far_hi <= ranges.index.shape[1]).all())
            for index, used in zip(ranges.index, ranges.far_hi.amax(1).tolist(), strict=True):
                assert bool((index[:used].diff() > 0).all())
                assert not index[used:].any()
            assert not ranges.is_causal


@EVERY_TEXT
@COUNTS
def test_every_piece_is_sent_exactly_the_keys_that_it_reads_and_does_not_hold(text: Text, count: int) -> None:
    """The exchange played on lists: keys are numbers that name their row and column."""
    names = torch.arange(3)[:, None] * 1000 + torch.arange(LENGTH)
    for whole in distinct(text.layout()):
        made = [piece for _, piece in pieces_of(whole, count)]
        owned = [names[:, own].flatten() for own in zigzag_columns(LENGTH, count)]
        letters = [held[piece.exchange.sent].split(piece.exchange.counts[0].tolist()) for held, piece in zip(owned, made, strict=True)]
        for place, piece in enumerate(made):
            plan = piece.exchange
            received = torch.cat([letters[sender][place] for sender in range(count)])
            assert [len(letters[sender][place]) for sender in range(count)] == plan.counts[1].tolist()
            assert plan.counts[:, place].tolist() == [0, 0]
            keys = torch.full((3 * plan.num_keys,), -1)
            keys[plan.kept_at] = owned[place][plan.kept_from]
            keys[plan.received_at] = received
            is_read = ~piece.ranges.unread_keys()
            assert torch.equal(keys.view(3, -1) >= 0, is_read)
            assert torch.equal(keys.view(3, -1)[is_read], (names[:, :1] + piece.columns)[is_read])
            assert plan.num_sent == len(plan.sent)


@dataclass(frozen=True)
class Case:
    text: Text
    softmax: Softmax = Standard()
    has_bias: bool = False
    segment_end_ids: tuple[int, ...] | None = None


CASES = {
    "separators": Case(TEXTS["window below a chunk"]),
    "H layers": Case(TEXTS["H layers"]),
    "full attention": Case(TEXTS["full attention"]),
    "padding": Case(TEXTS["padding"]),
    "packed documents": Case(TEXTS["packed documents"]),
    "ALiBi": Case(TEXTS["window over several chunks"], has_bias=True),
    "BiPE's ALiBi": Case(TEXTS["packed documents"], has_bias=True, segment_end_ids=SEPARATORS),
    "raw": Case(TEXTS["window below a chunk"], SelfAdjust(kind="raw")),
    "normalised": Case(TEXTS["padding"], SelfAdjust(kind="normalised", numerator_bias=0.5, denominator_bias=0.1)),
    "extremes of all keys": Case(TEXTS["packed documents"], SelfAdjust(kind="normalised", extremes="causal")),
}


COMPUTED = [
    pytest.param(core, case, id=f"{name}-{core}")
    for name, case in CASES.items()
    for core in ("native", "chunked", "dense")
    if core != "chunked" or case.softmax == Standard()
]


@pytest.mark.parametrize(("core", "case"), COMPUTED)
def test_pieces_together_give_the_outputs_and_gradients_of_the_whole(core: str, case: Case) -> None:
    layout = case.text.layout()
    positions = Positions.of(layout, segment_end_ids=case.segment_end_ids)
    slopes = alibi_slopes(4).double() if case.has_bias else None
    bias = None if slopes is None else PositionBias(slopes, positions.queries, positions.keys)
    needs_extremes = isinstance(case.softmax, SelfAdjust) and case.softmax.extremes == "causal"
    q, k, v, upstream = (torch.randn(3, LENGTH, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2, 4))
    for whole in distinct(layout):
        expected = attend(q, k, v, whole, scale=1 / math.sqrt(8), core="dense", softmax=case.softmax, bias=bias)
        wanted = torch.autograd.grad(expected, (q, k, v), upstream.detach())
        outs = []
        for own, made in pieces_of(whole, 4, needs_extremes=needs_extremes):
            fetched = made.columns[..., None, None].expand(-1, -1, 2, 8)
            keys, values = (x.gather(1, fetched) for x in (k, v))
            own_bias = None if slopes is None else PositionBias(slopes, positions.queries[:, own], positions.keys.gather(1, made.columns))
            outs.append(attend(q[:, own], keys, values, made.ranges, scale=1 / math.sqrt(8), core=core, softmax=case.softmax, bias=own_bias))
        out = torch.cat(outs, 1)[:, zigzag_columns(LENGTH, 4).flatten().argsort()]
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        for gradient, of_whole in zip(torch.autograd.grad(out, (q, k, v), upstream.detach()), wanted, strict=True):
            torch.testing.assert_close(gradient, of_whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_pairs_of_chunks_share_the_work_evenly_and_plain_pieces_do_not(count: int) -> None:
    """Kept pairs of the busiest piece over the mean."""
    length = 4096
    ids = torch.where(torch.rand(1, length, generator=torch.Generator().manual_seed(0)) < 0.16, 1, 9)
    read = TokenLayout.from_ids(ids, sepllm(64)).ranges(0).read_keys()[0].double()
    zigzag = read[zigzag_columns(length, count)].sum(1)
    plain = read.view(count, -1).sum(1)
    assert zigzag.max() / zigzag.mean() < 1.03
    assert plain.max() / plain.mean() > 1.3


def test_only_what_is_far_or_near_is_fetched() -> None:
    """At 16 % separators, a window of 64 and 4 pieces of 4096 tokens: a sixth of what an all-gather of keys sends."""
    length, count = 4096, 4
    ids = torch.where(torch.rand(1, length, generator=torch.Generator().manual_seed(0)) < 0.16, 1, 9)
    ranges, columns = TokenLayout.from_ids(ids, sepllm(64)).ranges(0), zigzag_columns(length, count)
    sent = sum(PieceRanges.of(ranges, columns, piece=piece).exchange.num_sent for piece in range(count))
    assert sent < 0.17 * (count - 1) * length


def test_a_row_that_does_not_cut_into_pairs_of_chunks_is_refused() -> None:
    with pytest.raises(ValueError, match="A row of 20 tokens does not cut into 4 pieces of two chunks: use a multiple of 8 tokens"):
        zigzag_columns(20, 4)

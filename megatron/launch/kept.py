"""The share of the attention map that a pattern computes, without torch: exact counts over a few samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from sepllm.pattern import AttentionPattern

if TYPE_CHECKING:
    from megatron.data.indexed import IndexedDataset

SAMPLES = 8


def kept_ratio(pattern: AttentionPattern, samples: Sequence[Sequence[int]]) -> float:
    """Read pairs over all causal pairs, over all layers and these samples of equal length (of token ids)."""
    kept = sum(
        _kept_pairs(pattern, [pattern.is_far(key, key_id=key_id, layer=layer) for key, key_id in enumerate(ids)], layer) * count
        for ids in samples
        for layer, count in _distinct_layers(pattern)
    )
    length = len(samples[0])
    return kept / (len(samples) * pattern.num_layers * length * (length + 1) // 2)


def expected_kept_ratio(pattern: AttentionPattern, length: int, *, share: float) -> float:
    """The mean of `kept_ratio` over texts of ``length`` tokens, each of them a separator with probability ``share``."""
    chance = share if pattern.separator_ids else 0.0
    kept = sum(
        _kept_pairs(pattern, [1.0 if pattern.is_far(key, key_id=-1, layer=layer) else chance for key in range(length)], layer) * count
        for layer, count in _distinct_layers(pattern)
    )
    return kept / (pattern.num_layers * length * (length + 1) / 2)


def _distinct_layers(pattern: AttentionPattern) -> list[tuple[int, int]]:
    """One layer of each kind, and how many there are of it."""
    kinds = [(window, pattern.intervals[layer] if pattern.intervals else 0) for layer, window in enumerate(pattern.windows)]
    return [(kinds.index(kind), kinds.count(kind)) for kind in dict.fromkeys(kinds)]


def _kept_pairs(pattern: AttentionPattern, far: Sequence[float], layer: int) -> float:
    """Pairs (query, key) that a layer reads: the window of each query, and the far keys before it. ``far``: whether each key is, or how probably."""
    reach = pattern.sliding_width + 1 if pattern.sliding_width is not None else len(far)
    window = min(pattern.windows[layer], reach)
    kept = far_before = 0.0
    for query in range(len(far)):
        if query >= window:
            far_before += far[query - window]
        if query >= reach:
            far_before -= far[query - reach]
        kept += min(query + 1, window) + far_before
    return kept


def needs_data(pattern: AttentionPattern, length: int) -> bool:
    """Whether the share depends on where the separators stand."""
    return bool(pattern.separator_ids) and not pattern.is_full(length)


def read_samples(prefix: str, length: int) -> list[list[int]]:
    """A few stretches of ``length`` tokens, evenly spread over the data. None at all where it has fewer tokens than that."""
    from megatron.data.indexed import IndexedDataset

    dataset = IndexedDataset(prefix)
    starts = [len(dataset) * sample // SAMPLES for sample in range(SAMPLES)]
    samples = [list(islice(_tokens_from(dataset, start), length)) for start in dict.fromkeys(starts)]
    return [ids for ids in samples if len(ids) == length]


def _tokens_from(dataset: IndexedDataset, first: int) -> Iterator[int]:
    for sequence in range(first, len(dataset)):
        yield from dataset[sequence].tolist()

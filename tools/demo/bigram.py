"""A bigram model of a token stream: the floor that a trained model must beat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def bigram_loss(train: NDArray[np.integer], held_out: NDArray[np.integer], *, vocab_size: int) -> float:
    """Mean negative log-likelihood (nats per token) of ``held_out`` under the bigram counts of ``train``.

    Witten-Bell smoothing (Witten and Bell, 1991): the share of the unigram model after a token is the number of its distinct
    followers over that number plus its count. The unigram model itself has one count added everywhere.
    """
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    unigram = counts / counts.sum()
    pairs, pair_counts = np.unique(train[:-1].astype(np.int64) * vocab_size + train[1:], return_counts=True)
    first = pairs // vocab_size
    total = np.bincount(first, weights=pair_counts, minlength=vocab_size)
    distinct = np.bincount(first, minlength=vocab_size)

    wanted = held_out[:-1].astype(np.int64) * vocab_size + held_out[1:]
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, pair_counts[place], 0.0)
    before = held_out[:-1]
    is_known = total[before] > 0
    share = np.where(is_known, distinct[before] / np.maximum(distinct[before] + total[before], 1), 1.0)
    probability = (1 - share) * seen / np.maximum(total[before], 1) + share * unigram[held_out[1:]]
    return float(-np.log(probability).mean())

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from tools.demo.bigram import bigram_loss


def definition(train: list[int], held_out: list[int], vocab_size: int) -> float:
    """Witten-Bell, written as loops."""
    total = 0.0
    for before, token in pairwise(held_out):
        followers = [b for a, b in pairwise(train) if a == before]
        unigram = (train.count(token) + 1) / (len(train) + vocab_size)
        distinct = len(set(followers))
        share = distinct / (distinct + len(followers)) if followers else 1.0
        seen = followers.count(token) / len(followers) if followers else 0.0
        total -= math.log((1 - share) * seen + share * unigram)
    return total / (len(held_out) - 1)


def test_loss_is_witten_bells_definition() -> None:
    generator = np.random.default_rng(0)
    train, held_out = generator.integers(0, 12, 300), generator.integers(0, 15, 100)
    assert bigram_loss(train, held_out, vocab_size=15) == pytest.approx(definition(train.tolist(), held_out.tolist(), 15))


def test_probabilities_after_any_token_sum_to_one() -> None:
    train = np.array([0, 1, 2, 1, 1, 3, 0])
    for before in range(5):
        losses = [bigram_loss(train, np.array([before, token]), vocab_size=5) for token in range(5)]
        assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1)

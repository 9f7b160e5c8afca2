"""The vocabulary of one layout in the rows of another."""

from __future__ import annotations

import torch

from megatron.training.vocabulary import repadded, with_rows, without_rows

WORDS = "sequential.0.word_embeddings.weight"


def test_rows_of_padding_come_and_go() -> None:
    state = {WORDS: torch.arange(12.0).view(6, 2), "sequential.2.mlp.linear1.weight": torch.ones(6, 2)}
    wide = repadded(state, vocab_size=5, rows=8)
    assert torch.equal(wide[WORDS][:6], state[WORDS])
    assert torch.equal(wide[WORDS][6:], state[WORDS].mean(0).expand(2, 2))
    assert torch.equal(repadded(wide, vocab_size=5, rows=6)[WORDS], state[WORDS])
    assert torch.equal(without_rows(with_rows(state, 9), 6)[WORDS], state[WORDS])
    assert torch.equal(wide["sequential.2.mlp.linear1.weight"], torch.ones(6, 2))


def test_a_matrix_of_fewer_tokens_is_not_stretched() -> None:
    state = {WORDS: torch.ones(4, 2)}
    assert repadded(state, vocab_size=5, rows=8)[WORDS].shape == (4, 2)

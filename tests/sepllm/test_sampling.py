from __future__ import annotations

import pytest
import torch

from sepllm.sampling import Sampling, keep_top_k, keep_top_p, next_tokens


def logits_of(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def kept(logits: torch.Tensor) -> list[int]:
    return logits[0].isfinite().nonzero()[:, 0].tolist()


def test_temperature_zero_takes_the_most_likely_token_whatever_the_filters() -> None:
    logits = torch.randn(5, 17)
    assert torch.equal(next_tokens(logits, Sampling(top_k=3, top_p=0.5)), logits.argmax(-1))


@pytest.mark.parametrize(("count", "expected"), [(0, [0, 1, 2, 3]), (1, [2]), (2, [1, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])])
def test_top_k_keeps_the_k_most_likely(count: int, expected: list[int]) -> None:
    assert kept(keep_top_k(logits_of([0.15, 0.3, 0.5, 0.05]), count)) == expected


def test_top_k_keeps_ties_with_the_last_one_kept() -> None:
    assert kept(keep_top_k(logits_of([0.2, 0.4, 0.2, 0.2]), 2)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, [0, 1, 2, 3]), (0.01, [2]), (0.49, [2]), (0.51, [1, 2]), (0.9, [0, 1, 2]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_tokens_that_reach_the_probability(share: float, expected: list[int]) -> None:
    assert kept(keep_top_p(logits_of([0.15, 0.3, 0.5, 0.05]), share)) == expected


def test_filters_leave_the_kept_logits_and_the_input_as_they_were() -> None:
    logits = torch.randn(3, 50)
    before = logits.clone()
    for cut in (keep_top_k(logits, 7), keep_top_p(logits, 0.6)):
        assert torch.equal(torch.where(cut.isfinite(), logits, 0), torch.where(cut.isfinite(), cut, 0))
    assert torch.equal(logits, before)


def test_filters_treat_each_row_alone() -> None:
    logits = torch.randn(4, 30)
    together = keep_top_p(keep_top_k(logits, 12), 0.7)
    alone = torch.cat([keep_top_p(keep_top_k(row[None], 12), 0.7) for row in logits])
    assert torch.equal(together, alone)


def test_the_same_seed_draws_the_same_tokens() -> None:
    logits = torch.randn(64, 100)
    draws = [next_tokens(logits, Sampling(temperature=1.0), generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_draws_follow_the_tempered_distribution() -> None:
    logits = logits_of([0.1, 0.2, 0.7]).expand(40_000, -1)
    drawn = next_tokens(logits, Sampling(temperature=2.0), generator=torch.Generator().manual_seed(0))
    expected = (logits[0] / 2).softmax(-1)
    assert torch.allclose(torch.bincount(drawn, minlength=3) / len(drawn), expected, atol=0.01)


def test_filtered_tokens_are_never_drawn() -> None:
    logits = torch.randn(1, 50).expand(2_000, -1)
    drawn = next_tokens(logits, Sampling(temperature=3.0, top_k=5), generator=torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(logits[0].topk(5).indices.tolist())


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 1e-60, 5e-324])
def test_the_smaller_the_temperature_the_likelier_the_most_likely_token(temperature: float) -> None:
    logits = 100 * torch.randn(20, 50)
    for sampling in (Sampling(temperature=temperature), Sampling(temperature=temperature, top_k=5, top_p=0.9)):
        assert torch.equal(next_tokens(logits, sampling), logits.argmax(-1))


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_k", -1), ("top_p", 1.5), ("top_p", -0.5)],
)
def test_values_outside_their_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Sampling(**{field: value})

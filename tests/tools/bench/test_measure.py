from __future__ import annotations

from functools import partial

import pytest

from tools.bench.measure import MAX_ROUNDS, Ratio, interleave, rounds_for


def test_contenders_take_turns_in_order() -> None:
    order: list[str] = []

    def run(name: str) -> int:
        order.append(name)
        return len(order)

    results = interleave({name: partial(run, name) for name in "abc"}, rounds=3)
    assert order == list("abcabcabc")
    assert results == {"a": [1, 4, 7], "b": [2, 5, 8], "c": [3, 6, 9]}


def test_ratio_is_the_median_of_the_ratios_of_each_round() -> None:
    """And not the ratio of the medians, which is 1 here."""
    ratio = Ratio.of([2.0, 30.0, 8.0], [1.0, 10.0, 8.0])
    assert ratio.median == pytest.approx(2)
    assert ratio.low < ratio.median < ratio.high
    assert Ratio.of([1.0, 1.0], [4.0, 4.0]).median == pytest.approx(0.25)


def test_ratio_inside_the_spread_of_one_contender_run_twice_counts_as_one() -> None:
    spread = Ratio(median=0.97, low=0.9, high=1.01)
    assert Ratio(median=1.05, low=1, high=1.1).is_within(spread)
    assert Ratio(median=0.95, low=0.9, high=1).is_within(spread)
    assert not Ratio(median=1.2, low=1.1, high=1.3).is_within(spread)


def test_rounds_fill_the_budget_between_their_bounds() -> None:
    assert rounds_for(lambda: None, budget_s=1.0) == MAX_ROUNDS
    assert rounds_for(lambda: None, budget_s=0.0, fewest=7) == 7

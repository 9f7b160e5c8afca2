from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tools.sepllm.study.statistics import Interval, bootstrap_interval, paired, pooled_half_width, ranking, row_differences, t_interval


def test_interval_over_three_seeds_is_students_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, standard deviation 1, and t of 2 degrees of freedom at 97.5 % is 4.302653."""
    found = t_interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)


@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_interval_is_that_of_a_paired_t_test(count: int) -> None:
    first, second = np.random.default_rng(count).normal(size=(2, count))
    found = paired(dict(enumerate(first)), dict(enumerate(second)))
    wanted = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


def test_what_all_seeds_share_leaves_no_trace_in_a_paired_difference() -> None:
    level = {1: 10.0, 2: 0.0, 3: -5.0}
    found = paired({seed: value + 0.1 for seed, value in level.items()}, level)
    assert found.mean == pytest.approx(0.1)
    assert found.half_width < 1e-12


def test_other_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"seeds are \[1, 2\] and \[1, 3\]"):
        paired({1: 0.0, 2: 0.0}, {1: 0.0, 3: 0.0})


def test_one_seed_gives_no_interval() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        t_interval([0.1])


@pytest.mark.parametrize(("low", "high", "sign"), [(-2.0, -1.0, -1), (-1.0, 1.0, 0), (0.0, 1.0, 0), (1.0, 2.0, 1)])
def test_sign_is_0_unless_the_interval_leaves_0_out(low: float, high: float, sign: int) -> None:
    assert Interval(mean=(low + high) / 2, low=low, high=high).sign == sign


def test_pooled_half_width_is_the_root_mean_square_over_the_pairs() -> None:
    """b less a is 1, 2, 3 and c less a always 0, so that two of three pairs have the interval of 1, 2, 3 and one has none."""
    losses = {"a": {1: 0.0, 2: 0.0, 3: 0.0}, "b": {1: 1.0, 2: 2.0, 3: 3.0}, "c": {1: 0.0, 2: 0.0, 3: 0.0}}
    assert pooled_half_width(losses) == pytest.approx(4.302653 / math.sqrt(3) * math.sqrt(2 / 3), abs=1e-6)


def test_bootstrap_of_many_rows_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(0.3, 1.0, size=400)
    found = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert found == bootstrap_interval(values)


def test_bootstrap_of_equal_rows_is_a_point() -> None:
    found = bootstrap_interval([0.25] * 10)
    assert (found.low, found.mean, found.high) == (0.25, 0.25, 0.25)


def test_row_differences_are_means_over_the_seeds() -> None:
    assert row_differences([[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [1.0, 1.0]]) == [1.5, 2.5]


def test_ranking_orders_only_what_the_intervals_separate() -> None:
    """b is below c in every seed by much the same; a is as often above as below either."""
    losses = {
        "c": {1: 1.30, 2: 2.31, 3: 3.29},
        "a": {1: 1.00, 2: 2.90, 3: 3.10},
        "b": {1: 1.20, 2: 2.20, 3: 3.20},
    }
    places = {place.method: place for place in ranking(losses)}
    assert places["b"].ahead_of == ("c",)
    assert places["b"].not_separated == ("a",)
    assert places["c"].behind == ("b",)
    assert places["a"].not_separated == ("c", "b")
    assert [place.rank for place in ranking(losses)] == [1, 1, 2]


def test_ranking_of_clear_differences_is_complete() -> None:
    losses = {name: {seed: level + seed + 0.001 * seed * level for seed in (1, 2, 3)} for name, level in (("z", 3.0), ("x", 1.0), ("y", 2.0))}
    assert [(place.method, place.rank) for place in ranking(losses)] == [("x", 1), ("y", 2), ("z", 3)]

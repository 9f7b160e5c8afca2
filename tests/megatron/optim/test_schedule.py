from __future__ import annotations

import math

import pytest

from megatron.config.schema import ScheduleConfig
from megatron.optim.schedule import LearningRate

PEAK, FLOOR = 6e-4, 6e-5
STYLES = ["constant", "linear", "cosine", "exponential"]


def pythia(version: str) -> LearningRate:
    return LearningRate(ScheduleConfig.model_validate(schedule("cosine", version, end=143_000, warmup=0.01)))


def schedule(style: str, version: str, *, end: int = 1000, warmup: float = 0.1, min_lr: float = FLOOR) -> dict[str, object]:
    return {
        "lr": PEAK,
        "min_lr": min_lr,
        "lr_decay_style": style,
        "lr_decay_iters": end,
        "warmup": warmup,
        "lr_schedule_version": version,
    }


def rate(style: str, version: str, step: int, **changes: object) -> float:
    return LearningRate(ScheduleConfig.model_validate(schedule(style, version, **changes))).at(step)  # type: ignore[arg-type]


def test_pythias_rate_reaches_the_floor_at_115139_and_stays_there() -> None:
    rates = pythia("v1")
    assert rates.at(115_138) > FLOOR
    assert all(rates.at(step) == FLOOR for step in (115_139, 120_000, 142_999, 143_000))


def test_halfway_pythias_rate_was_lower_than_todays() -> None:
    assert pythia("v1").at(72_000) / PEAK == pytest.approx(0.510, abs=5e-4)
    assert pythia("v2").at(72_000) / PEAK == pytest.approx(0.552, abs=5e-4)
    assert pythia("v3").at(72_000) == pythia("v2").at(72_000)


def test_the_first_step_moves_only_in_v3() -> None:
    assert [pythia(version).at(0) for version in ("v1", "v2", "v3")] == [0, 0, PEAK / 1430]
    assert pythia("v3").at(1) == PEAK / 1430, "the first two steps share a rate"
    assert pythia("v2").at(1) == PEAK / 1430


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
@pytest.mark.parametrize("style", STYLES)
def test_warmup_is_a_line_below_the_floor_too(style: str, version: str) -> None:
    assert rate(style, version, 1) == pytest.approx(PEAK / 100)
    assert rate(style, version, 50) == pytest.approx(PEAK / 2)
    assert rate(style, version, 100) == pytest.approx(PEAK)


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("step", [101, 333, 777, 999, 1000])
def test_the_descent_runs_from_the_warmup_to_the_end(version: str, step: int) -> None:
    gone = (step - 100) / 900
    assert rate("linear", version, step) == pytest.approx(max(PEAK * (1 - gone), FLOOR))
    assert rate("cosine", version, step) == pytest.approx(FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * gone)) / 2)
    assert rate("exponential", version, step) == pytest.approx(PEAK * math.exp(-0.693 * gone))
    assert rate("constant", version, step) == PEAK


@pytest.mark.parametrize("step", [101, 333, 777, 900])
def test_v1_spreads_the_descent_over_the_whole_schedule(step: int) -> None:
    gone = (step - 100) / 1000
    assert rate("linear", "v1", step) == pytest.approx(PEAK * (1 - gone))
    assert rate("cosine", "v1", step) == pytest.approx(max(PEAK * (1 + math.cos(math.pi * gone)) / 2, FLOOR))
    assert rate("exponential", "v1", step) == pytest.approx(PEAK * math.exp(-0.693 * gone))


@pytest.mark.parametrize("style", STYLES)
def test_v1_stops_descending_one_warmup_before_the_end(style: str) -> None:
    assert rate(style, "v1", 1000) == rate(style, "v1", 900)


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
@pytest.mark.parametrize("style", STYLES)
def test_past_the_end_the_rate_stays(style: str, version: str) -> None:
    assert {rate(style, version, step) for step in (1001, 1500, 10**6)} == {rate(style, version, 1000)}


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_without_warmup_the_first_step_has_the_peak(version: str) -> None:
    assert rate("cosine", version, 0, warmup=0.0) == pytest.approx(PEAK)


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
@pytest.mark.parametrize("style", STYLES)
def test_a_warmup_shorter_than_a_step_does_not_pass_the_peak(style: str, version: str) -> None:
    """A hundredth, the default, of a run of four steps."""
    assert max(rate(style, version, step, end=4, warmup=0.01) for step in range(5)) <= PEAK


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("style", STYLES)
def test_a_schedule_that_is_all_warmup_has_an_end(style: str, version: str) -> None:
    assert rate(style, version, 2000, warmup=1.0) == pytest.approx(rate(style, version, 1000, warmup=0.5))

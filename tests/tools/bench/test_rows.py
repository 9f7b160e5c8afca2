from __future__ import annotations

import pytest

from tools.bench.measure import Ratio
from tools.bench.rows import PASSES, Row, Text, Timings, panels_of, rows_of, table_of

TEXT = Text(
    seq_length=100, batch=2, heads=3, head_size=8, window=4, layers=10, densities=[0.15, 0.17], far_keys=[18, 20], kept_pairs=2020, causal_pairs=10100
)
SPREADS = {direction: Ratio(median=1.0, low=0.95, high=1.05) for direction in PASSES}


def timings(variant: str, dtype: str, forward_s: float, total_s: float | None, *, mask_s: float = 0.0) -> Timings:
    return Timings(
        variant=variant,
        dtype=dtype,
        is_causal=variant == "causal",
        is_baseline=variant == "causal",
        forward_s=[forward_s] * 3,
        total_s=None if total_s is None else [total_s] * 3,
        mask_s=mask_s,
        error=1e-7,
    )


@pytest.fixture
def rows() -> list[Row]:
    contenders = [
        timings("causal", "fp32", 0.004, 0.012),
        timings("causal", "bf16", 0.005, 0.009),
        timings("ours", "fp32", 0.001, 0.003, mask_s=0.01),
        timings("forward only", "bf16", 0.0049, None),
    ]
    return rows_of(TEXT, contenders, spreads=SPREADS, gemm_tflops={"fp32": 1e-3, "bf16": 2e-3})


def row(rows: list[Row], variant: str, dtype: str, direction: str) -> Row:
    (found,) = (row for row in rows if (row.variant, row.dtype, row.direction) == (variant, dtype, direction))
    return found


def test_baseline_is_the_fastest_causal_of_any_dtype_for_each_pass(rows: list[Row]) -> None:
    assert {row.baseline for row in rows if row.direction == "fwd"} == {"causal fp32"}
    assert {row.baseline for row in rows if row.direction == "fwd+bwd"} == {"causal bf16"}
    ours = row(rows, "ours", "fp32", "fwd+bwd")
    assert ours.ratio == pytest.approx(3)
    assert ours.ratio_same_dtype == pytest.approx(4)


def test_reached_is_the_ratio_over_its_limit(rows: list[Row]) -> None:
    ours = row(rows, "ours", "fp32", "fwd")
    assert ours.share == pytest.approx(0.2)
    assert ours.limit == pytest.approx(5)
    assert ours.reached == pytest.approx(4 / 5)
    causal = row(rows, "causal", "fp32", "fwd")
    assert (causal.share, causal.limit, causal.ratio) == (1, 1, 1)


def test_one_layer_pays_its_part_of_the_mask(rows: list[Row]) -> None:
    ours = row(rows, "ours", "fp32", "fwd")
    assert ours.ms_with_mask == pytest.approx(1 + 10 / 10)
    assert ours.ratio_with_mask == pytest.approx(2)


def test_only_wanted_pairs_are_useful_work(rows: list[Row]) -> None:
    ours = row(rows, "ours", "fp32", "fwd+bwd")
    assert ours.useful_tflops == pytest.approx(14 * 8 * 3 * 2020 / 0.003 / 1e12)
    assert ours.gemm_share == pytest.approx(ours.useful_tflops / 1e-3)


def test_contender_without_a_backward_has_one_row(rows: list[Row]) -> None:
    assert [row.direction for row in rows if row.variant == "forward only"] == ["fwd"]


def test_ratio_within_the_spread_is_printed_as_one(rows: list[Row]) -> None:
    close = Timings(variant="close", dtype="fp32", is_causal=False, is_baseline=False, forward_s=[0.0039] * 3, total_s=None, mask_s=0, error=0)
    found = rows_of(TEXT, [timings("causal", "fp32", 0.004, None), close], spreads=SPREADS, gemm_tflops={"fp32": 1.0})
    assert [row.is_within_spread for row in found] == [False, True]
    assert "1.0 (A/A)" in table_of(TEXT, found, spreads=SPREADS).text()


def test_rows_say_pass_in_json(rows: list[Row]) -> None:
    keys = rows[0].as_dict().keys()
    assert keys >= {
        "variant",
        "seq_length",
        "pass",
        "dtype",
        "ms",
        "ratio",
        "share",
        "limit",
        "reached",
        "ratio_same_dtype",
        "ms_with_mask",
        "density",
    }
    assert "direction" not in keys


def test_picture_has_a_panel_a_pass_and_time_of_one_head(rows: list[Row]) -> None:
    forward, both = panels_of([TEXT], rows)
    assert len(forward.curves) == 4
    assert len(both.curves) == 3
    (ours,) = (curve for curve in forward.curves if curve.family == "ours")
    assert ours.points == {100: pytest.approx(1 / 6)}

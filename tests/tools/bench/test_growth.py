"""Curves over lengths: measured apart, ended by their budget, and fitted where they are long."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tools.bench import growth
from tools.bench.growth import SHARES, Growth, Point, fit_of, panels_of


def curve(seconds: dict[int, float], *, memory_bytes: int = 0, end: str | None = None) -> Growth:
    points = [Point(seq_length=length, seconds=s, calls=1, memory_bytes=memory_bytes * length) for length, s in seconds.items()]
    return Growth(kind="layer", pattern="full", points=tuple(points), end=end)


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0])
def test_exponent_is_found_again_over_the_longest_lengths(exponent: float) -> None:
    lengths = [512, 1024, 2048, 4096, 8192]
    found = fit_of(curve({length: 1e-6 * length**exponent + (length == 512) for length in lengths}), "time")
    assert found is not None
    assert found.exponent == pytest.approx(exponent)
    assert (found.first, found.last) == (1024, 8192)


def test_curve_of_one_length_has_no_exponent() -> None:
    assert fit_of(curve({512: 1.0}), "time") is None
    assert fit_of(curve({512: 1.0, 1024: 2.0}), "memory") is None, "nothing beyond what a short row took"


def test_label_of_a_curve_says_the_exponent_per_token() -> None:
    (time, memory) = panels_of([curve({512: 1.0, 1024: 4.0}, memory_bytes=100)])
    assert (time.curves[0].label, memory.curves[0].label) == ("full, S^1.00", "full, S^0.00")
    assert time.curves[0].points[1024] == pytest.approx(4e6 / 1024)


def test_budget_is_shared_out_whole() -> None:
    assert sum(SHARES.values()) == pytest.approx(1)


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(0, 12, 4000))
    return ["--tokens", str(tokens), "--separator-ids", "1", "2", "--threads", "1", "--window", "8", "--json", str(tmp_path / "out.json")]


def test_run_measures_every_curve_and_draws_them(flags: list[str], tmp_path: Path) -> None:
    png = tmp_path / "out.png"
    shape = ["--layer-lengths", "64", "128", "256", "--model-lengths", "32", "64", "--heads", "2", "--head-size", "16", "--png", str(png)]
    assert growth.main([*flags, *shape, "--minutes", "20"]) == 0
    out = json.loads((tmp_path / "out.json").read_text())
    assert [(row["kind"], row["pattern"], len(row["points"]), row["end"]) for row in out["rows"]] == [
        ("layer", "full", 3, None),
        ("layer", "sepllm", 3, None),
        ("model", "full", 2, None),
        ("model", "sepllm", 2, None),
    ]
    assert out["fits"]["layer full time"]["last"] == 256
    assert png.read_bytes().startswith(b"\x89PNG")


def test_curve_ends_where_its_time_does_and_the_table_says_so(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert growth.main([*flags, "--layer-lengths", "64", "128", "--model-lengths", "--minutes", "0"]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [len(row["points"]) for row in rows] == [1, 1]
    assert all("128 tokens could take" in row["end"] for row in rows)
    assert "full ends here: 128 tokens could take" in capsys.readouterr().out

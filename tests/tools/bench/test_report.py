from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from tools.bench.report import Curve, Panel, Result, Table, base_name, draw, label_heights, write


def test_labels_keep_their_order_and_their_distance() -> None:
    heights = [0.5, 0.51, 0.1, 0.52, 0.9]
    placed = label_heights(heights, gap=0.05)
    ordered = sorted(range(5), key=lambda i: heights[i])
    assert sorted(range(5), key=lambda i: placed[i]) == ordered
    gaps = [placed[b] - placed[a] for a, b in pairwise(ordered)]
    assert min(gaps) == pytest.approx(0.05)
    assert placed[2] == 0.1
    assert placed[4] == 0.9


def test_name_holds_only_letters_digits_and_hyphens() -> None:
    assert base_name("2026-01-31", "AMD EPYC (Milan)", "attention", "fp32") == "2026-01-31-amd-epyc-milan-attention-fp32"


def test_table_is_aligned_and_the_same_in_markdown() -> None:
    table = Table(title="T", columns=("name", "kind", "ms"), rows=[("a", "x", "1.0"), ("long name", "y", "10.0")])
    assert table.text().splitlines()[1:] == ["name       kind    ms", "a          x      1.0", "long name  y     10.0"]
    assert "| a | x | 1.0 |" in table.markdown()


@pytest.mark.parametrize("lengths", [[512], [512, 1024, 4096]])
def test_three_files_of_one_name(tmp_path: Path, lengths: list[int]) -> None:
    curves = [Curve(label=name, family=name, points={length: length * (i + 1.0) for length in lengths}) for i, name in enumerate("abc")]
    panels = [Panel(title="forward", unit="ms", curves=curves)] * 2
    result = Result(
        header={"device": "a CPU", "gemm_tflops": {"fp32": 0.123456}},
        body={"rows": [{"variant": "a"}]},
        tables=[Table(title="T", columns=("name", "kind", "ms"), rows=[("a", "x", "1.0")])],
        notes=["b does not run"],
        title="A run",
        picture=lambda path: draw(panels, "A run", path),
    )
    written = write(result, json_path=tmp_path / "other.json", png_path=None, save_as="name", folder=tmp_path / "results")
    assert {path.name for path in written} == {"name.md", "name.json", "name.png", "other.json"}
    assert (tmp_path / "results" / "name.png").read_bytes().startswith(b"\x89PNG")
    read = json.loads((tmp_path / "other.json").read_text())
    assert read["rows"] == [{"variant": "a"}]
    assert read["notes"] == ["b does not run"]
    text = (tmp_path / "results" / "name.md").read_text()
    for part in ("# A run", "a CPU", "fp32 0.1235", "| a | x | 1.0 |", "b does not run", "name.png"):
        assert part in text

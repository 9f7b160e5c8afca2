"""Runs of one model spread in different ways, compared with one process's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tools.bench.layouts import (
    LAYOUTS,
    METHODS,
    OF_EVERY_METHOD,
    ONE,
    PAGE,
    Case,
    Distance,
    Layout,
    Outcome,
    compare,
    main,
    overview,
    parse,
    run,
    with_overview,
    write_text,
)
from tools.bench.machine import ROOT


@pytest.mark.parametrize("text", [*LAYOUTS, "one"])
def test_a_layout_is_written_as_it_is_read(text: str) -> None:
    layout = Layout.parse(text)
    assert set(str(layout).split("-")) == set(text.split("-"))


def test_processes_are_the_product() -> None:
    assert Layout.parse("dp2-tp2-pp3-zero1").processes == 12
    assert Layout.parse("tp2-sp") == Layout(tp=2, sp=True)


@pytest.mark.parametrize("word", ["dp", "xp2", "sp2", "2"])
def test_an_unknown_word_is_a_sentence(word: str) -> None:
    with pytest.raises(ValueError, match=f"{word} in layout tp2-{word} is unknown"):
        Layout.parse(f"tp2-{word}")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_configuration_for_one_process(method: str, tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    config = Case(method=method, precision="fp32", layout=ONE).config(tmp_path, steps=2)
    assert config.batch.gradient_accumulation_steps == 8


def outcome(loss: float, weight: float) -> Outcome:
    return Outcome(losses=[loss, 2.0], norms=[1.0], validation=[3.0], weights={"a": torch.tensor([weight, 0.0])})


def test_the_distance_of_weights_is_of_the_way_they_have_come() -> None:
    distance = Distance.between(outcome(4.0, 1.5), outcome(4.4, 1.0), start={"a": torch.tensor([0.5, 0.0])})
    assert (distance.loss, distance.norm, distance.weights) == (pytest.approx(0.4 / 4.4), 0.0, pytest.approx(0.5))


def test_a_run_beyond_the_noise_of_one_process_is_told() -> None:
    one = Case(method="sepllm", precision="fp32", layout=ONE)
    cases = [one, *one.again]
    spread = [Case(method="sepllm", precision="fp32", layout=Layout.parse(text)) for text in ("dp2", "tp2")]
    found = [outcome(loss, 1.0) for loss in (4.0, 4.00001, 4.0001, 4.0002, 4.01)]
    outcomes = dict(zip([*cases, *spread], found, strict=True))
    near, far = compare(outcomes, {"sepllm": {"a": torch.zeros(2)}})
    assert (near.is_same, far.is_same) == (True, False)


def test_two_replicas_are_one_process() -> None:
    arguments = parse(["--methods", "sepllm", "--precisions", "fp32", "--layouts", "dp2", "--steps", "2"])
    result, problems = run(arguments)
    assert problems == []
    assert [row["layout"] for row in result.body["rows"]] == ["dp2"]  # type: ignore[attr-defined]


def test_the_page_shows_the_saved_result() -> None:
    page = PAGE.read_text(encoding="utf-8")
    (link,) = re.findall(r"[(]../(benchmarks/results/[^)]*layouts).md[)]", page)
    rows = json.loads((ROOT / f"{link}.json").read_text(encoding="utf-8"))["rows"]
    assert with_overview(page, rows) == page
    sepllm, others = overview(rows)
    assert [row[0] for row in sepllm.rows] == list(LAYOUTS)
    assert [row[0] for row in others.rows] == list(METHODS)[1:]
    assert others.columns[1:] == OF_EVERY_METHOD


def test_a_page_without_the_marks_is_left_alone() -> None:
    with pytest.raises(ValueError, match="put them back"):
        with_overview("A page.", [])


def test_a_layout_that_cannot_be_ends_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--methods", "sepllm", "--precisions", "fp32", "--layouts", "tp3"]) == 1
    assert "model_parallel_size (3) must divide num_attention_heads (4)" in capsys.readouterr().err

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megatron.config.loader import config_from_json, config_to_json
from megatron.data.batch import Batch
from megatron.model.gpt import build_model
from sepllm.pattern import SelfAdjust
from tools.datasets.demo_corpus import Document, build, split_of
from tools.sepllm.study import __main__ as study
from tools.sepllm.study.claims import CLAIMS, Claim, equal_cost, findings
from tools.sepllm.study.document import Study, grid, shown
from tools.sepllm.study.figure import mean_curve
from tools.sepllm.study.methods import BASE, TITLES, Method
from tools.sepllm.study.results import Point, RunResult, fingerprint
from tools.sepllm.study.statistics import t_interval
from tools.sepllm.study.train import POINTS, points_of, token_losses

WORDS = ("and", "the", "king", "of", "sea", "light", "spoke", "there", "was", "upon", "water", "stone")


def text_of(seed: int) -> str:
    generator = np.random.default_rng(seed)
    lines = (" ".join(generator.choice(WORDS, size=6)) for _ in range(12))
    return "\n".join(f"{line.capitalize()}, {generator.choice(WORDS)}." for line in lines)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study's base, smaller, on a corpus of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = [Document(source="test", title=str(seed), text=text_of(seed)) for seed in range(120)]
    assert {split_of(document) for document in documents} == {"train", "valid", "test"}
    build(documents, folder, vocab_size=300)
    keys = yaml.safe_load(BASE.read_text())
    keys |= {"hidden_size": 16, "seq_length": 64, "max_position_embeddings": 64, "train_iters": 6, "vocab_file": str(folder / "tokenizer.json")}
    keys |= {f"{split}_data_paths": [str(folder / split)] for split in ("train", "valid", "test")}
    path = folder / "base.yml"
    path.write_text(yaml.safe_dump(keys))
    return path


def run_of(method: str, seed: int, **changes: object) -> RunResult:
    """A run whose validation loss falls along a straight line from 5 to 4, over 10 steps, 100 operations and 20 seconds."""
    curve = tuple(Point(step=step, flops=10.0 * step, cpu_s=2.0 * step, loss=5 - step / 10) for step in (5, 10))
    run = RunResult(
        method=method,
        seed=seed,
        fingerprint="f",
        parameters=1000,
        tokens=640,
        kept_ratio=1.0,
        kv_ratio=1.0,
        cores=("native",) * 2,
        median_step_cpu_s=2.0,
        median_step_s=2.5,
        train_losses=(5.0, 4.0),
        curve=curve,
        row_losses=(4.0, 4.5),
        place_losses=(4.5,) * 16,
    )
    return replace(run, **changes)  # type: ignore[arg-type]


def test_a_study_trains_ranks_and_goes_on_where_it_stopped(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["full", "sepllm-n64", "--base", str(base), "--seeds", "5", "6", "--out", str(tmp_path), "--processes", "2"]
    assert study.main(words) == 0
    said = capsys.readouterr().out
    assert "4 runs, 0 of them done before" in said
    assert "full attention" in said
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    first = RunResult.load(tmp_path / "sepllm-n64-seed5.json")
    assert [point.step for point in first.curve] == [1, 2, 3, 4, 5, 6]
    assert first.curve[0].loss > first.curve[-1].loss
    (tmp_path / "full-seed6.json").unlink()
    assert study.main(words) == 0
    assert "4 runs, 3 of them done before" in capsys.readouterr().out
    again = [json.loads((tmp_path / f"full-seed{seed}.json").read_text())["row_losses"] for seed in (5, 6)]
    assert again[0] != again[1]


def test_a_run_of_another_configuration_is_not_taken_for_this_one(base: Path, tmp_path: Path) -> None:
    config = Method.find("full").config(base, separators=[1], overrides={"seed": 1})
    task = study.tasks_of([Method.find("full")], [1], lambda method, seed: config, tmp_path)[0]
    run_of("full", 1, fingerprint=fingerprint(config)).save(task.result)
    assert task.done() is not None
    run_of("full", 1, fingerprint="of another").save(task.result)
    assert task.done() is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nonsense"], "no method file"),
        (["full"], "at least two"),
        (["full", "full"], "name of its own"),
        (["full", "sa", "--seeds", "1"], "at least two different"),
    ],
)
def test_a_study_that_compares_nothing_is_refused(words: list[str], sentence: str, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main([*words, "--base", str(base)]) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", TITLES)
def test_default_methods_are_their_files_with_other_separators(name: str, base: Path) -> None:
    config = Method.find(name).config(base, separators=[7, 8], overrides={"seed": 3})
    pattern = config.attention.prefill
    keys = yaml.safe_load(Method.find(name).path.read_text())
    has_separators = keys.get("separator_token_ids", [-1]) != [-1]
    assert pattern.separator_ids == (frozenset({7, 8}) if has_separators else frozenset())
    assert config.model.bipe_separator_ids == ((7, 8) if "BiPE_seps" in keys else ())
    assert isinstance(pattern.softmax, SelfAdjust) == (name == "sa")
    assert pattern.num_layers == 12
    assert fingerprint(config_from_json(config_to_json(config))) == fingerprint(config)


def test_all_methods_of_a_seed_start_from_the_same_weights(base: Path) -> None:
    states = [build_model(Method.find(name).config(base, separators=[7], overrides={"seed": 3})).state_dict() for name in TITLES]
    for state in states[1:]:
        assert all(torch.equal(state[name], weights) for name, weights in states[0].items())


def test_token_losses_have_the_mean_that_the_trainer_minimises(base: Path) -> None:
    config = Method.find("sepllm-n64").config(base, separators=[7], overrides={})
    model = build_model(config)
    rows = torch.randint(300, (5, 65), generator=torch.Generator().manual_seed(0))
    found = token_losses(model, rows, config.attention.prefill)
    assert found.shape == (5, 64)
    assert float(found.mean()) == pytest.approx(model.loss(Batch.from_rows(rows, config.attention.prefill)).item(), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 6, POINTS, 333, 1000])
def test_points_are_steps_of_the_run_and_the_last_is_one(steps: int) -> None:
    points = points_of(steps)
    assert max(points) == steps
    assert min(points) >= 1
    assert len(points) == min(steps, POINTS)


def test_losses_between_points_are_on_straight_lines() -> None:
    run = run_of("a", 1)
    assert run.loss_at(75.0, "flops") == pytest.approx(4.25)
    assert run.cost_of(4.25, "cpu_s") == pytest.approx(15.0)
    assert run.cost_of(3.9, "step") is None
    with pytest.raises(ValueError, match="from 50 to 100 of flops"):
        run.loss_at(101.0, "flops")


def test_equal_cost_is_where_the_cheaper_method_ends() -> None:
    cheap = run_of("cheap", 1, curve=tuple(Point(step=step, flops=7.5 * step, cpu_s=step, loss=5 - step / 10) for step in (5, 10)))
    assert equal_cost(cheap, run_of("dear", 1), "flops") == pytest.approx((4.0, 4.25))
    assert equal_cost(run_of("dear", 1), cheap, "step") == pytest.approx((4.0, 4.0))


def test_mean_curve_is_over_the_seeds() -> None:
    places, losses = mean_curve([run_of("a", 1), run_of("a", 2, curve=tuple(Point(step=s, flops=2.0, cpu_s=1, loss=1.0) for s in (5, 10)))], "flops")
    assert places.tolist() == [26.0, 51.0]
    assert losses.tolist() == pytest.approx([2.75, 2.5])


@pytest.mark.parametrize(
    ("shifts", "verdict"), [((-0.1, -0.11, -0.09), "agrees"), ((0.1, 0.11, 0.09), "contrary"), ((0.1, -0.1, 0.02), "not separated")]
)
def test_verdict_is_the_intervals(shifts: tuple[float, ...], verdict: str) -> None:
    runs = {
        "a": {s: run_of("a", s, row_losses=(4 + shift,)) for s, shift in enumerate(shifts)},
        "b": {s: run_of("b", s, row_losses=(4.0,)) for s in range(3)},
    }
    claim = Claim(text="", source="", lower="a", higher="b")
    assert [found.verdict for found in findings(runs, [claim])] == [verdict]
    assert findings({"a": runs["a"]}, [claim]) == []


def test_claims_are_about_the_default_methods() -> None:
    assert {name for claim in CLAIMS for name in (claim.lower, claim.higher)} == set(TITLES)


def small_study(base: Path) -> Study:
    levels = {"full": 4.0, "sepllm-n64": 4.1, "streamingllm-n64": 4.1}
    runs = {
        name: {seed: run_of(name, seed, row_losses=tuple(level + seed + jitter for jitter in (0.0, 0.01 * seed * (level > 4)))) for seed in (1, 2, 3)}
        for name, level in levels.items()
    }
    config = Method.find("full").config(base, separators=[7], overrides={})
    machine: dict[str, object] = {"device": "a CPU", "torch": "2", "date": "2026-01-31", "commit": "abc", "load": 0.1}
    return Study(
        runs=runs, titles={name: TITLES[name] for name in runs}, baseline="full", config=config, machine=machine, command="the command", processes=2
    )


def test_document_holds_every_table_and_leaves_nothing_to_fill_in(base: Path) -> None:
    text = small_study(base).markdown(picture="study.png", data="study.json")
    assert "$" not in text
    for word in ("SepLLM n=64", "StreamingLLM n=64", "the command", "not separated from", "(study.png)", "(study.json)", "**"):
        assert word in text
    widths = [{line.count("|") for line in table.splitlines()} for table in text.split("\n\n") if table.startswith("|")]
    assert len(widths) == 5
    assert all(len(counts) == 1 for counts in widths)


def test_summary_says_what_is_not_separated(base: Path) -> None:
    lines = small_study(base).summary().splitlines()
    assert lines[0].startswith("1. full attention")
    assert lines[0].endswith("ahead of all others")
    assert all("behind full attention; not separated from" in line for line in lines[1:])


def test_all_points_are_in_the_json(base: Path) -> None:
    held = json.loads(study.as_json(small_study(base)))
    assert len(held["runs"]) == 9
    assert held["runs"][0]["curve"][-1]["loss"] == 4.0


def test_only_separated_differences_are_bold() -> None:
    assert shown(t_interval([0.1, 0.11, 0.12])).startswith("**+0.1100 ± ")
    assert shown(t_interval([0.1, -0.11, 0.12])).startswith("+0.0367 ± ")


def test_figures_are_aligned_to_the_right() -> None:
    assert grid(("name", "loss"), [("a", "1.0")], words={"name"}) == "| name | loss |\n| --- | ---: |\n| a | 1.0 |"

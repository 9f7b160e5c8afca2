"""The study's picture: validation loss against steps, operations and time (the paper's Figures 1 and 5), and the differences at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tools.bench.report import BLACK, COLOURS
from tools.sepllm.study.claims import Runs
from tools.sepllm.study.results import Axis, RunResult
from tools.sepllm.study.statistics import paired

AXES: tuple[tuple[Axis, str, float, str], ...] = (
    ("step", "steps", 1, "steps"),
    ("flops", "operations", 1e12, "executed operations ($10^{12}$)"),
    ("cpu_s", "time", 1, "processor time of training steps (s)"),
)
LATER_PART = 0.3
"""The curves are drawn from this part of the run on: before, all of them fall steeply together."""


def draw(runs: Runs, titles: Mapping[str, str], baseline: str, path: Path, *, title: str) -> None:
    """Three panels of curves, each the mean over the seeds, and one of differences from ``baseline`` with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(12, 9), dpi=150, layout="constrained")
    colours = _colours(list(runs), baseline)
    for axes, (axis, name, unit, label) in zip(panels.flat, AXES, strict=False):
        _draw_curves(axes, runs, axis, unit, colours)
        axes.set(xlabel=label, ylabel="validation loss (nats per token)")
        axes.set_title(f"against {name}", fontsize=10)
    handles = [panels[0, 0].lines[place] for place in range(len(runs))]
    panels[0, 0].legend(handles, [titles[name] for name in runs], fontsize=9)
    _draw_differences(panels[1, 1], runs, titles, baseline, colours)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _colours(methods: Sequence[str], baseline: str) -> dict[str, str]:
    others = [name for name in methods if name != baseline]
    return {baseline: BLACK, **{name: COLOURS[place % len(COLOURS)] for place, name in enumerate(others)}}


def _draw_curves(axes, runs: Runs, axis: Axis, unit: float, colours: Mapping[str, str]) -> None:  # type: ignore[no-untyped-def]
    for name, of_seeds in runs.items():
        places, losses = mean_curve(list(of_seeds.values()), axis)
        is_late = np.asarray([point.step for point in next(iter(of_seeds.values())).curve]) >= LATER_PART * _last_step(of_seeds)
        axes.plot(places[is_late] / unit, losses[is_late], color=colours[name], lw=1.6, marker="o", ms=2.5)
    axes.grid(alpha=0.3)


def mean_curve(runs: Sequence[RunResult], axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Means over the seeds of where the points are and of their losses; all runs have their points after the same steps."""
    places = np.array([[getattr(point, axis) for point in run.curve] for run in runs], dtype=np.float64)
    return places.mean(0), np.array([[point.loss for point in run.curve] for run in runs]).mean(0)


def _last_step(of_seeds: Mapping[int, RunResult]) -> int:
    return next(iter(of_seeds.values())).curve[-1].step


def _draw_differences(axes, runs: Runs, titles: Mapping[str, str], baseline: str, colours: Mapping[str, str]) -> None:  # type: ignore[no-untyped-def]
    """A row a method: a small mark a seed, the mean, and its interval over the seeds."""
    reference = {seed: run.test_loss for seed, run in runs[baseline].items()}
    differences = {
        name: paired({seed: run.test_loss for seed, run in of_seeds.items()}, reference) for name, of_seeds in runs.items() if name != baseline
    }
    order = sorted(differences, key=lambda name: differences[name].mean, reverse=True)
    for row, name in enumerate(order):
        found = differences[name]
        axes.errorbar(found.mean, row, xerr=found.half_width, fmt="o", color=colours[name], capsize=4, lw=1.6)
        of_seeds = [run.test_loss - reference[seed] for seed, run in runs[name].items()]
        axes.plot(of_seeds, [row + 0.25] * len(of_seeds), "|", color=colours[name], ms=9)
    axes.axvline(0, color=BLACK, lw=1)
    axes.set_yticks(range(len(order)), [titles[name] for name in order])
    axes.set(xlabel=f"test loss less that of {titles[baseline]} (nats per token)", ylim=(-0.6, len(order) - 0.4))
    axes.set_title("after the last step: mean, 95 % over the seeds, and the seeds (|)", fontsize=10)
    axes.grid(alpha=0.3, axis="x")

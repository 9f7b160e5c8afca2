"""Whether SepLLM's fast attention trains as the plain masked softmax does: losses of both, from the same seed and data.

Two orders of the same sums round differently, and training amplifies that, so the runs cannot agree to the bit. How far apart they may
be is measured: the masked softmax runs again with the rows of each batch in reverse, and again with another number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron.config.schema import Config
from tools.bench import report
from tools.bench.arms import Arm, Trainee
from tools.bench.machine import describe

WARM_UP = 0.1
"""Of the steps; then the rate stays."""
ALLOWED = 3.0
"""Times the difference of the reruns, beyond which the losses count as different."""
LEAST_NOISE = {"fp32": 1e-6, "bfloat16": 1e-3}
"""Difference that a rerun could have shown, where it shows less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    label: str
    losses: Sequence[float]

    def differences(self, other: Run) -> list[float]:
        return np.abs(np.subtract(self.losses, other.losses)).tolist()


def compare(config: Config, text: Tensor, device: torch.device, *, model: str, facts: Mapping[str, object]) -> tuple[report.Result, list[str]]:
    """Losses of the four runs on ``text [steps, B, S + 1]``, and what is wrong with them."""
    machine = describe(device)
    ours = Run(label="ours (auto)", losses=losses(config, text, device, core="auto"))
    dense = Run(label="dense", losses=losses(config, text, device, core="dense"))
    reversed_rows = Run(label="dense, rows reversed", losses=losses(config, text.flip(1), device, core="dense"))
    threads = torch.get_num_threads()
    other_threads = 1 if threads > 1 else 2
    torch.set_num_threads(other_threads)
    rethreaded = Run(label=f"dense, {other_threads} thread{'s' if other_threads > 1 else ''}", losses=losses(config, text, device, core="dense"))
    torch.set_num_threads(threads)
    runs = [ours, dense, reversed_rows, rethreaded]
    largest = {run.label: max(run.differences(dense)) for run in runs if run is not dense}
    allowed = ALLOWED * max(largest[reversed_rows.label], largest[rethreaded.label], LEAST_NOISE[config.precision.precision])
    is_apart = not largest[ours.label] <= allowed
    title = f"Loss parity, {model} at S = {config.model.seq_length}: {machine.title()}"
    result = report.Result(
        header={**machine.as_dict(), **facts, "steps": len(text), "batch": text.shape[1]},
        body={"rows": [{"run": run.label, "losses": list(run.losses), "largest_difference": largest.get(run.label, 0.0)} for run in runs]},
        tables=[_table(runs, largest, steps=len(text))],
        notes=[],
        title=title,
        picture=partial(draw, runs, dense, title=title),
    )
    return result, [f"ours is {largest[ours.label]:.2g} from dense, and reruns of dense allow {allowed:.2g}"] if is_apart else []


def losses(config: Config, text: Tensor, device: torch.device, *, core: str) -> list[float]:
    """Loss of each training step from the configuration's seed."""
    trainee = Trainee(Arm(name=core, pattern="sepllm", core=core, executes="kept"), config, device)
    warm_up = max(1, round(WARM_UP * len(text)))
    return [trainee.step(rows, lr=config.schedule.lr * min(1, (step + 1) / warm_up)).loss for step, rows in enumerate(text)]


def draw(runs: Sequence[Run], dense: Run, path: Path, *, title: str) -> None:
    """Losses on the left, their differences from ``dense`` on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), dpi=150, layout="constrained")
    steps = range(1, len(dense.losses) + 1)
    for i, run in enumerate(runs):
        colour = report.BLACK if run is dense else report.COLOURS[i]
        if i < 2:
            left.plot(steps, run.losses, ls=("-", "--")[i], color=colour, lw=1.5, label=run.label)
        if run is not dense:
            right.plot(steps, np.maximum.accumulate(run.differences(dense)), color=colour, lw=1.5, label=run.label)
    left.set(xlabel="step", ylabel="loss (nats per token)", title="training loss")
    right.set(xlabel="step", ylabel="nats per token", yscale="log", title="largest distance from dense so far")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8.5)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
    plt.close(figure)


def _table(runs: Sequence[Run], largest: Mapping[str, float], *, steps: int) -> report.Table:
    return report.Table(
        title=f"Losses of {steps} steps from the same seed and data.",
        columns=("run", "", "first", "last", "largest distance from dense"),
        rows=[(run.label, "", f"{run.losses[0]:.5f}", f"{run.losses[-1]:.5f}", f"{largest.get(run.label, 0):.2e}") for run in runs],
    )

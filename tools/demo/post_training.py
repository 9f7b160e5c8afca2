"""The paper's third setting on the demo's model: a full-attention checkpoint goes on as SepLLM, under two learning-rate policies.

    make demo                                # trains the full-attention model, runs/demo/full
    python -m tools.demo.post_training       # continues it four times; a table and a picture in runs/demo/post-training

Full attention goes on for the same steps beside it: what SepLLM costs is the difference of the two. A continuation that came to its end is not
made again: delete runs/demo/post-training after changing the demo.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
import yaml

from tools.bench import report
from tools.bench.machine import describe
from tools.command import until_stopped
from tools.demo.__main__ import CONFIG, METHODS, OUT, ROOT, Method, devices, run
from tools.demo.report import smooth

STEPS = 200
SEED = 4321
"""Another than the demo's, so that the samples come in another order than those of the checkpoint."""
BEGINNING = OUT / "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A course of the learning rate."""

    name: str
    title: str
    settings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One continuation."""

    method: str
    policy: str
    train_loss: dict[int, float]
    test_loss: float
    """Nats per token of the held-out test split."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.test_loss)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each continuation (default: {STEPS})")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--save", action="store_true", help="JSON, Markdown and PNG into benchmarks/results/")
    arguments = parser.parse_args(argv)
    steps = arguments.steps
    os.chdir(ROOT)
    if not (BEGINNING / "latest").is_file():
        raise SystemExit(f"{BEGINNING} holds no checkpoint: run make demo first.")
    settings = yaml.safe_load(CONFIG.read_text())
    target = OUT / "post-training"
    target.mkdir(exist_ok=True)
    arms = [continued(method, policy, target, steps=steps, settings=settings) for policy, method in product(policies(settings), METHODS)]
    beginning = test_loss(BEGINNING)
    summary = table(arms, beginning=beginning, steps=steps)
    (target / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}\n\nPicture: {draw(arms, target / 'loss.png', beginning=beginning)}\nThis table: {target / 'summary.txt'}")
    result = as_result(arms, beginning=beginning, checkpoint_steps=last_step(BEGINNING), steps=steps, settings=settings)
    for path in report.save(result, arguments, "post-training"):
        print(f"wrote {path}")


def policies(settings: dict[str, dict[str, dict[str, float]]]) -> tuple[Policy, Policy]:
    """The schedule of the configuration once more, or its second half only."""
    peak, floor = settings["optimizer"]["params"]["lr"], float(settings["min_lr"])  # type: ignore[arg-type]
    middle = (peak + floor) / 2
    return (
        Policy(name="whole", title=f"whole schedule, warmup to {peak:g}", settings=()),
        Policy(name="descent", title=f"descent only, from {middle:g}", settings=("warmup=0", f"optimizer.params.lr={middle:g}")),
    )


def continued(method: Method, policy: Policy, target: Path, *, steps: int, settings: dict[str, int]) -> Arm:
    """Train the full-attention checkpoint on as this method, unless that was done."""
    save = target / f"{method.name}-{policy.name}"
    if not is_done(save, steps):
        train(method, policy, save, steps=steps, settings=settings)
    losses = {int(row["iteration"]): row["train/lm_loss"] for row in metrics(save) if "train/lm_loss" in row}
    return Arm(method=method.title, policy=policy.title, train_loss=losses, test_loss=test_loss(save))


def is_done(save: Path, steps: int) -> bool:
    """Whether a continuation of so many steps came to its end there."""
    return (save / "metrics.jsonl").is_file() and any(row["iteration"] == steps and "test/lm_loss" in row for row in metrics(save))


def train(method: Method, policy: Policy, save: Path, *, steps: int, settings: dict[str, int]) -> None:
    shutil.rmtree(save, ignore_errors=True)
    chosen = (
        f"load={BEGINNING}",
        "finetune=true",
        f"save={save}",
        f"seed={SEED}",
        f"train_iters={steps}",
        f"eval_interval={steps}",
        *policy.settings,
    )
    command = ["deepy.py", "train.py", *method.configs, *devices(settings["train_batch_size"])]
    run(f"Full attention goes on as {method.title}: {policy.title}", *command, *(word for setting in chosen for word in ("--set", setting)))


def metrics(save: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def test_loss(save: Path) -> float:
    """The last held-out loss of a run. Nats per token."""
    return next(row["test/lm_loss"] for row in reversed(metrics(save)) if "test/lm_loss" in row)


def last_step(save: Path) -> int:
    return max(int(row["iteration"]) for row in metrics(save))


def table(arms: Sequence[Arm], *, beginning: float, steps: int) -> str:
    """Held-out perplexity of each continuation, over that of the checkpoint and over full attention's under the same policy."""
    start = math.exp(beginning)
    full = {arm.policy: arm.perplexity for arm in arms if arm.method == METHODS[-1].title}
    lines = [f"Full-attention checkpoint: held-out perplexity {start:.2f}. {steps} steps more:", ""]
    lines.append(f"{'':<52}{'perplexity':>12}{'/ checkpoint':>14}{'/ full, same steps':>20}")
    for arm in arms:
        name = f"{arm.method}, {arm.policy}"
        lines.append(f"{name:<52}{arm.perplexity:>12.2f}{arm.perplexity / start:>14.3f}{arm.perplexity / full[arm.policy]:>20.3f}")
    return "\n".join(lines)


def as_result(arms: Sequence[Arm], *, beginning: float, checkpoint_steps: int, steps: int, settings: dict[str, int]) -> report.Result:
    """The same table for benchmarks/results, with every loss."""
    machine, start = describe(torch.device("cpu")), math.exp(beginning)
    full = {arm.policy: arm.perplexity for arm in arms if arm.method == METHODS[-1].title}
    tokens = steps * settings["train_batch_size"] * settings["seq_length"]

    def picture(path: Path) -> None:
        draw(arms, path, beginning=beginning)

    return report.Result(
        header={**machine.as_dict(), "checkpoint_steps": checkpoint_steps, "checkpoint_perplexity": start, "steps": steps, "tokens": tokens},
        body={"rows": [asdict(arm) | {"perplexity": arm.perplexity} for arm in arms]},
        tables=[
            report.Table(
                title=f"Held-out perplexity {steps} steps ({tokens:,} tokens) after a checkpoint of full attention, whose own is {start:.2f}.",
                columns=("goes on as", "learning rate", "perplexity", "over the checkpoint's", "over full attention's after the same steps"),
                rows=[
                    (
                        arm.method,
                        arm.policy,
                        f"{arm.perplexity:.2f}",
                        f"{arm.perplexity / start:.3f}",
                        f"{arm.perplexity / full[arm.policy]:.3f}",
                    )
                    for arm in arms
                ],
            )
        ],
        notes=[],
        title=f"Post-training of the demo's full-attention model, {machine.date}",
        picture=picture,
    )


def draw(arms: Sequence[Arm], path: Path, *, beginning: float) -> Path:
    """Training losses over the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.8), dpi=120, layout="constrained")
    for arm in arms:
        style = "--" if arm.method == METHODS[-1].title else "-"
        steps = sorted(arm.train_loss)
        axes.plot(steps, smooth([arm.train_loss[step] for step in steps]), style, lw=1.2, label=f"{arm.method}, {arm.policy}")
    axes.axhline(beginning, color="grey", ls=":", lw=1, label="the checkpoint, held-out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Post-training of a full-attention checkpoint (mean of 10 steps)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    plt.close(figure)
    return path


if __name__ == "__main__":
    raise SystemExit(until_stopped(main))

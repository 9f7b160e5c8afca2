"""The paper's third setting on the demo's model: a full-attention checkpoint goes on as SepLLM, under two learning-rate policies.

    make demo                                # trains the full-attention model, runs/demo/full
    python -m tools.demo.post_training       # continues it four times; a table and a picture in runs/demo/post-training

Full attention goes on for the same steps beside it: what SepLLM costs is the difference of the two.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import yaml

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
    steps = parser.parse_args(argv).steps
    os.chdir(ROOT)
    if not (BEGINNING / "latest").is_file():
        raise SystemExit(f"{BEGINNING} holds no checkpoint: run make demo first.")
    settings = yaml.safe_load(CONFIG.read_text())
    target = OUT / "post-training"
    shutil.rmtree(target, ignore_errors=True)
    arms = [continued(method, policy, target, steps=steps, settings=settings) for policy, method in product(policies(settings), METHODS)]
    beginning = test_loss(BEGINNING)
    summary = table(arms, beginning=beginning, steps=steps)
    (target / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}\n\nPicture: {draw(arms, target / 'loss.png', beginning=beginning)}\nThis table: {target / 'summary.txt'}")


def policies(settings: dict[str, dict[str, dict[str, float]]]) -> tuple[Policy, Policy]:
    """The schedule of the configuration once more, or its second half only."""
    peak, floor = settings["optimizer"]["params"]["lr"], float(settings["min_lr"])  # type: ignore[arg-type]
    middle = (peak + floor) / 2
    return (
        Policy(name="whole", title=f"whole schedule, warmup to {peak:g}", settings=()),
        Policy(name="descent", title=f"descent only, from {middle:g}", settings=("warmup=0", f"optimizer.params.lr={middle:g}")),
    )


def continued(method: Method, policy: Policy, target: Path, *, steps: int, settings: dict[str, int]) -> Arm:
    """Train the full-attention checkpoint on as this method."""
    save = target / f"{method.name}-{policy.name}"
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
    rows = metrics(save)
    losses = {int(row["iteration"]): row["train/lm_loss"] for row in rows if "train/lm_loss" in row}
    return Arm(method=method.title, policy=policy.title, train_loss=losses, test_loss=test_loss(save))


def metrics(save: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def test_loss(save: Path) -> float:
    """The last held-out loss of a run. Nats per token."""
    return next(row["test/lm_loss"] for row in reversed(metrics(save)) if "test/lm_loss" in row)


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
    main()

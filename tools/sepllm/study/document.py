"""docs/study.md: a template whose every figure comes from the runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from string import Template

import numpy as np

from megatron.config.schema import Config
from tools.sepllm.study.claims import Runs, findings
from tools.sepllm.study.results import Axis, RunResult
from tools.sepllm.study.statistics import Interval, Place, bootstrap_interval, paired, pooled_half_width, ranking, row_differences

TEMPLATE = Path(__file__).with_name("template.md")
STRETCHES = (0, 1 / 16, 1 / 4, 1 / 2, 1)
"""Borders of the parts of a row whose losses are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """All runs, and what they had in common."""

    runs: Runs
    titles: Mapping[str, str]
    """Of the methods."""
    baseline: str
    """The method that the others are compared with."""
    config: Config
    """Of one of the baseline's runs."""
    machine: Mapping[str, object]
    command: str
    processes: int
    """Runs at a time."""

    @property
    def seeds(self) -> list[int]:
        return sorted(self.runs[self.baseline])

    def losses(self) -> dict[str, dict[int, float]]:
        """Test loss by method and seed."""
        return {name: {seed: run.test_loss for seed, run in of_seeds.items()} for name, of_seeds in self.runs.items()}

    def places(self) -> list[Place]:
        return ranking(self.losses())

    def summary(self) -> str:
        """The ranking as lines of text."""
        width = max(len(self.titles[name]) for name in self.runs)
        lines = [f"{place.rank}. {self.titles[place.method].ljust(width)} {place.mean:.4f}  {self._relations(place)}" for place in self.places()]
        return "\n".join(lines)

    def markdown(self, *, picture: str, data: str) -> str:
        """The document. ``picture`` and ``data``: paths from its folder."""
        return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(self._tables(), **self._facts(), picture=picture, data=data)

    def _tables(self) -> dict[str, str]:
        return {
            "ranking": self._ranking_table(),
            "pairs": self._pair_table(),
            "claims": self._claim_table(),
            "costs": self._cost_table(),
            "places": self._place_table(),
        }

    def _facts(self) -> dict[str, str]:
        run, model, machine = self.runs[self.baseline][self.seeds[0]], self.config.model, self.machine
        counts = {verdict: sum(found.verdict == verdict for found in findings(self.runs)) for verdict in ("agrees", "not separated", "contrary")}
        return {
            "verdicts": ", ".join(f"{verdict} {count}" for verdict, count in counts.items()),
            "baseline": self.titles[self.baseline],
            "command": self.command,
            "seeds": ", ".join(map(str, self.seeds)),
            "num_methods": str(len(self.runs)),
            "resolved": f"{pooled_half_width(self.losses()):.3f}",
            "num_separated": str(sum(len(place.ahead_of) for place in self.places())),
            "num_pairs": str(len(self.runs) * (len(self.runs) - 1) // 2),
            "shape": f"{model.num_layers} layers of width {model.hidden_size} with heads of {model.hidden_size // model.num_attention_heads}",
            "length": str(model.seq_length),
            "vocabulary": str(model.vocab_size),
            "parameters": f"{run.parameters / 1e6:.2f}",
            "tokens": f"{run.tokens / 1e6:.2f}",
            "steps": str(len(run.train_losses)),
            "batch": str(self.config.batch.train_batch_size),
            "lr": f"{self.config.schedule.lr:g}",
            "test_rows": str(len(run.row_losses)),
            "points": str(len(run.curve)),
            "machine": f"{machine['device']}, torch {machine['torch']}, {machine['date']}, commit {machine['commit']}",
            "waiting": f"{np.mean([run.median_step_s / run.median_step_cpu_s for of_seeds in self.runs.values() for run in of_seeds.values()]):.1f}",
            "processes": str(self.processes),
        }

    def _ranking_table(self) -> str:
        columns = ("rank", "method", "test loss", f"less {self.titles[self.baseline]}", "the same, rows drawn again", "")
        rows = [
            (
                str(place.rank),
                self.titles[place.method],
                f"{place.mean:.4f}",
                "" if place.method == self.baseline else shown(self._difference(place.method, self.baseline)),
                "" if place.method == self.baseline else self._by_rows(place.method),
                self._relations(place),
            )
            for place in self.places()
        ]
        return grid(columns, rows, words={"method", ""})

    def _pair_table(self) -> str:
        names = [place.method for place in self.places()]
        rows = [(self.titles[a], *("" if a == b else shown(self._difference(a, b), scale=1000, digits=0) for b in names)) for a in names]
        return grid(("", *(self.titles[name] for name in names)), rows, words={""})

    def _claim_table(self) -> str:
        rows = []
        for found in findings(self.runs):
            claim = found.claim
            statement = claim.text if claim.at == "the end" else f"{claim.text} at {claim.at}"
            measured = f"{self.titles[claim.lower]} less {self.titles[claim.higher]}: {shown(found.difference)}"
            rows.append((statement, claim.source, measured, found.verdict))
        columns = ("the paper", "its figures", "here", "")
        return grid(columns, rows, words=columns)

    def _cost_table(self) -> str:
        columns = ("method", "core", "map", "KV", "operations", "time", "ms a step", "operations until its loss", "time until its loss")
        rows = [
            (
                self.titles[name],
                ", ".join(sorted(set(next(iter(of_seeds.values())).cores))),
                percent(_mean(of_seeds, lambda run: run.kept_ratio)),
                percent(_mean(of_seeds, lambda run: run.kv_ratio)),
                percent(self._relative_cost(name, "flops")),
                percent(self._relative_cost(name, "cpu_s")),
                f"{1000 * _mean(of_seeds, lambda run: run.median_step_cpu_s):.0f}",
                self._until_baseline(name, "flops"),
                self._until_baseline(name, "cpu_s"),
            )
            for name, of_seeds in self.runs.items()
        ]
        return grid(columns, rows, words={"method", "core"})

    def _place_table(self) -> str:
        length, reference = self.config.model.seq_length, self._stretches(self.baseline)
        columns = ("method", *(f"{round(a * length) + 1} to {round(b * length)}" for a, b in pairwise(STRETCHES)))
        rows = [(self.titles[self.baseline], *(f"{value:.3f}" for value in reference))]
        rows += [
            (f"{self.titles[name]}, less that", *(f"{value:+.3f}" for value in self._stretches(name) - reference))
            for name in self.runs
            if name != self.baseline
        ]
        return grid(columns, rows, words={"method"})

    def _relations(self, place: Place) -> str:
        groups = (("ahead of", place.ahead_of), ("behind", place.behind), ("not separated from", place.not_separated))
        return "; ".join(f"{word} {self._named(names)}" for word, names in groups if names)

    def _named(self, names: Sequence[str]) -> str:
        return "all others" if len(names) == len(self.runs) - 1 else ", ".join(self.titles[name].replace(", ", " ") for name in names)

    def _difference(self, first: str, second: str) -> Interval:
        losses = self.losses()
        return paired(losses[first], losses[second])

    def _by_rows(self, name: str) -> str:
        """Interval of the difference from the baseline over the test rows; the seeds stay as they are."""
        own, reference = ([self.runs[method][seed].row_losses for seed in self.seeds] for method in (name, self.baseline))
        found = bootstrap_interval(row_differences(own, reference))
        return f"{found.low:+.4f} to {found.high:+.4f}"

    def _relative_cost(self, name: str, axis: Axis) -> float:
        """What the method's runs cost over what the baseline's did."""
        baseline = self.runs[self.baseline]
        return float(np.mean([getattr(run.curve[-1], axis) / getattr(baseline[seed].curve[-1], axis) for seed, run in self.runs[name].items()]))

    def _until_baseline(self, name: str, axis: Axis) -> str:
        """Share of the baseline's whole cost that the method took down to the baseline's last validation loss; a dash unless in every seed."""
        shares = []
        for seed, run in self.runs[name].items():
            last = self.runs[self.baseline][seed].curve[-1]
            cost = run.cost_of(last.loss, axis)
            if cost is None:
                return "-"
            shares.append(cost / getattr(last, axis))
        return percent(float(np.mean(shares)))

    def _stretches(self, name: str) -> np.ndarray:
        """Mean test loss between each two of `STRETCHES`."""
        places = np.mean([run.place_losses for run in self.runs[name].values()], axis=0)
        return np.array([places[round(a * len(places)) : round(b * len(places))].mean() for a, b in pairwise(STRETCHES)])


def shown(interval: Interval, *, scale: float = 1, digits: int = 4) -> str:
    """Mean and half-width; bold where the interval leaves 0 out."""
    text = f"{scale * interval.mean:+.{digits}f} ± {scale * interval.half_width:.{digits}f}"
    return f"**{text}**" if interval.sign else text


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: Collection[str]) -> str:
    """A Markdown table; columns whose heading is one of ``words`` are aligned to the left, figures to the right."""
    rule = ["---" if column in words else "---:" for column in columns]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *rows))


def _mean(of_seeds: Mapping[int, RunResult], figure: Callable[[RunResult], float]) -> float:
    return float(np.mean([figure(run) for run in of_seeds.values()]))

"""What a benchmark leaves: aligned tables on the terminal, and a JSON, a Markdown and a PNG file of one name."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.bench.machine import ROOT

RESULTS = ROOT / "benchmarks" / "results"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8B5A2B", "#5A3E9B")
"""Told apart by colour-blind readers too: Okabe and Ito's, and three more."""
BLACK = "#000000"
MARKERS = "osD^vPX*<>"
LABEL_GAP = 0.055
"""Of the panel's height, between the middles of two labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def text(self) -> str:
        """Aligned: the first two columns to the left, figures to the right."""
        cells = [self.columns, *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = [
            "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
            for row in cells
        ]
        return "\n".join([self.title, *(line.rstrip() for line in lines)])

    def markdown(self) -> str:
        rule = ["---", "---", *(["---:"] * (len(self.columns) - 2))]
        return "\n".join([f"{self.title}\n", *(f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    label: str
    """Empty for a curve that another of its family names."""
    points: Mapping[int, float]
    """By sequence length."""
    family: str
    """Curves of one family have one colour."""
    line: str = "-"
    """As matplotlib writes it."""
    is_baseline: bool = False
    """Black."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    title: str
    unit: str
    curves: Sequence[Curve]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    header: Mapping[str, object]
    """Machine, versions, commit, and what was run."""
    body: Mapping[str, object]
    """``rows`` and what belongs to them, ready for JSON."""
    tables: Sequence[Table]
    notes: Sequence[str]
    """Contenders that did not run, and why."""
    title: str
    picture: Callable[[Path], None] | None
    """Draws a PNG. None: there is nothing to draw."""

    def as_json(self) -> str:
        return json.dumps({"header": self.header, **self.body, "notes": list(self.notes)}, indent=1) + "\n"

    def markdown(self, picture: str) -> str:
        facts = "\n".join(f"- {key.replace('_', ' ')}: {_readable(value)}" for key, value in self.header.items())
        parts = [f"# {self.title}", facts, *(table.markdown() for table in self.tables), "\n".join(f"- {note}" for note in self.notes)]
        image = "" if self.picture is None else f"![{self.title}]({picture})"
        return "\n\n".join(part for part in [*parts, image] if part) + "\n"


def write(result: Result, *, json_path: Path | None, png_path: Path | None, save_as: str | None, folder: Path = RESULTS) -> list[Path]:
    """The files that were asked for. ``save_as``: base name of a JSON, a Markdown and a PNG in ``folder``."""
    written = []
    if save_as is not None:
        folder.mkdir(parents=True, exist_ok=True)
        markdown = folder / f"{save_as}.md"
        markdown.write_text(result.markdown(f"{save_as}.png"), encoding="utf-8")
        written.append(markdown)
    for path in (json_path, folder / f"{save_as}.json" if save_as else None):
        if path is not None:
            path.write_text(result.as_json(), encoding="utf-8")
            written.append(path)
    for path in (png_path, folder / f"{save_as}.png" if save_as else None):
        if path is not None and result.picture is not None:
            result.picture(path)
            written.append(path)
    return written


def save(result: Result, arguments: argparse.Namespace, *words: str) -> list[Path]:
    """The files that ``--json``, ``--png`` (where there is one) and ``--save`` ask for. ``words``: what a saved name says beside date and device."""
    save_as = base_name(str(result.header["date"]), str(result.header["device"]), *words) if arguments.save else None
    return write(result, json_path=arguments.json, png_path=getattr(arguments, "png", None), save_as=save_as)


def lengths(arguments: argparse.Namespace) -> list[str]:
    """What a saved name says of ``--seq-lengths``: runs of other lengths are other files."""
    return [f"s{length}" for length in arguments.seq_lengths]


def deliver(result: Result, arguments: argparse.Namespace, *words: str) -> None:
    """As `save`, and says what was written."""
    for path in save(result, arguments, *words):
        print(f"wrote {path}")


def parsed(flags: argparse.ArgumentParser, argv: Sequence[str] | None, *, draws: bool = False) -> argparse.Namespace:
    """The arguments, those of `save` among them, and the ``command`` that repeats the run. ``draws``: the result has a picture."""
    flags.add_argument("--json", type=Path, metavar="OUT")
    if draws:
        flags.add_argument("--png", type=Path, metavar="OUT")
    flags.add_argument("--save", action="store_true", help=f"JSON{', Markdown and PNG' if draws else ' and Markdown'} into benchmarks/results/")
    words = list(sys.argv[1:] if argv is None else argv)
    return flags.parse_args(words, argparse.Namespace(command=shlex.join(["python", "-m", flags.prog, *words])))


def base_name(date: str, device: str, *words: str) -> str:
    """``2026-01-31-amd-epyc-attention-fp32``: letters, digits and hyphens only."""
    return re.sub(r"[^a-z0-9.]+", "-", "-".join((date, device, *words)).lower()).strip("-")


def draw(panels: Sequence[Panel], title: str, path: Path, *, columns: int | None = None) -> None:
    """Panels side by side (``columns`` in a row; default: all), logarithmic both ways, a curve a contender with its name at its right end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = [curve for panel in panels for curve in panel.curves]
    families = list(dict.fromkeys(curve.family for curve in curves if not curve.is_baseline))
    baselines = list(dict.fromkeys(curve.family for curve in curves if curve.is_baseline))
    styles = {family: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, family in enumerate(families)}
    styles |= {family: (BLACK, MARKERS[i % len(MARKERS)]) for i, family in enumerate(baselines)}
    columns = min(columns or len(panels), len(panels))
    rows = -(-len(panels) // columns)
    figure, all_axes = plt.subplots(rows, columns, figsize=(6.4 * columns, 4.8 * rows), dpi=150, layout="constrained", squeeze=False)
    for axes, panel in zip(all_axes.flat, panels, strict=False):
        _draw_panel(axes, panel, styles)
    for axes in all_axes.flat[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
    plt.close(figure)


def label_heights(heights: Sequence[float], *, gap: float = LABEL_GAP) -> list[float]:
    """The heights nearest to these, in the same order from bottom to top, that are at least ``gap`` apart."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[list[int]] = []
    centres: list[float] = []
    for i in order:
        groups.append([i])
        centres.append(heights[i])
        while len(groups) > 1 and centres[-1] - centres[-2] < gap * (len(groups[-1]) + len(groups[-2])) / 2:
            last = groups.pop()
            groups[-1] += last
            centres[-2:] = [sum(heights[j] for j in groups[-1]) / len(groups[-1])]
    placed = [0.0] * len(heights)
    for group, centre in zip(groups, centres, strict=True):
        for place, i in enumerate(group):
            placed[i] = centre + gap * (place - (len(group) - 1) / 2)
    return placed


def _draw_panel(axes, panel: Panel, styles: Mapping[str, tuple[str, str]]) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    lengths = sorted({length for curve in panel.curves for length in curve.points})
    axes.set(xscale="log", yscale="log", xlabel="sequence length (tokens)", ylabel=panel.unit)
    axes.set_title(panel.title, fontsize=10)
    for curve in panel.curves:
        colour, marker = styles[curve.family]
        axes.plot(list(curve.points), list(curve.points.values()), curve.line, color=colour, marker=marker, ms=4.5, lw=1.5)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    values = [value for curve in panel.curves for value in curve.points.values()]
    is_narrow = max(values) < 5 * min(values)
    axes.yaxis.set_major_locator(MaxNLocator(6) if is_narrow else LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if lengths and len(lengths) == 1:
        axes.set_xlim(lengths[0] / 1.5, lengths[0] * 1.5)
    _label_ends(axes, panel, styles)


def _label_ends(axes, panel: Panel, styles: Mapping[str, tuple[str, str]]) -> None:  # type: ignore[no-untyped-def]
    """Names beside the last points, moved apart where they would touch, with a thin line to where they belong."""
    to_panel = axes.transAxes.inverted()
    curves = [curve for curve in panel.curves if curve.label]
    ends = [to_panel.transform(axes.transData.transform(list(curve.points.items())[-1])) for curve in curves]
    for curve, end, height in zip(curves, ends, label_heights([float(end[1]) for end in ends]), strict=True):
        colour = styles[curve.family][0]
        axes.annotate(
            curve.label,
            xy=end,
            xytext=(1.03, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=colour,
            fontsize=8.5,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6},
        )


def _readable(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_readable(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(_readable(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)

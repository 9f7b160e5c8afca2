"""The size of the cache over time, drawn (Figure 7 of arXiv 2412.12094, measured). Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sepllm.streaming.report import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"vanilla": "#333333", "streamingllm": "#D55E00", "sepllm": "#0072B2"}
"""Grey, orange and blue of Okabe and Ito."""
MOST_POINTS = 2000
"""Of a curve; longer ones are drawn as the range of each piece."""
PERIODS_SHOWN = 4


def draw(traces: Mapping[str, Trace], path: Path) -> None:
    """On the left the whole run, on the right its last periods, with their length and their mean. ``traces`` by method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (whole, end) = plt.subplots(1, 2, figsize=(10, 3.8), dpi=150, layout="constrained")
    for name, trace in traces.items():
        draw_whole(whole, name, trace)
    bounded = {name: trace for name, trace in traces.items() if name != "vanilla"} or dict(traces)
    shown = max((round(PERIODS_SHOWN * (trace.period() or 0)) for trace in bounded.values()), default=0)
    for name, trace in bounded.items():
        draw_end(end, name, trace, shown=shown or min(200, len(trace.sizes)))
    if "vanilla" in traces and len(traces) > 1:
        whole.set_yscale("log")
    for axes, title in ((whole, "the whole run"), (end, "its last steps")):
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("tokens read", fontsize=9)
        axes.set_ylabel("tokens stored", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    whole.legend(fontsize=8, frameon=False)
    end.margins(y=0.3)
    end.legend(fontsize=8, frameon=False, loc="upper left")
    figure.savefig(path)
    plt.close(figure)


def draw_whole(axes: Axes, name: str, trace: Trace) -> None:
    """All steps; where there are more than can be seen, the smallest and the largest of each piece."""
    sizes, colour = trace.sizes, COLOURS[name]
    piece = -(-len(sizes) // MOST_POINTS)
    if piece == 1:
        axes.plot(range(1, len(sizes) + 1), sizes, color=colour, lw=1, label=name)
        return
    starts = range(0, len(sizes), piece)
    pieces = [sizes[start : start + piece] for start in starts]
    axes.fill_between(starts, [min(part) for part in pieces], [max(part) for part in pieces], color=colour, alpha=0.45, lw=0)
    axes.plot(starts, [sum(part) / len(part) for part in pieces], color=colour, lw=1, label=f"{name} (mean; shade: range)")


def draw_end(axes: Axes, name: str, trace: Trace, *, shown: int) -> None:
    """The last steps, with a line at the mean: over all whole periods of the run, without any over these steps."""
    first = max(0, len(trace.sizes) - shown)
    period = trace.period()
    mean = Trace(sizes=trace.sizes[first:]).mean() if period is None else trace.mean()
    label = f"{name}: mean {mean:.1f}" + ("" if period is None else f", period {period:.1f} tokens")
    axes.plot(range(first + 1, len(trace.sizes) + 1), trace.sizes[first:], color=COLOURS[name], lw=1.2, label=label)
    axes.axhline(mean, color=COLOURS[name], lw=0.8, ls="--")

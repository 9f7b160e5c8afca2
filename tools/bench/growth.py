"""How time and memory grow with the length of a text, for full attention and for SepLLM.

    python -m tools.bench.growth --minutes 20 --threads 2 --save

Two things grow: one attention layer (layout and attention, forward and backward, 512 to 131072 tokens), and the whole training step of a small
model (to 16384). Each curve is measured in a process of its own, from the shortest length up, so that its largest resident memory
so far is that of the length just measured. A curve ends where the next length would not fit into its part of --minutes.
The exponent is the slope in the log-log picture over the longest lengths: 1 is linear, 2 is quadratic.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sepllm.attention import attend
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern
from tools.bench import report
from tools.bench.arms import ALL_ARMS, PRECISIONS, Trainee, config_of
from tools.bench.lineup import DTYPES
from tools.bench.machine import describe, peak_rss_bytes
from tools.bench.measure import clock_s
from tools.bench.problem import INITIAL_TOKENS
from tools.bench.text import add_text_flags, chosen_stream
from tools.command import exit_status

Kind = Literal["layer", "model"]
Pattern = Literal["full", "sepllm"]
LAYER_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
MODEL_LENGTHS = LAYER_LENGTHS[:6]
SHARES: dict[tuple[Kind, Pattern], float] = {("layer", "full"): 0.4, ("layer", "sepllm"): 0.2, ("model", "full"): 0.2, ("model", "sepllm"): 0.2}
"""Of the time, for each curve."""
FIT_POINTS = 4
"""Of the longest lengths, that the exponent is fitted to."""
WORST_GROWTH = 4.5
"""How many times longer twice the length may take: quadratic, and some more."""
WARM_UP_LENGTH = 128
ENOUGH_S, MOST_CALLS = 1.0, 20
"""A length is called until it has taken so long or been called so often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One curve, for the process that measures it."""

    kind: Kind
    pattern: Pattern
    lengths: tuple[int, ...]
    budget_s: float
    rows: tuple[NDArray[np.int64], ...]
    """A row of text for each length and a token more; the first is the warm-up's."""
    separator_ids: tuple[int, ...]
    window: int
    model: str
    heads: int
    head_size: int
    dtype: str
    device: str
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    seq_length: int
    seconds: float
    """Median of ``calls``: forward and backward of the layer, or a training step."""
    calls: int
    memory_bytes: int
    """The largest so far, beyond what the process held when it had run a short row: on a CPU resident, on a GPU allocated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """One curve."""

    kind: Kind
    pattern: Pattern
    points: tuple[Point, ...]
    end: str | None
    """Why it ends before the last length that was asked for; None: it does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """``y = c * S ** exponent`` by least squares of the logarithms, over the lengths from ``first`` to ``last``."""

    exponent: float
    first: int
    last: int


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    return exit_status(lambda: report.deliver(run(arguments), arguments, "growth", arguments.dtype))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="tools.bench.growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--layer-lengths", type=int, nargs="*", default=list(LAYER_LENGTHS), metavar="S", help="of the layer (default: %(default)s)")
    flags.add_argument("--model-lengths", type=int, nargs="*", default=list(MODEL_LENGTHS), metavar="S", help="of the model (default: %(default)s)")
    flags.add_argument("--model", default="14m", help="a size of configs/size/, with the text's own vocabulary (default: %(default)s)")
    flags.add_argument("--heads", type=int, default=4, help="of the layer (default: %(default)s)")
    flags.add_argument("--head-size", type=int, default=64, help="of the layer (default: %(default)s)")
    flags.add_argument("--window", type=int, default=64, help="n, the nearest keys that a query reads (default: %(default)s)")
    flags.add_argument("--dtype", choices=PRECISIONS, default="fp32", help="(default: %(default)s)")
    flags.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    flags.add_argument("--threads", type=int, default=2, help="of a CPU (default: %(default)s)")
    flags.add_argument("--minutes", type=float, default=20, help="for all curves together (default: %(default)s)")
    add_text_flags(flags)
    return report.parsed(flags, argv, draws=True)


def run(arguments: argparse.Namespace) -> report.Result:
    """All curves, each printed when it is done."""
    machine, stream = describe(torch.device(arguments.device)), chosen_stream(arguments)
    lengths: dict[Kind, list[int]] = {"layer": sorted(arguments.layer_lengths), "model": sorted(arguments.model_lengths)}
    rows = {
        length: stream.rows(1, length + 1, target=None if length == WARM_UP_LENGTH else arguments.density_target)[0].numpy()
        for length in {WARM_UP_LENGTH, *lengths["layer"], *lengths["model"]}
    }
    curves = []
    for (kind, pattern), share in SHARES.items():
        if not lengths[kind]:
            continue
        task = Task(
            kind=kind,
            pattern=pattern,
            lengths=tuple(lengths[kind]),
            budget_s=60 * arguments.minutes * share,
            rows=tuple(rows[length] for length in (WARM_UP_LENGTH, *lengths[kind])),
            separator_ids=stream.separator_ids,
            window=arguments.window,
            model=arguments.model,
            heads=arguments.heads,
            head_size=arguments.head_size,
            dtype=arguments.dtype,
            device=arguments.device,
            threads=arguments.threads,
        )
        curves.append(measured_apart(task))
        print(_in_words(curves[-1]), flush=True)
    if not curves:
        raise ValueError("Nothing was asked for: give --layer-lengths or --model-lengths.")
    kinds = list(dict.fromkeys(curve.kind for curve in curves))
    tables = [*(points_table(curves, kind, arguments) for kind in kinds), fits_table(curves)]
    print("", *(f"{table.text()}\n" for table in tables), sep="\n")
    title = f"Growth with the length in {arguments.dtype}: {machine.title()}"
    return report.Result(
        header={**machine.as_dict(), "command": arguments.command, "text": stream.name, "density": stream.density()},
        body={
            "rows": [asdict(curve) for curve in curves],
            "fits": {f"{c.kind} {c.pattern} {w}": _as_dict(fit_of(c, w)) for c in curves for w in WHAT},
        },
        tables=tables,
        notes=[f"{curve.kind}, {curve.pattern}: {curve.end}" for curve in curves if curve.end],
        title=title,
        picture=partial(report.draw, panels_of(curves), title, columns=2),
    )


def measured_apart(task: Task) -> Growth:
    """The curve, measured by a process of its own. A curve during which that process died ends there."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(theirs, task), daemon=True)
    process.start()
    theirs.close()
    points: list[Point] = []
    end = None
    try:
        while isinstance(answer := mine.recv(), Point):
            points.append(answer)
        end = answer
    except EOFError:
        process.join()
        end = f"its process ended with status {process.exitcode} (-9 is lack of memory)"
    process.join()
    return Growth(kind=task.kind, pattern=task.pattern, points=tuple(points), end=end)


def measure(connection: Connection, task: Task) -> None:
    """Sends each point when it is measured, and then why there are no more (None: all lengths are done)."""
    torch.set_num_threads(task.threads)
    device = torch.device(task.device)
    warm_up, *rows = task.rows
    _timed(task, warm_up, device)
    start, before = time.perf_counter(), _memory(device)
    end = None
    for i, (length, row) in enumerate(zip(task.lengths, rows, strict=True)):
        seconds = _timed(task, row, device)
        connection.send(Point(seq_length=length, seconds=float(np.median(seconds)), calls=len(seconds), memory_bytes=_memory(device) - before))
        if i + 1 < len(task.lengths):
            doublings = np.log2(task.lengths[i + 1] / length)
            expected_s = seconds[-1] * WORST_GROWTH**doublings
            if time.perf_counter() - start + expected_s > task.budget_s:
                end = f"{task.lengths[i + 1]} tokens could take {expected_s:.0f} s, more than is left of its {task.budget_s:.0f} s"
                break
    connection.send(end)


def _timed(task: Task, row: NDArray[np.int64], device: torch.device) -> list[float]:
    """Seconds of each call at one length."""
    call = _layer(task, row, device) if task.kind == "layer" else _model(task, row, device)
    seconds: list[float] = []
    while sum(seconds) < ENOUGH_S and len(seconds) < MOST_CALLS:
        start = clock_s(device)
        call()
        seconds.append(clock_s(device) - start)
    return seconds


def _layer(task: Task, row: NDArray[np.int64], device: torch.device) -> Callable[[], object]:
    """One attention layer on random queries, keys and values; the text decides what is read."""
    ids = torch.from_numpy(row[None, :-1])
    shape = (1, ids.shape[1], task.heads, task.head_size)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, gradient = (torch.randn(shape, generator=generator, device=device).to(DTYPES[task.dtype]) for _ in range(4))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    sparse = AttentionPattern(initial_tokens=INITIAL_TOKENS, separator_ids=frozenset(task.separator_ids), windows=(task.window,))
    pattern = AttentionPattern.full(1) if task.pattern == "full" else sparse
    core = ALL_ARMS[task.pattern].core

    def call() -> None:
        ranges = TokenLayout.from_ids(ids, pattern).ranges(0).to(device)
        out = attend(q, k, v, ranges, scale=task.head_size**-0.5, core=core)
        torch.autograd.grad(out, leaves, gradient)

    return call


def _model(task: Task, row: NDArray[np.int64], device: torch.device) -> Callable[[], object]:
    """A training step."""
    config = config_of(
        task.model,
        length=len(row) - 1,
        window=task.window,
        batch=1,
        dtype=task.dtype,
        separator_ids=task.separator_ids,
        vocab_size=max(int(of_length.max()) for of_length in task.rows) + 1,
        device=task.device,
    )
    return partial(Trainee(ALL_ARMS[task.pattern], config, device).step, torch.from_numpy(row[None]))


def _memory(device: torch.device) -> int:
    return peak_rss_bytes() if device.type == "cpu" else torch.cuda.max_memory_allocated(device)


What = Literal["time", "memory"]
WHAT: tuple[What, ...] = ("time", "memory")


def fit_of(curve: Growth, what: What, *, points: int = FIT_POINTS) -> Fit | None:
    """The exponent of the ``points`` longest lengths; None where there are not two of them."""
    known = {length: y for length, y in _values(curve, what).items() if y > 0}
    lengths = sorted(known)[-points:]
    if len(lengths) < 2:
        return None
    slope, _ = np.polyfit(np.log(lengths), np.log([known[length] for length in lengths]), 1)
    return Fit(exponent=float(slope), first=lengths[0], last=lengths[-1])


def _values(curve: Growth, what: What) -> dict[int, float]:
    """Seconds or bytes, by length."""
    return {point.seq_length: point.seconds if what == "time" else point.memory_bytes for point in curve.points}


def points_table(curves: Sequence[Growth], kind: Kind, arguments: argparse.Namespace) -> report.Table:
    shape = f"{arguments.heads} heads of {arguments.head_size}"
    of_layer = f"One attention layer ({shape}), layout, forward and backward"
    what = of_layer if kind == "layer" else f"A training step of {arguments.model} with the text's vocabulary"
    by_pattern = {curve.pattern: {point.seq_length: point for point in curve.points} for curve in curves if curve.kind == kind}
    lengths = sorted({length for points in by_pattern.values() for length in points})
    rows = []
    for length in lengths:
        full, ours = (by_pattern.get(pattern, {}).get(length) for pattern in ("full", "sepllm"))
        ratio = "-" if full is None or ours is None else f"{full.seconds / ours.seconds:.2f}"
        rows.append((str(length), "", *_cells(full), *_cells(ours), ratio))
    ends = [f" {curve.pattern} ends here: {curve.end}." for curve in curves if curve.kind == kind and curve.end]
    names = ("ms", "us/token", "KiB/token")
    columns = ("S", "", *(f"full {name}" for name in names), *(f"SepLLM {name}" for name in names), "full / SepLLM")
    return report.Table(title=f"{what}, n = {arguments.window}.{''.join(ends)}", columns=columns, rows=rows)


def _cells(point: Point | None) -> tuple[str, str, str]:
    if point is None:
        return ("-", "-", "-")
    per_token = point.seconds / point.seq_length
    return f"{point.seconds * 1e3:,.1f}", f"{per_token * 1e6:.1f}", f"{point.memory_bytes / point.seq_length / 1024:.1f}"


def fits_table(curves: Sequence[Growth]) -> report.Table:
    rows = []
    for curve in curves:
        for what in WHAT:
            fit = fit_of(curve, what)
            cells = ("-", "-") if fit is None else (f"{fit.exponent:.2f}", f"{fit.first} to {fit.last}")
            rows.append((f"{curve.kind}, {curve.pattern}", what, *cells))
    return report.Table(title="Exponents of the total in S (per token: one less).", columns=("what", "", "exponent", "fitted over S"), rows=rows)


def panels_of(curves: Sequence[Growth]) -> list[report.Panel]:
    """Per token, against the length."""
    units: Mapping[What, tuple[str, float]] = {"time": ("us per token", 1e6), "memory": ("KiB per token", 1 / 1024)}
    panels = []
    for kind in dict.fromkeys(curve.kind for curve in curves):
        for what, (unit, factor) in units.items():
            drawn = [curve for curve in curves if curve.kind == kind and any(y > 0 for y in _values(curve, what).values())]
            if drawn:
                panels.append(report.Panel(title=f"{kind}: {what}", unit=unit, curves=[_curve(curve, what, factor) for curve in drawn]))
    return panels


def _curve(curve: Growth, what: What, factor: float) -> report.Curve:
    fit = fit_of(curve, what)
    name = "full" if curve.pattern == "full" else "SepLLM"
    label = name if fit is None else f"{name}, S^{round(fit.exponent - 1, 2) + 0.0:.2f}"
    points = {length: factor * y / length for length, y in _values(curve, what).items() if y > 0}
    is_full = curve.pattern == "full"
    return report.Curve(label=label, points=points, family=name, line="--" if is_full else "-", is_baseline=is_full)


def _in_words(curve: Growth) -> str:
    longest = curve.points[-1].seq_length if curve.points else 0
    return f"{curve.kind}, {curve.pattern}: to {longest} tokens{'' if curve.end is None else f'; {curve.end}'}"


def _as_dict(fit: Fit | None) -> dict[str, float] | None:
    return None if fit is None else asdict(fit)


if __name__ == "__main__":
    sys.exit(main())

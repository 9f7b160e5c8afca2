"""Time of attention alone: SepLLM's cores beside dense causal attention and other ways to compute the same mask.

    python -m tools.bench.attention --seq-lengths 2048 4096 8192 --threads 1 --save

Every contender is first compared with a float64 reference on the very tensors that are timed; one that is wrong gets no row, and the exit
status is 1. Ratios are to the fastest dense causal attention of any dtype, measured in the same rounds. See benchmarks/results/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from tools.bench import report
from tools.bench.lineup import DTYPES, Contender, line_up
from tools.bench.machine import Machine, describe, gemm_tflops, timed
from tools.bench.measure import Ratio, interleave, rounds_for
from tools.bench.problem import Problem
from tools.bench.rows import Pass, Row, Text, Timings, panels_of, rows_of, table_of
from tools.bench.stopwatch import Elapsed, Stopwatch
from tools.bench.text import TokenStream, add_text_flags, chosen_stream, usual_rows
from tools.bench.variants import Variant, variants
from tools.command import until_stopped

CAUSAL_DTYPES = ("fp32", "bf16")
"""Dense causal attention is timed in these, whatever the others compute in."""
WARM_UPS = {"cpu": 1, "cuda": 10}
FEWEST_ROUNDS = {"cpu": 5, "cuda": 30}
AGAIN = " again"


def main(argv: Sequence[str] | None = None, *, known: Callable[[torch.device], Sequence[Variant]] = variants) -> int:
    arguments = parse(argv, names=[variant.name for variant in known(torch.device("cpu")) if not variant.is_baseline])
    written: list[Path] = []
    failures: list[str] = []
    try:
        for result, failures_so_far in results(arguments, known(torch.device(arguments.device))):
            failures = failures_so_far
            written = report.save(result, arguments, "attention", *arguments.dtype, *report.lengths(arguments))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for path in written:
        print(f"wrote {path}")
    for failure in failures:
        print(f"WRONG, and therefore without a row: {failure}", file=sys.stderr)
    return 1 if failures else 0


def parse(argv: Sequence[str] | None, *, names: Sequence[str]) -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="tools.bench.attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--seq-lengths", type=int, nargs="+", default=[2048, 4096, 8192], metavar="S")
    flags.add_argument("--window", type=int, default=64, help="n, the nearest keys that a query reads (default: %(default)s)")
    flags.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"], help="dense causal attention is timed in fp32 and bf16 in any case")
    flags.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    flags.add_argument("--threads", type=int, default=1, help="of a CPU (default: %(default)s)")
    flags.add_argument("--batch", type=int, help="rows (default: 2 up to 2048 tokens, then 1; on a GPU as many as make 16384 tokens)")
    flags.add_argument("--heads", type=int, help="default: 4 up to 4096 tokens, then 2, from 32768 on 1; on a GPU 12")
    flags.add_argument("--head-size", type=int, default=64)
    flags.add_argument("--layers", type=int, default=12, help="that share the mask, when its cost is counted in (default: %(default)s)")
    flags.add_argument("--variants", nargs="+", choices=names, default=names, help="beside dense causal attention (default: all)")
    flags.add_argument("--rounds", type=int, help="default: what fits into --minutes, but 5 on a CPU and 30 on a GPU at least")
    flags.add_argument("--minutes", type=float, default=10, help="for all lengths together, comparing and compiling aside (default: %(default)s)")
    add_text_flags(flags)
    return report.parsed(flags, argv, draws=True)


def results(arguments: argparse.Namespace, known: Sequence[Variant]) -> Iterator[tuple[report.Result, list[str]]]:
    """After each length, which is printed, the benchmark so far; and what was found to be wrong."""
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu.")
    torch.set_num_threads(arguments.threads)
    machine, text = describe(device), chosen_stream(arguments)
    rates = {dtype: gemm_tflops(DTYPES[dtype], device) for dtype in dict.fromkeys([*CAUSAL_DTYPES, *arguments.dtype])}
    print(f"{machine.title()}. Matrix products: {', '.join(f'{rate:.3g} TFLOP/s in {dtype}' for dtype, rate in rates.items())}.", flush=True)
    title = f"Attention in {' and '.join(arguments.dtype)}: {machine.title()}"
    known_facts = header(machine, arguments, text, rates)
    lengths: list[Length] = []
    for length in arguments.seq_lengths:
        lengths.append(run_length(arguments, text, known, length, rates))
        yield result_of(lengths, header=known_facts, title=title)


def result_of(lengths: Sequence[Length], *, header: dict[str, object], title: str) -> tuple[report.Result, list[str]]:
    panels = panels_of([length.text for length in lengths], [row for length in lengths for row in length.rows])
    failures = [failure for length in lengths for failure in length.failures]
    result = report.Result(
        header=header,
        body={
            "texts": [asdict(length.text) | {"density": length.text.density, "spreads": _as_dicts(length.spreads)} for length in lengths],
            "rows": [row.as_dict() for length in lengths for row in length.rows],
        },
        tables=[length.table for length in lengths],
        notes=[note for length in lengths for note in length.notes] + [f"wrong: {failure}" for failure in failures],
        title=title,
        picture=partial(report.draw, panels, title),
    )
    return result, failures


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """What came out at one sequence length."""

    text: Text
    rows: list[Row]
    spreads: dict[Pass, Ratio]
    """One contender run twice."""
    table: report.Table
    notes: list[str]
    failures: list[str]


def run_length(arguments: argparse.Namespace, stream: TokenStream, known: Sequence[Variant], length: int, rates: dict[str, float]) -> Length:
    torch.compiler.reset()  # a graph for every length: no shape is measured with another's
    problem = problem_of(arguments, stream, length)
    lineup = line_up(problem, entries(arguments, known, list(rates)))
    if not lineup.contenders or not lineup.contenders[0].variant.is_baseline:
        raise ValueError("\n".join(["Nothing to measure against: no dense causal attention runs here.", *lineup.notes, *lineup.failures]))
    timings, spreads = time_all(problem, lineup.contenders, rounds=arguments.rounds, budget_s=60 * arguments.minutes / len(arguments.seq_lengths))
    text = Text.of(problem)
    rows = rows_of(text, timings, spreads=spreads, gemm_tflops=rates)
    table = table_of(text, rows, spreads=spreads)
    print("", table.text(), *lineup.notes, sep="\n", flush=True)
    prefix = f"S = {length}: "
    return Length(
        text=text,
        rows=rows,
        spreads=spreads,
        table=table,
        notes=[prefix + note for note in lineup.notes],
        failures=[prefix + failure for failure in lineup.failures],
    )


def problem_of(arguments: argparse.Namespace, stream: TokenStream, length: int) -> Problem:
    is_cuda = arguments.device.startswith("cuda")
    batch = usual_rows(length, arguments.device) if is_cuda else 2 if length <= 2048 else 1
    heads = 12 if is_cuda else 4 if length <= 4096 else 2 if length < 32768 else 1
    return Problem.of_text(
        stream,
        batch=arguments.batch or batch,
        length=length,
        target=arguments.density_target,
        window=arguments.window,
        heads=arguments.heads or heads,
        head_size=arguments.head_size,
        device=torch.device(arguments.device),
        layers=arguments.layers,
    )


def entries(arguments: argparse.Namespace, known: Sequence[Variant], causal_dtypes: Sequence[str]) -> list[tuple[Variant, str]]:
    """Dense causal attention in every dtype, the chosen others in the dtypes asked for."""
    causal = [(variant, dtype) for variant in known if variant.is_baseline for dtype in causal_dtypes]
    return causal + [(variant, dtype) for dtype in arguments.dtype for variant in known if variant.name in arguments.variants]


def time_all(problem: Problem, contenders: Sequence[Contender], *, rounds: int | None, budget_s: float) -> tuple[list[Timings], dict[Pass, Ratio]]:
    """Times of all contenders in the same rounds, and what the first of them, in every round twice, says of ratios."""
    watch = Stopwatch(problem.device)
    first = contenders[0]
    middle = (len(contenders) + 1) // 2
    order = [*contenders[:middle], replace(first, inputs=first.inputs.copy()), *contenders[middle:]]
    names = [contender.name + (AGAIN if place == middle else "") for place, contender in enumerate(order)]
    calls = {name: partial(_time, watch, contender) for name, contender in zip(names, order, strict=True)}
    for _ in range(WARM_UPS[problem.device.type]):
        interleave(calls, rounds=1)
    rounds = rounds or rounds_for(lambda: interleave(calls, rounds=1), budget_s=budget_s, fewest=FEWEST_ROUNDS[problem.device.type])
    elapsed = interleave(calls, rounds=rounds)
    timings = [_timings(problem, contender, elapsed[contender.name]) for contender in contenders]
    once, again = timings[0], elapsed[first.name + AGAIN]
    spreads: dict[Pass, Ratio] = {"fwd": Ratio.of(once.forward_s, [one.forward_s for one in again])}
    if once.total_s is not None:
        spreads["fwd+bwd"] = Ratio.of(once.total_s, [one.total_s or 0.0 for one in again])
    return timings, spreads


def header(machine: Machine, arguments: argparse.Namespace, stream: TokenStream, rates: dict[str, float]) -> dict[str, object]:
    """Of the JSON and Markdown files."""
    return {
        **machine.as_dict(),
        "command": arguments.command,
        "text": stream.name,
        "density_target": arguments.density_target,
        "gemm_tflops": rates,
    }


def _time(watch: Stopwatch, contender: Contender) -> Elapsed:
    return watch.time(contender.attention, contender.inputs, has_backward=contender.has_backward)


def _timings(problem: Problem, contender: Contender, elapsed: Sequence[Elapsed]) -> Timings:
    renewal = contender.variant.renewal and contender.variant.renewal(problem, DTYPES[contender.dtype])
    return Timings(
        variant=contender.variant.name,
        dtype=contender.dtype,
        is_causal=contender.variant.is_causal,
        is_baseline=contender.variant.is_baseline,
        forward_s=[one.forward_s for one in elapsed],
        total_s=[one.total_s for one in elapsed if one.total_s is not None] or None,
        mask_s=timed(renewal, problem.device) if renewal else 0.0,
        error=contender.error,
    )


def _as_dicts(spreads: dict[Pass, Ratio]) -> dict[str, dict[str, float]]:
    return {direction: asdict(spread) for direction, spread in spreads.items()}


if __name__ == "__main__":
    sys.exit(until_stopped(main))

"""Finished runs of `sepllm.streaming` as a result: their tables, what they cost from stretch to stretch, and the picture of the first one.

python -m sepllm.streaming --model FOLDER --text BOOKS.jsonl --methods sepllm --num_eval_tokens 204800 --output_dir outputs/long
python -m tools.bench.streams outputs/long --name long --save
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sepllm.streaming.picture import draw
from sepllm.streaming.report import MIB, Trace
from tools.bench import report
from tools.bench.machine import describe
from tools.command import exit_status

STRETCHES_SHOWN = 5


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: run(parse(argv)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="tools.bench.streams", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("runs", nargs="+", type=Path, metavar="FOLDER", help="--output_dir of a finished run")
    flags.add_argument("--name", required=True, help="of the result")
    return report.parsed(flags, argv, draws=True)


def run(arguments: argparse.Namespace) -> None:
    missing = [str(folder) for folder in arguments.runs if not (folder / "results.json").is_file()]
    if missing:
        raise ValueError(f"{', '.join(missing)} has no results.json: give the --output_dir of runs of sepllm.streaming that came to their end.")
    found = [read(folder) for folder in arguments.runs]
    machine = describe(torch.device("cpu"))
    tables = [table for run_ in found for table in tables_of(run_["header"], run_["results"])]
    first, methods = arguments.runs[0], [result["method"] for result in found[0]["results"]]
    result = report.Result(
        header={**machine.as_dict(), "command": arguments.command, "runs": [run_["header"] for run_ in found]},
        body={"rows": [{"model": run_["header"]["model"], **row} for run_ in found for row in run_["results"]]},
        tables=tables,
        notes=["Times are those of the run itself, beside whatever else the machine did; memory and counts do not depend on that."],
        title=f"Texts without end, {arguments.name}: {machine.title()}",
        picture=lambda path: draw({method: Trace.read(first / method) for method in methods}, path),
    )
    print(*(table.text() for table in tables), sep="\n\n")
    report.deliver(result, arguments, "streams", arguments.name)


def read(folder: Path) -> Mapping[str, Any]:
    """What a run left, with its model by name, wherever that was."""
    left = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {**left, "header": {**left["header"], "model": Path(left["header"]["model"]).name}}


def tables_of(header: Mapping[str, str], results: Sequence[Mapping[str, object]]) -> list[report.Table]:
    """Perplexity and cache of the methods, and, where a run has many stretches, some of them."""
    name = header["model"]
    main_table = report.Table(
        title=f"{name}: perplexity, and tokens stored after each token that was read.",
        columns=("method", "a s w c", "tokens", "perplexity", "KV mean", "KV largest", "period", "KV MiB", "ms/token"),
        rows=[
            (
                str(result["method"]),
                " ".join("-" if result[size] is None else str(result[size]) for size in ("initial", "separators", "local", "total")),
                f"{result['num_tokens']:,}",
                f"{result['perplexity']:.2f}",
                f"{result['stored_mean']:.1f}",
                str(result["stored_largest"]),
                "" if result["period"] is None else f"{result['period']:.1f}",
                f"{float(str(result['stored_mean'])) * float(str(result['token_bytes'])) / MIB:.2f}",
                f"{result['ms_per_token']:.2f}",
            )
            for result in results
        ],
    )
    courses = [course_of(name, result) for result in results if len(_course(result)) >= STRETCHES_SHOWN]
    return [main_table, *courses]


def course_of(name: str, result: Mapping[str, object]) -> report.Table:
    """Some stretches of a run, the first and the last among them."""
    course = _course(result)
    shown = [course[round(number * (len(course) - 1) / (STRETCHES_SHOWN - 1))] for number in range(STRETCHES_SHOWN)]
    return report.Table(
        title=f"{name}, {result['method']}: stretches of {course[0]['end_tokens']:,} tokens.",
        columns=("up to token", "", "perplexity", "KV mean", "allocated KV MiB", "process MiB", "ms/token"),
        rows=[
            (
                f"{stretch['end_tokens']:,}",
                "",
                f"{stretch['perplexity']:.1f}",
                f"{stretch['stored_mean']:.1f}",
                f"{stretch['allocated_bytes'] / MIB:.2f}",
                f"{stretch['process_bytes'] / MIB:.0f}",
                f"{stretch['ms_per_token']:.2f}",
            )
            for stretch in shown
        ],
    )


def _course(result: Mapping[str, object]) -> Sequence[Mapping[str, float]]:
    course = result["course"]
    assert isinstance(course, list)
    return course


if __name__ == "__main__":
    sys.exit(main())

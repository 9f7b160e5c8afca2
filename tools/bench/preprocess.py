"""Preparing text beside the tokenizer library's own batch encoding and beside `datasets.map` doing the same, in one interleaved run.

    python -m tools.bench.preprocess --input corpus.jsonl --tokenizer tokenizer.json --save

`library` encodes texts that are in memory already and keeps the ids; `library_fast` likewise by the call that keeps no offsets, and runs twice a
round. `prepare` makes a finished pair of the file, with the end of each document, in this process; `command_N` is that as the command
`prepare_data.py --workers N`, from its start to its end. `datasets_N` loads the file with the library datasets and maps the fast call over it
with N processes, the end of each document appended, into its Arrow file. Every process computes on one core. All tokens are compared with
the library's before anything is timed.

Tokens a second and core are those a second of processor time, of a contender and its processes, user and system: what neighbours on
the machine take does not count. `--stream-mb` then sends a generated stream of that length through the command and notes its memory.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from megatron.config.schema import TokenizerConfig
from megatron.data.indexed import IndexedDataset
from megatron.data.tokenizer import END_OF_TEXT
from tools.bench import report
from tools.bench.machine import ROOT, describe
from tools.bench.measure import Ratio, interleave, rounds_for
from tools.command import until_stopped
from tools.datasets.documents import find_sources, read_documents
from tools.datasets.encoding import TextRecipe
from tools.datasets.preprocess import preprocess

if TYPE_CHECKING:
    import datasets

BASELINE, AGAIN = "library_fast", "library_fast_again"
WANTED = 0.9
"""Of the library's tokens a second and core."""
BATCH = 1000
"""Documents of one call of the library: the default of `datasets.map`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Elapsed:
    wall_s: float
    core_s: float
    """Processor time, of other processes too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    contender: str
    wall_s: float
    core_s: float
    tokens_per_s: float
    tokens_per_core_s: float
    ratio: float
    """Of tokens a second and core to `BASELINE`: median of the rounds, 10 and 90 %."""
    ratio_low: float
    ratio_high: float
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Of a long stream."""

    sent_mb: float
    resident_mb: float
    peak_mb: float


class Task:
    """Texts and the tokenizer, and everything that turns the one into tokens by the other. A contender returns its tokens when asked to."""

    def __init__(self, path: Path, tokenizer: Path, folder: Path) -> None:
        import tokenizers

        self.path, self._tokenizer_file, self._folder = path, tokenizer, folder
        (source,) = find_sources([str(path)])
        self.texts = [text for (text,) in read_documents(source, ["text"])]
        self._tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer))
        end_id = self._tokenizer.token_to_id(END_OF_TEXT)
        if end_id is None:
            raise ValueError(f"{tokenizer} has no token {END_OF_TEXT}: give a tokenizer with one.")
        self.end_id = end_id
        self._runs = itertools.count()

    def library(self, *, is_fast: bool) -> list[list[int]]:
        encode = self._tokenizer.encode_batch_fast if is_fast else self._tokenizer.encode_batch
        return [encoding.ids for start in range(0, len(self.texts), BATCH) for encoding in encode(self.texts[start : start + BATCH])]

    def prepare(self) -> Path:
        """The prefix of the pair."""
        config = TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(self._tokenizer_file))
        (written,) = preprocess([str(self.path)], str(self.new()), TextRecipe(tokenizer=config, append_eod=True))
        return Path(written.prefix)

    def command(self, *, workers: int) -> Path:
        """The prefix of the pair."""
        prefix = self.new()
        with self.start(str(self.path), "--append-eod", "--workers", str(workers), "--output-prefix", str(prefix)) as process:
            process.communicate()
        if process.returncode:
            raise ValueError(f"prepare_data.py with {workers} workers ended with status {process.returncode}.")
        return prefix.with_name(f"{prefix.name}_text_document")

    def start(self, source: str, *flags: str) -> subprocess.Popen[bytes]:
        """prepare_data.py, quiet."""
        words = ["--input", source, "--tokenizer-type", "HFTokenizer", "--vocab-file", str(self._tokenizer_file), *flags]
        command: list[str | Path] = [sys.executable, ROOT / "prepare_data.py", *words]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def datasets(self, *, processes: int) -> datasets.Dataset:
        """The mapped data set, its tokens under `ids`."""
        import datasets

        tokenizer, end = self._tokenizer, self.end_id

        def tokens(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            return {"ids": [[*encoding.ids, end] for encoding in tokenizer.encode_batch_fast(batch["text"])]}

        datasets.disable_progress_bars()
        loaded = datasets.load_dataset("json", data_files=str(self.path), split="train", cache_dir=str(self.new()))
        return loaded.map(tokens, batched=True, batch_size=BATCH, remove_columns=loaded.column_names, num_proc=processes if processes > 1 else None)

    def new(self) -> Path:
        """A name for files, not used before."""
        return self._folder / str(next(self._runs))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of every contender; more cores are more processes here
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as folder:
            result, is_enough = run(arguments, Task(arguments.input, arguments.tokenizer, Path(folder)))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    report.deliver(result, arguments, "preprocess")
    return 0 if is_enough else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="tools.bench.preprocess", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--input", type=Path, required=True, help="JSON lines with a text each")
    flags.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json with <|endoftext|>")
    flags.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes of the command and of datasets (default: %(default)s)")
    flags.add_argument("--minutes", type=float, default=5, help="of all rounds together (default: %(default)s)")
    flags.add_argument("--rounds", type=int, help="as many, however long they take")
    flags.add_argument("--stream-mb", type=int, default=0, help="length of the stream whose memory is noted (default: none)")
    return report.parsed(flags, argv)


def run(arguments: argparse.Namespace, task: Task) -> tuple[report.Result, bool]:
    """The result, and whether preparing has `WANTED` of the library's tokens a second and core."""
    machine = describe(torch.device("cpu"))
    num_tokens = check(task, arguments.workers)
    timed = {name: functools.partial(elapsed, contender) for name, contender in contenders(task, arguments.workers).items()}
    rounds = arguments.rounds or rounds_for(lambda: interleave(timed, rounds=1), budget_s=60 * arguments.minutes)
    times = interleave(timed, rounds=rounds)
    rows = [row_of(name, times[name], times[BASELINE], num_tokens=num_tokens) for name in times]
    moments = list(stream(task, num_mb=arguments.stream_mb)) if arguments.stream_mb else []
    (reached,) = (row.ratio for row in rows if row.contender == "prepare")
    is_enough = reached >= WANTED
    ending = "reached" if is_enough else "NOT reached"
    verdict = f"Preparing has {reached:.1%} of the tokens a second and core of {BASELINE}; {WANTED:.0%} is wanted: {ending}."
    tables = [_table(rows, num_tokens), *([_memory_table(moments)] if moments else [])]
    print(*(table.text() for table in tables), verdict, sep="\n\n")
    versions = {name: metadata.version(name) for name in ("tokenizers", "datasets", "numpy")}
    result = report.Result(
        header={**machine.as_dict(), **versions, "command": arguments.command, "documents": len(task.texts), "tokens": num_tokens},
        body={"rows": [asdict(row) for row in rows], "memory": [asdict(moment) for moment in moments]},
        tables=tables,
        notes=[verdict],
        title=f"Preparing text: {machine.title()}",
        picture=None,
    )
    return result, is_enough


def contenders(task: Task, workers: Sequence[int]) -> dict[str, Callable[[], object]]:
    return {
        "library": functools.partial(task.library, is_fast=False),
        BASELINE: functools.partial(task.library, is_fast=True),
        AGAIN: functools.partial(task.library, is_fast=True),
        "prepare": task.prepare,
        **{f"command_{count}": functools.partial(task.command, workers=count) for count in workers},
        **{f"datasets_{count}": functools.partial(task.datasets, processes=count) for count in workers},
    }


def check(task: Task, workers: Sequence[int]) -> int:
    """How many tokens every contender makes, ends of documents aside. ValueError if one makes others than the library."""
    rows = task.library(is_fast=True)
    if task.library(is_fast=False) != rows:
        raise ValueError("The library's two calls give different tokens.")
    ended = [[*row, task.end_id] for row in rows]
    found = {"prepare": _rows_of(task.prepare())}
    for count in workers:
        found |= {f"command_{count}": _rows_of(task.command(workers=count)), f"datasets_{count}": list(task.datasets(processes=count)["ids"])}
    wrong = [name for name, given in found.items() if given != ended]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} did not give the library's tokens.")
    return sum(map(len, rows))


def _rows_of(prefix: Path) -> list[list[int]]:
    pair = IndexedDataset(prefix)
    return [pair[sequence].tolist() for sequence in range(len(pair))]


def elapsed(contender: Callable[[], object]) -> Elapsed:
    wall_s, core_s = time.perf_counter(), _core_s()
    contender()
    return Elapsed(wall_s=time.perf_counter() - wall_s, core_s=_core_s() - core_s)


def _core_s() -> float:
    """Processor time so far of this process and of those that it started and that have ended."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def row_of(name: str, times: Sequence[Elapsed], baseline: Sequence[Elapsed], *, num_tokens: int) -> Row:
    wall_s, core_s = median(time.wall_s for time in times), median(time.core_s for time in times)
    ratio = Ratio.of([time.core_s for time in baseline], [time.core_s for time in times])
    return Row(
        contender=name,
        wall_s=wall_s,
        core_s=core_s,
        tokens_per_s=num_tokens / wall_s,
        tokens_per_core_s=num_tokens / core_s,
        ratio=ratio.median,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        rounds=len(times),
    )


def stream(task: Task, *, num_mb: int) -> Iterator[Moment]:
    """Memory of the command, with one worker, after each tenth of a stream that repeats the texts."""
    process = task.start("-", "--output-prefix", str(task.new()))
    assert process.stdin is not None, "start() asks for a pipe"
    sent, tenths = 0, 1
    for text in itertools.cycle(task.texts):
        sent += process.stdin.write(json.dumps({"text": text}).encode() + b"\n")
        if sent >= num_mb * 1e5 * tenths:
            resident, peak = (_status_mb(process.pid, name) for name in ("VmRSS", "VmHWM"))
            yield Moment(sent_mb=sent / 1e6, resident_mb=resident, peak_mb=peak)
            tenths += 1
        if tenths > 10:
            break
    process.stdin.close()
    if process.wait():
        raise ValueError(f"prepare_data.py ended with status {process.returncode} on the stream.")


def _status_mb(process: int, name: str) -> float:
    (line,) = (line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024 / 1e6


def _table(rows: Sequence[Row], num_tokens: int) -> report.Table:
    return report.Table(
        title=f"{num_tokens:,} tokens; ratios are of tokens a second and core, to {BASELINE}.",
        columns=("contender", "", "s", "tokens/s", "core s", "tokens/s/core", "ratio", "10-90 %"),
        rows=[
            (
                row.contender,
                "",
                f"{row.wall_s:.2f}",
                f"{row.tokens_per_s:,.0f}",
                f"{row.core_s:.2f}",
                f"{row.tokens_per_core_s:,.0f}",
                f"{row.ratio:.3f}",
                f"{row.ratio_low:.3f}-{row.ratio_high:.3f}",
            )
            for row in rows
        ],
    )


def _memory_table(moments: Sequence[Moment]) -> report.Table:
    rows = [(f"{moment.sent_mb:,.0f}", "", f"{moment.resident_mb:.1f}", f"{moment.peak_mb:.1f}") for moment in moments]
    return report.Table(title="Memory of command_1 on a stream.", columns=("MB sent", "", "resident MB", "peak MB"), rows=rows)


if __name__ == "__main__":
    sys.exit(until_stopped(main))

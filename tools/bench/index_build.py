"""How long an index of samples takes to build and how much memory, in C++ and by its definition in numpy.

    python -m tools.bench.index_build --save

Each row is a corpus of which only the lengths of the documents exist. Both contenders build the index of one pass over it, in a process
of their own, several times; the arrays of both are compared by their hashes. ``--largest`` adds one as large as the Pile, ours alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from megatron.data.index_builder import load
from megatron.data.packing import SampleIndex, SampleRequest, build_index, num_epochs, num_packed_samples, shuffle_dtype
from tools.bench import report
from tools.bench.machine import ROOT, describe, peak_rss_bytes
from tools.command import until_stopped

REPEATS = 3
MIB = 2.0**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    documents: int
    tokens: int
    """Of all documents together, on average."""
    with_definition: bool = True


CORPORA = (Corpus(documents=100_000, tokens=10**8), Corpus(documents=1_000_000, tokens=10**9), Corpus(documents=10_000_000, tokens=10**10))
PILE = Corpus(documents=134_000_000, tokens=207 * 10**9, with_definition=False)
"""The deduplicated Pile's size in Pythia's tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One contender on one corpus."""

    seconds: float
    """Median."""
    peak_bytes: int
    """Resident memory at its highest, less that before building: the sizes, Python and its libraries."""
    array_bytes: int
    """Of the three arrays."""
    samples: int
    sha256: str


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.one is not None:
        print(json.dumps(asdict(measure(arguments.one, Corpus(**json.loads(arguments.corpus)), seq_length=arguments.seq_length))))
        return 0
    result, is_right = run(arguments)
    report.deliver(result, arguments, "index-build", f"s{arguments.seq_length}")
    return 0 if is_right else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="tools.bench.index_build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--seq-length", type=int, default=2048, metavar="S")
    flags.add_argument("--documents", type=int, nargs="+", metavar="COUNT", help="corpora of so many documents of 1000 tokens (default: three)")
    flags.add_argument("--largest", action="store_true", help="also one as large as the deduplicated Pile, which takes minutes and 4 GB")
    flags.add_argument("--one", choices=sorted(CONTENDERS), help=argparse.SUPPRESS)
    flags.add_argument("--corpus", help=argparse.SUPPRESS)
    return report.parsed(flags, argv)


def run(arguments: argparse.Namespace) -> tuple[report.Result, bool]:
    """The result, and whether both contenders built the same arrays everywhere."""
    machine = describe(torch.device("cpu"))
    corpora = [Corpus(documents=count, tokens=1000 * count) for count in arguments.documents or ()] or [*CORPORA, *[PILE] * arguments.largest]
    load()  # compiled here, so that no contender waits for the compiler
    rows = [(corpus, {name: in_process(name, corpus, arguments.seq_length) for name in contenders_of(corpus)}) for corpus in corpora]
    is_right = all(len({measured.sha256 for measured in found.values()}) == 1 for _, found in rows)
    notes = [f"C++ {'built' if is_right else 'DID NOT BUILD'} the arrays of the definition, bit for bit, wherever both ran."]
    table = report.Table(
        title=f"One pass, S = {arguments.seq_length}, seed 1234; median of {REPEATS}. Memory: at its highest, above that before building.",
        columns=("tokens", "documents", "samples", "arrays MiB", "C++ s", "C++ MiB", "numpy s", "numpy MiB", "faster"),
        rows=[_row(corpus, found["c++"], found.get("numpy")) for corpus, found in rows],
    )
    print(table.text(), *notes, sep="\n")
    result = report.Result(
        header={**machine.as_dict(), "command": arguments.command},
        body={"rows": [{**asdict(corpus), **{name: asdict(measured) for name, measured in found.items()}} for corpus, found in rows]},
        tables=[table],
        notes=notes,
        title=f"Building the index of samples: {machine.title()}",
        picture=None,
    )
    return result, is_right


def contenders_of(corpus: Corpus) -> list[str]:
    return [name for name in CONTENDERS if name == "c++" or corpus.with_definition]


def _row(corpus: Corpus, ours: Measured, definition: Measured | None) -> tuple[str, ...]:
    theirs = ("", "", "") if definition is None else (f"{definition.seconds:.2f}", f"{definition.peak_bytes / MIB:,.0f}")
    faster = () if definition is None else (f"{definition.seconds / ours.seconds:.1f}x",)
    return (
        f"{corpus.tokens:.3g}",
        f"{corpus.documents:,}",
        f"{ours.samples:,}",
        f"{ours.array_bytes / MIB:,.0f}",
        f"{ours.seconds:.2f}",
        f"{ours.peak_bytes / MIB:,.0f}",
        *theirs,
        *faster,
    )


def in_process(name: str, corpus: Corpus, seq_length: int) -> Measured:
    """`measure` in a process of its own, whose peak of memory is nobody else's."""
    command = [
        sys.executable,
        "-m",
        "tools.bench.index_build",
        "--one",
        name,
        "--corpus",
        json.dumps(asdict(corpus)),
        "--seq-length",
        str(seq_length),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"{name} failed on {corpus.documents} documents:\n{done.stderr[-2000:]}")
    return Measured(**json.loads(done.stdout))


def measure(name: str, corpus: Corpus, *, seq_length: int) -> Measured:
    sizes = document_sizes(corpus)
    request = SampleRequest(first_document=0, last_document=len(sizes), seq_length=seq_length, num_samples=None, num_epochs=1, seed=1234)
    build, before = CONTENDERS[name], peak_rss_bytes()
    elapsed = []
    for _ in range(REPEATS):
        index = None  # so that two are never held at once
        start = time.perf_counter()
        index = build(request, sizes)
        elapsed.append(time.perf_counter() - start)
    assert index is not None
    arrays = (index.doc_idx, index.sample_idx, index.shuffle_idx)
    digest = hashlib.sha256()
    peak = peak_rss_bytes()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.data)
    return Measured(
        seconds=median(elapsed),
        peak_bytes=peak - before,
        array_bytes=sum(array.nbytes for array in arrays),
        samples=index.num_rows,
        sha256=digest.hexdigest(),
    )


def document_sizes(corpus: Corpus) -> NDArray[np.int32]:
    """Lengths as of text: many short documents, few long ones."""
    lengths = np.random.default_rng(0).standard_exponential(corpus.documents, dtype=np.float32)
    lengths *= corpus.tokens / corpus.documents
    return lengths.astype(np.int32)


def defined_index(request: SampleRequest, sizes: NDArray[np.int32]) -> SampleIndex:
    """The index of packed samples by its definition: sample i starts in the first sequence that ends behind token ``i * seq_length``."""
    generator = np.random.RandomState(request.seed)
    doc_idx = np.tile(np.arange(request.first_document, request.last_document, dtype=np.int32), num_epochs(request, sizes))
    generator.shuffle(doc_idx)
    count = num_packed_samples(request, sizes)
    sample_idx = defined_sample_index(sizes, doc_idx, seq_length=request.seq_length, num_samples=count)
    shuffle_idx = np.arange(count, dtype=shuffle_dtype(count))
    generator.shuffle(shuffle_idx)
    return SampleIndex(doc_idx=doc_idx, sample_idx=sample_idx.astype(np.int32), shuffle_idx=shuffle_idx)


def defined_sample_index(sizes: NDArray, order: NDArray, *, seq_length: int, num_samples: int) -> NDArray[np.int64]:
    """Where token ``i * seq_length`` of the stream lies. ``[num_samples + 1, 2]``"""
    ends = np.cumsum(sizes[order], dtype=np.int64)
    starts = np.arange(num_samples + 1, dtype=np.int64) * seq_length
    position = np.searchsorted(ends, starts, side="right")
    return np.stack([position, starts - (ends - sizes[order])[position]], axis=1)


CONTENDERS: dict[str, Callable[[SampleRequest, NDArray[np.int32]], SampleIndex]] = {"c++": build_index, "numpy": defined_index}

if __name__ == "__main__":
    sys.exit(until_stopped(main))

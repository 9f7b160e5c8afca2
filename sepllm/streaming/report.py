"""What a stream leaves behind: figures, a table of the methods, and the size of the cache over time."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path

from sepllm.streaming.method import ENDLESS, Method
from sepllm.streaming.stream import LOSSES, STORED, Mark, Stream, perplexity_of

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """How many tokens were stored after each one that was read."""

    sizes: array[int]

    @classmethod
    def read(cls, folder: Path) -> Trace:
        """That of a stream's folder."""
        with (folder / STORED).open(encoding="utf-8") as lines:
            return cls(sizes=array("q", map(int, lines)))

    def drops(self) -> list[int]:
        """The steps after which fewer tokens were stored than before."""
        return [step for step, (before, after) in enumerate(pairwise(self.sizes), start=1) if after < before]

    def period(self) -> float | None:
        """Steps from drop to drop, on average; None where the size does not go up and down."""
        drops = self.drops()
        return (drops[-1] - drops[0]) / (len(drops) - 1) if len(drops) > 1 else None

    def mean(self) -> float:
        """Over whole periods; over all steps where there are none."""
        drops = self.drops()
        sizes = self.sizes[drops[0] : drops[-1]] if len(drops) > 1 else self.sizes
        return sum(sizes) / max(1, len(sizes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Between two marks, which are as far apart as savings of the state."""

    end_tokens: int
    perplexity: float
    """Of the tokens between."""
    perplexity_so_far: float
    ms_per_token: float
    stored_mean: float
    allocated_bytes: int
    process_bytes: int

    @classmethod
    def between(cls, start: Mark, end: Mark) -> Stretch:
        num_tokens = end.num_tokens - start.num_tokens
        return cls(
            end_tokens=end.num_tokens,
            perplexity=perplexity_of(end.nll_sum - start.nll_sum, num_tokens),
            perplexity_so_far=perplexity_of(end.nll_sum, end.num_tokens),
            ms_per_token=1000 * (end.elapsed_s - start.elapsed_s) / num_tokens,
            stored_mean=(end.stored_sum - start.stored_sum) / num_tokens,
            allocated_bytes=end.allocated_bytes,
            process_bytes=end.process_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One method's figures."""

    method: str
    initial: int
    separators: int
    local: int | None
    """None: as long as the text."""
    total: int | None
    shifts_positions: bool
    num_tokens: int
    perplexity: float
    perplexity_at: Mapping[int, float]
    """Of the first so many tokens."""
    stored_mean: float
    """Tokens whose keys are stored, averaged over all steps."""
    stored_mean_of_periods: float
    """The same over whole periods, once the cache has filled."""
    period: float | None
    """Steps from one dropping of tokens to the next."""
    stored_largest: int
    token_bytes: int
    """Keys and values of one token, in all layers."""
    allocated_bytes_largest: int
    process_bytes_largest: int
    elapsed_s: float
    course: Sequence[Stretch]

    @property
    def ms_per_token(self) -> float:
        return 1000 * self.elapsed_s / self.num_tokens


def result_of(stream: Stream, lengths: Sequence[int] = ()) -> Result:
    """The figures of a stream so far. ``lengths``: after how many tokens the perplexity is wanted too, where so many were read."""
    tally, method, trace = stream.tally, stream.method, Trace.read(stream.folder)
    start = Mark(num_tokens=0, nll_sum=0.0, stored_sum=0, elapsed_s=0.0, allocated_bytes=0, process_bytes=0)
    return Result(
        method=method.name,
        initial=method.initial,
        separators=method.separators,
        local=_bounded(method.local),
        total=_bounded(method.total),
        shifts_positions=method.shifts_positions,
        num_tokens=tally.num_tokens,
        perplexity=tally.perplexity,
        perplexity_at={length: _perplexity_of_first(stream.folder, length) for length in lengths if length <= tally.num_tokens},
        stored_mean=tally.stored_sum / tally.num_tokens,
        stored_mean_of_periods=trace.mean(),
        period=trace.period(),
        stored_largest=tally.stored_largest,
        token_bytes=tally.token_bytes,
        allocated_bytes_largest=tally.allocated_bytes_largest,
        process_bytes_largest=tally.process_bytes_largest,
        elapsed_s=tally.elapsed_s,
        course=[Stretch.between(*ends) for ends in pairwise([start, *tally.marks])],
    )


def as_json(header: Mapping[str, object], results: Iterable[Result]) -> str:
    return json.dumps({"header": header, "results": [asdict(result) | {"ms_per_token": result.ms_per_token} for result in results]}, indent=1) + "\n"


def table(results: Sequence[Result]) -> str:
    """Markdown, aligned for the terminal too."""
    lengths = sorted({length for result in results for length in result.perplexity_at})
    head = ["method", "a", "s", "w", "c", "tokens", "perplexity", *(f"at {length}" for length in lengths)]
    head += ["KV mean", "KV largest", "KV MiB", "time s", "ms/token", "process MiB"]
    rows = [
        [
            result.method,
            *(str(size) if size is not None else "-" for size in (result.initial, result.separators, result.local, result.total)),
            str(result.num_tokens),
            f"{result.perplexity:.4g}",
            *(f"{result.perplexity_at[length]:.4g}" if length in result.perplexity_at else "" for length in lengths),
            f"{result.stored_mean:.1f}",
            str(result.stored_largest),
            f"{result.stored_mean * result.token_bytes / MIB:.2f}",
            f"{result.elapsed_s:.1f}",
            f"{result.ms_per_token:.2f}",
            f"{result.process_bytes_largest / MIB:.0f}",
        ]
        for result in results
    ]
    widths = [max(2, *(len(row[column]) for row in [head, *rows])) for column in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    aligned = [[cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))] for row in rows]
    title = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(head, widths, strict=True))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (title, rule, *aligned))


def _bounded(size: int) -> int | None:
    return None if size == ENDLESS else size


def _perplexity_of_first(folder: Path, length: int) -> float:
    with (folder / LOSSES).open(encoding="utf-8") as lines:
        return perplexity_of(sum(map(float, islice(lines, length))), length)


def describe(method: Method) -> str:
    """One line for the terminal."""
    if method.name == "vanilla":
        return "vanilla: every token is kept"
    return f"{method.name}: a {method.initial}, s {method.separators}, w {method.local}, c {method.total}" + (
        "" if method.shifts_positions else ", positions not shifted"
    )

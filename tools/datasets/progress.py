"""How far a run of `preprocess` has come: for the next one, in a file, and for the reader, as a bar."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from tools.datasets.chunks import Chunk, Position
from tools.datasets.documents import Source
from tools.datasets.encoding import Output, Recipe
from tools.datasets.growing import Written, holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A moment of a run that another run can go on from."""

    position: Position
    documents: int
    """Read so far, of all sources."""
    written: tuple[Written, ...]
    """Of each pair."""


class ProgressFile:
    """`<output prefix>.progress.json`: the last mark of a run, and what the run was, so that no other one goes on from it."""

    def __init__(self, output_prefix: str, recipe: Recipe, *, sources: Sequence[Source], outputs: Sequence[Output]) -> None:
        self._path = Path(f"{output_prefix}.progress.json")
        self._part = self._path.with_name(f"{self._path.name}.part")
        self._outputs = outputs
        self._run = {"recipe": recipe.fingerprint(), "sources": [[source.name, *_stamp(source)] for source in sources]}

    def read(self) -> Mark | None:
        """None if there is nothing to go on from: no such file, another recipe or input, or parts that are gone."""
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            if found["run"] != self._run:
                return None
            written = tuple(Written(**pair) for pair in found["written"])
            mark = Mark(position=Position(**found["position"]), documents=found["documents"], written=written)
            are_there = all(holds(pair, output.dtype) for pair, output in zip(mark.written, self._outputs, strict=True))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return mark if are_there else None

    def write(self, mark: Mark) -> None:
        with open(self._part, "w", encoding="utf-8") as file:
            json.dump({"run": self._run, **asdict(mark)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._part, self._path)

    def remove(self) -> None:
        for path in (self._path, self._part):
            path.unlink(missing_ok=True)


class Bar:
    """A line on stderr with the rate and, as far as the size of the input is known, the time left.

    It counts documents if their number is given, else bytes of the files, as they are stored; where there is neither, documents without an end.
    """

    def __init__(self, sources: Sequence[Source], *, num_docs: int | None, log_interval: int, documents: int = 0) -> None:
        """``documents``: of an interrupted run."""
        sizes = [_stamp(source)[:1] for source in sources]
        self._counts_bytes = num_docs is None and all(sizes)
        self._before = [sum(size for (size,) in sizes[:place]) for place in range(len(sizes))] if self._counts_bytes else []
        self._documents = self._shown = documents
        self._tokens, self._place, self._log_interval = 0, 0, log_interval
        self._goes_on = documents > 0
        total = sum(size for (size,) in sizes) if self._counts_bytes else num_docs
        unit = {"unit": "B", "unit_scale": True} if self._counts_bytes else {"unit": " documents"}
        self._bar = tqdm(total=total, miniters=0, mininterval=0, **unit)

    def move(self, chunk: Chunk, *, num_tokens: int) -> None:
        """The chunk is done."""
        self._documents += len(chunk.records)
        self._tokens += num_tokens
        self._place = self._before[chunk.end.source] + chunk.records[-1].read_bytes if self._counts_bytes else self._documents
        if self._goes_on:  # what an interrupted run did is not this one's speed
            self._bar.initial = self._bar.n = self._place
            self._goes_on = False
        if self._documents - self._shown >= self._log_interval:
            self._show()

    def _show(self) -> None:
        self._shown = self._documents
        rate = self._tokens / max(self._bar.format_dict["elapsed"], 1e-9)
        self._bar.set_postfix_str(f"{self._documents} documents, {rate:,.0f} tokens/s", refresh=False)
        self._bar.update(self._place - self._bar.n)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._show()
        self._bar.close()


def _stamp(source: Source) -> tuple[int, ...]:
    """Size in bytes and time of the last change; nothing for a stream."""
    if source.path is None:
        return ()
    stat = source.path.stat()
    return stat.st_size, stat.st_mtime_ns

"""What kind of token file a .bin/.idx pair is: dtype, documents, their lengths, what they end with, which sample indices lie beside it.

    python -m tools.datasets.inspect_pair data/mine_text_document

Ids are those of up to 4096 sequences, spread evenly over the file. `tools.datasets.verify` says whether the pair is sound.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron.data.indexed import IndexedDataset, file_names
from tools.command import exit_status
from tools.datasets.pairs import open_pair

SEQUENCES = 4096
COMMONEST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A pair."""

    prefix: str
    dtype: str
    bin_bytes: int
    idx_bytes: int
    documents: int
    lists_documents: bool
    """False: a merged file that names none, where every sequence counts as one."""
    sequences: int
    empty_sequences: int
    tokens: int
    shortest: int
    """Tokens of a sequence."""
    median: float
    longest: int
    looked_at: int
    """Sequences whose tokens were read for what follows."""
    lowest_id: float | None
    highest_id: float | None
    last_tokens: dict[str, int]
    """The commonest last tokens of sequences: one alone, if it ends documents."""
    sample_indices: tuple[str, ...]
    """Beginnings of the names of cached sample indices."""

    @classmethod
    def of(cls, dataset: IndexedDataset) -> Inspection:
        bin_path, idx_path = file_names(dataset.prefix)
        sizes = dataset.sizes
        chosen = np.unique(np.linspace(0, max(len(dataset) - 1, 0), SEQUENCES).astype(np.int64))[: len(dataset)]
        rows = [row for sequence in chosen.tolist() if len(row := dataset[sequence])]
        last = Counter(str(row[-1]) for row in rows)
        return cls(
            prefix=dataset.prefix,
            dtype=str(dataset.dtype),
            bin_bytes=bin_path.stat().st_size,
            idx_bytes=idx_path.stat().st_size,
            documents=dataset.num_documents,
            lists_documents=len(dataset.doc_idx) > 1 or not len(dataset),
            sequences=len(dataset),
            empty_sequences=int(np.count_nonzero(sizes == 0)),
            tokens=dataset.num_tokens,
            shortest=int(sizes.min()) if len(sizes) else 0,
            median=float(np.median(sizes)) if len(sizes) else 0.0,
            longest=int(sizes.max(initial=0)),
            looked_at=len(rows),
            lowest_id=min((row.min().item() for row in rows), default=None),
            highest_id=max((row.max().item() for row in rows), default=None),
            last_tokens=dict(last.most_common(COMMONEST)),
            sample_indices=_sample_indices(dataset.prefix),
        )

    def text(self) -> str:
        """For people."""
        borders = "" if self.lists_documents else " (the index names none: every sequence counts as one)"
        lines = [
            f"{self.prefix}",
            f"  tokens         {self.tokens:,} of {self.dtype}, {self.bin_bytes:,} bytes; index {self.idx_bytes:,} bytes",
            f"  documents      {self.documents:,}{borders}",
            f"  sequences      {self.sequences:,}, {self.empty_sequences:,} of them empty",
            f"  tokens each    {self.shortest:,} to {self.longest:,}, median {self.median:,g}",
        ]
        if self.shortest == self.longest > 0 and self.sequences > 1:
            lines += [f"  preshuffled?   all sequences have {self.longest:,} tokens: samples already, as in Pythia's preshuffled sets"]
        if self.looked_at:
            last = ", ".join(f"{token} ({count:,})" for token, count in self.last_tokens.items())
            lines += [f"  ids            {self.lowest_id:g} to {self.highest_id:g} in {self.looked_at:,} sequences", f"  last tokens    {last}"]
        return "\n".join([*lines, *(f"  sample index   {name}" for name in self.sample_indices)])


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)

    def report() -> None:
        found = Inspection.of(open_pair(options.pair))
        print(json.dumps(asdict(found), indent=1) if options.json else found.text())

    return exit_status(report)


def _sample_indices(prefix: str) -> tuple[str, ...]:
    """Names of the index caches beside the pair, without the array's name."""
    path = Path(prefix)
    found = path.parent.glob("*_indexmap_*_shuffle_idx.npy")
    return tuple(sorted(file.name.removesuffix("_shuffle_idx.npy") for file in found if file.name.startswith(f"{path.name}_")))


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="tools.datasets.inspect_pair", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("pair", metavar="PREFIX")
    flags.add_argument("--json", action="store_true", help="print JSON")
    return flags


if __name__ == "__main__":
    sys.exit(main())

"""How much .bin/.idx pairs hold, as JSON: documents, sequences, tokens, bytes, of each and together.

    python -m tools.datasets.count data/mine_text_document data/more/
    python -m tools.datasets.count data/mine_text_document --ids 0

Without --ids, which says how often tokens are there, nothing of the .bin is read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from megatron.data.indexed import IndexedDataset, file_names
from tools.command import exit_status
from tools.datasets.pairs import prefixes, token_runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """What a pair holds."""

    prefix: str
    dtype: str
    documents: int
    sequences: int
    empty_sequences: int
    tokens: int
    bytes: int
    """Of the .bin."""
    ids: dict[int, int] = field(default_factory=dict)
    """How often a token is there, of those asked for."""

    @classmethod
    def of(cls, dataset: IndexedDataset, *, ids: Sequence[int] = ()) -> Count:
        found = dict.fromkeys(ids, 0)
        for _, tokens in token_runs(dataset) if ids else ():
            for token in ids:
                found[token] += int(np.count_nonzero(tokens == token))
        return cls(
            prefix=dataset.prefix,
            dtype=str(dataset.dtype),
            documents=dataset.num_documents,
            sequences=len(dataset),
            empty_sequences=int(np.count_nonzero(dataset.sizes == 0)),
            tokens=dataset.num_tokens,
            bytes=file_names(dataset.prefix)[0].stat().st_size,
            ids=found,
        )


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)

    def report() -> None:
        counts = [Count.of(IndexedDataset(prefix), ids=options.ids) for prefix in prefixes(options.pairs)]
        print(json.dumps({"pairs": [asdict(count) for count in counts], "total": total(counts)}, indent=1))

    return exit_status(report)


def total(counts: Sequence[Count]) -> dict[str, int]:
    """The sums over all pairs."""
    names = ("documents", "sequences", "empty_sequences", "tokens", "bytes")
    return {name: sum(getattr(count, name) for count in counts) for name in names}


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="tools.datasets.count", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("pairs", nargs="+", metavar="PREFIX", help="pairs, or folders of which all pairs are taken")
    flags.add_argument("--ids", type=int, nargs="+", default=[], metavar="ID", help="tokens to count, for instance the one that ends a document")
    return flags


if __name__ == "__main__":
    sys.exit(main())

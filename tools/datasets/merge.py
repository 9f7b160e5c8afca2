"""Several .bin/.idx pairs to one, in the order given.

    python -m tools.datasets.merge --input data/a_text_document data/b_text_document --output-prefix data/both_text_document
    python -m tools.datasets.merge --input parts/ --output-prefix data/all_text_document

Documents keep their borders (GPT-NeoX's merge_datasets.py, whose flags these are, drops them). All pairs must hold tokens of one dtype.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron.data.indexed import IndexedDataset, file_names, index_bytes
from tools.command import exit_status
from tools.datasets.copying import check_space, copy_range, create, new_files
from tools.datasets.pairs import document_borders, prefixes


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)

    def write() -> None:
        merged = merge(prefixes(options.input), options.output_prefix)
        print(f"{merged.prefix}: {merged.num_documents} documents, {len(merged)} sequences, {merged.num_tokens} tokens")

    return exit_status(write)


def merge(inputs: Sequence[str], output_prefix: str) -> IndexedDataset:
    """Writes the merged pair and opens it. The bytes of each .bin are copied as they are; memory grows with the sequences alone."""
    pairs = [IndexedDataset(prefix) for prefix in inputs]
    _check(pairs, output_prefix)
    tokens = [file_names(pair.prefix)[0] for pair in pairs]
    bin_path, idx_path = file_names(output_prefix)
    check_space(bin_path.parent, tokens)
    width = pairs[0].dtype.itemsize
    lengths = [path.stat().st_size // width * width for path in tokens]
    starts = [sum(lengths[:place]) for place in range(len(pairs))]
    with new_files(bin_path, idx_path) as (bin_part, idx_part):
        create(bin_part, sum(lengths))
        for path, length, start in zip(tqdm(tokens, unit="pair"), lengths, starts, strict=True):
            copy_range(path, bin_part, start=0, length=length, to=start)
        idx_part.write_bytes(_merged_index(pairs, starts))
    return IndexedDataset(output_prefix)


def _merged_index(pairs: Sequence[IndexedDataset], starts: Sequence[int]) -> bytes:
    """The .idx of the pairs one behind another; the .bin of each begins at its byte of ``starts``."""
    sequences = np.cumsum([0, *(len(pair) for pair in pairs)])
    borders = [document_borders(pair)[1:] + before for pair, before in zip(pairs, sequences[:-1], strict=True)]
    return index_bytes(
        pairs[0].dtype,
        sizes=np.concatenate([pair.sizes for pair in pairs]),
        offsets=np.concatenate([pair.offsets + start for pair, start in zip(pairs, starts, strict=True)]),
        doc_idx=np.concatenate([np.zeros(1, dtype=np.int64), *borders]),
    )


def _check(pairs: Sequence[IndexedDataset], output_prefix: str) -> None:
    first = pairs[0]
    for pair in pairs:
        if pair.dtype != first.dtype:
            raise ValueError(
                f"{pair.prefix} holds {pair.dtype} and {first.prefix} {first.dtype}: merge pairs that were made with one tokenizer, "
                "whose dtype follows its vocabulary."
            )
        if Path(pair.prefix).resolve() == Path(output_prefix).resolve():
            raise ValueError(f"--output-prefix {output_prefix} is one of the pairs to merge: give another name.")


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="tools.datasets.merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="pairs, or folders of which all pairs are taken, by name")
    flags.add_argument("--output-prefix", required=True, metavar="PREFIX")
    return flags


if __name__ == "__main__":
    sys.exit(main())

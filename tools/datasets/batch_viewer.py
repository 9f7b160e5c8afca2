"""The token ids of training steps out of a preshuffled pair: Pythia's batch_viewer, with its flags and its file name.

    python -m tools.datasets.batch_viewer data/pile_preshuffled/document --start_iteration 0 --end_iteration 9 --save_path seen

writes seen/indicies.npy, one row a sample in the order of training: [steps * 1024, 2049] of the pair's dtype. Steps count from 0 and the last
is included. In a preshuffled pair every sequence is a whole sample and its number is its place in the run. For token files that are not
preshuffled, `tools.datasets.step_contents` says what a step reads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import trange

from megatron.data.indexed import IndexedDataset
from tools.command import exit_status
from tools.datasets.copying import new_files
from tools.datasets.pairs import open_pair

FILE_NAME = "indicies.npy"
BATCH_SIZE = 1024


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)

    def write() -> None:
        path = save_steps(
            open_pair(options.load_path),
            options.save_path / FILE_NAME,
            first=options.start_iteration,
            last=options.end_iteration,
            batch_size=options.batch_size,
        )
        rows, width = np.load(path, mmap_mode="r").shape
        print(f"{path}: {rows} samples of {width} tokens")

    return exit_status(write)


def save_steps(dataset: IndexedDataset, path: Path, *, first: int, last: int | None, batch_size: int = BATCH_SIZE) -> Path:
    """Writes the samples of the steps ``first`` to ``last`` (included; None: the last that is whole). One step in memory at a time."""
    if batch_size < 1:
        raise ValueError(f"--batch_size is {batch_size}: a step reads at least 1 sample.")
    steps = len(dataset) // batch_size
    last = steps - 1 if last is None else last
    if not 0 <= first <= last < steps:
        raise ValueError(
            f"Steps {first} to {last} were asked for, and {dataset.prefix} holds {steps} whole ones of {batch_size} samples, counted from 0: "
            "give others with --start_iteration and --end_iteration."
        )
    width = int(dataset.sizes[first * batch_size])
    shape = ((last - first + 1) * batch_size, width)
    with new_files(path) as (part,), open(part, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": dataset.dtype.str, "fortran_order": False, "shape": shape})
        for step in trange(first, last + 1, unit="step"):
            places = range(step * batch_size, (step + 1) * batch_size)
            _check_lengths(dataset, places, width)
            file.write(np.stack([dataset[place] for place in places]).tobytes())
    return path


def _check_lengths(dataset: IndexedDataset, places: range, width: int) -> None:
    others = np.flatnonzero(dataset.sizes[places.start : places.stop] != width)
    if len(others):
        place = places[int(others[0])]
        raise ValueError(
            f"Sequence {place} of {dataset.prefix} has {dataset.sizes[place]} tokens, and the first of the range {width}: its sequences are no "
            "samples yet. Give a preshuffled pair, or ask tools.datasets.step_contents what a step reads."
        )


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="tools.datasets.batch_viewer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("load_path", metavar="PREFIX", help="of the preshuffled .bin and .idx")
    flags.add_argument("--start_iteration", type=int, default=0, metavar="STEP", help="the first (default: %(default)s)")
    flags.add_argument("--end_iteration", type=int, metavar="STEP", help="the last, included (default: the last that the pair holds)")
    flags.add_argument("--save_path", type=Path, default=Path("token_indicies"), metavar="DIR", help="folder to write (default: %(default)s)")
    flags.add_argument("--batch_size", type=int, default=BATCH_SIZE, metavar="COUNT", help="samples of a step (default: %(default)s, Pythia's)")
    return flags


if __name__ == "__main__":
    sys.exit(main())

"""A .bin file to pieces that can be uploaded: Pythia's shard_memmap, with its flags and file names.

    python -m tools.datasets.shard_memmap --input_file data/mine_text_document.bin --output_dir shards

Pieces are called `<base>-00000-of-00082.bin`, where the second number is that of the last piece. The .idx stays whole; copy it as it is.
A length that is a multiple of the piece's makes no empty last piece, which Pythia's own program writes and then cannot read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from tools.command import exit_status
from tools.datasets.copying import check_space, copy_range, create, new_files

SHARD_BYTES = 5_000_000_000
"""Of Pythia's files."""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)

    def write() -> None:
        pieces = shard(options.input_file, options.output_dir, shard_bytes=options.shard_size)
        print(f"{options.input_file}: {len(pieces)} pieces, {pieces[0]} to {pieces[-1].name}")

    return exit_status(write)


def shard(input_file: Path, output_dir: Path, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Writes the pieces and returns their paths, in order."""
    if shard_bytes < 1:
        raise ValueError(f"--shard_size is {shard_bytes}: a piece has at least 1 byte.")
    if input_file.suffix != ".bin":
        raise ValueError(f"--input_file {input_file} is no .bin file: give the tokens, whose name ends in .bin. The .idx is copied whole.")
    if not input_file.is_file():
        raise FileNotFoundError(f"--input_file {input_file} does not exist: check its spelling.")
    size = input_file.stat().st_size
    if size == 0:
        raise ValueError(f"--input_file {input_file} is empty: there is nothing to cut.")
    check_space(output_dir, [input_file])
    starts = range(0, size, shard_bytes)
    names = [output_dir / piece_name(input_file.stem, place, last=len(starts) - 1) for place in range(len(starts))]
    for name, start in zip(tqdm(names, unit="piece"), starts, strict=True):
        length = min(shard_bytes, size - start)
        with new_files(name) as (part,):
            create(part, length)
            copy_range(input_file, part, start=start, length=length, to=0)
    return names


def piece_name(base: str, place: int, *, last: int) -> str:
    """Name of the piece ``place``, counted from 0, of ``last + 1``."""
    return f"{base}-{place:05}-of-{last:05}.bin"


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="tools.datasets.shard_memmap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--input_file", type=Path, required=True, metavar="FILE.bin")
    flags.add_argument("--output_dir", type=Path, required=True, metavar="DIR")
    flags.add_argument("--shard_size", type=int, default=SHARD_BYTES, metavar="BYTES", help="of a piece (default: %(default)s, Pythia's)")
    return flags


if __name__ == "__main__":
    sys.exit(main())

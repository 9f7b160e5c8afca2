"""The pieces of a .bin file to one again: Pythia's unshard_memmap, with its flags.

    python -m tools.datasets.unshard_memmap --input_file idxmaps/my_text_document-00000-of-00082.bin --num_shards 83 --output_dir data

Writes `<base>.bin`; where `<base>.idx` lies beside the pieces and not yet in the output folder, it is copied too.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from tools.command import exit_status
from tools.datasets.copying import check_space, copy_range, create, new_files
from tools.datasets.shard_memmap import piece_name

_NAME = re.compile(r"(?P<base>.+)-(?P<place>\d{5,})-of-(?P<last>\d{5,})\.bin")
_POINTER = b"version https://git-lfs"


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)

    def write() -> None:
        joined = unshard(options.input_file, options.output_dir, num_shards=options.num_shards)
        print(f"{joined}: {joined.stat().st_size} bytes. Its index: {_index_line(joined)}")

    return exit_status(write)


def unshard(input_file: Path, output_dir: Path, *, num_shards: int | None = None) -> Path:
    """Writes the joined file and returns its path. ``num_shards``: pieces there should be; by default those that the name promises."""
    match = _NAME.fullmatch(input_file.name)
    if match is None:
        raise ValueError(f"--input_file {input_file} is not named like a piece: give the first, <base>-00000-of-<last number>.bin.")
    base, last = match["base"], int(match["last"])
    if num_shards is not None and num_shards != last + 1:
        raise ValueError(f"--num_shards is {num_shards}, but pieces 0 to {last}, as the name says, are {last + 1}: give {last + 1}, or leave it out.")
    pieces = [input_file.with_name(piece_name(base, place, last=last)) for place in range(last + 1)]
    sizes = _sizes(pieces)
    index = input_file.with_name(f"{base}.idx")
    joined = output_dir / f"{base}.bin"
    copies_index = index.is_file() and not joined.with_suffix(".idx").is_file()
    check_space(output_dir, [*pieces, *[index] * copies_index])
    with new_files(joined) as (part,):
        create(part, sum(sizes))
        at = 0
        for piece, size in zip(tqdm(pieces, unit="piece"), sizes, strict=True):
            copy_range(piece, part, start=0, length=size, to=at)
            at += size
    if copies_index:
        with new_files(joined.with_suffix(".idx")) as (part,):
            create(part, index.stat().st_size)
            copy_range(index, part, start=0, length=index.stat().st_size, to=0)
    return joined


def _sizes(pieces: list[Path]) -> list[int]:
    """Bytes of each piece. All but the last have one length, and the last is no longer."""
    missing = [piece for piece in pieces if not piece.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(pieces)} pieces are missing, the first is {missing[0]}: download them again.")
    sizes = [piece.stat().st_size for piece in pieces]
    whole = max(sizes)
    pointers = [piece for piece, size in zip(pieces, sizes, strict=True) if _is_pointer(piece, size)]
    if pointers:
        raise ValueError(f"{pointers[0]} is a pointer of git-lfs and not the data itself: run git lfs pull in its folder.")
    for piece, size in zip(pieces, sizes, strict=True):
        if size != whole and piece is not pieces[-1]:
            raise ValueError(f"{piece} has {size} bytes, and another piece {whole}: only the last may be shorter, download it again.")
    return sizes


def _is_pointer(piece: Path, size: int) -> bool:
    return size < 1024 and piece.read_bytes().startswith(_POINTER)


def _index_line(joined: Path) -> str:
    index = joined.with_suffix(".idx")
    return f"{index}" if index.is_file() else f"missing, copy it to {index}"


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="tools.datasets.unshard_memmap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--input_file", type=Path, required=True, metavar="FILE-00000-of-LAST.bin", help="the first piece")
    flags.add_argument("--num_shards", type=int, metavar="COUNT", help="how many pieces there are: the last one's number and one")
    flags.add_argument("--output_dir", type=Path, required=True, metavar="DIR")
    return flags


if __name__ == "__main__":
    sys.exit(main())

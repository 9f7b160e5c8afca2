"""Whether files are those that a list of hashes names: Pythia's checksum_shards.

    python -m tools.datasets.checksum_shards idxmaps --hash_file shard_hashes.txt     # compare; status 1 where one differs
    python -m tools.datasets.checksum_shards shards --hash_file shard_hashes.txt --write

A line of the list is a name and its sha256, as in Pythia's shard_hashes.txt, or the other way round, as sha256sum prints it.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from tools.command import exit_status
from tools.datasets.copying import new_files

HASHES = "shard_hashes.txt"
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    hash_file = options.hash_file or options.folder / HASHES
    wrong: list[str] = []

    def run() -> None:
        if options.write:
            print(f"{hash_file}: {write_hashes(options.folder, hash_file)} files")
            return
        expected = read_hashes(hash_file)
        for difference in differences(options.folder, expected):
            wrong.append(difference)
            print(difference)
        print(f"{len(expected) - len(wrong)} of {len(expected)} files are as {hash_file} says")

    return exit_status(run) or int(bool(wrong))


def differences(folder: Path, expected: dict[str, str]) -> Iterator[str]:
    """A sentence for each file of the list that is missing from ``folder`` or has another content."""
    for name, wanted in tqdm(expected.items(), unit="file"):
        path = folder / name
        if not path.is_file():
            yield f"{path} is missing"
        elif (found := sha256(path)) != wanted:
            yield f"{path} has sha256 {found} and should have {wanted}: download it again"


def read_hashes(hash_file: Path) -> dict[str, str]:
    """sha256 by file name."""
    if not hash_file.is_file():
        raise FileNotFoundError(f"--hash_file {hash_file} does not exist: give the list of hashes, one file a line.")
    expected: dict[str, str] = {}
    for number, line in enumerate(hash_file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        words = line.split(maxsplit=1)
        name, value = words if len(words) == 2 and _SHA256.fullmatch(words[1].strip()) else words[::-1] if len(words) == 2 else ("", "")
        if not _SHA256.fullmatch(value.strip()):
            raise ValueError(f"{hash_file}, line {number} is not a name and a sha256 of 64 digits: give one file a line.")
        expected[Path(name.strip().removeprefix("*")).name] = value.strip().lower()
    if not expected:
        raise ValueError(f"{hash_file} is empty: give the list of hashes, one file a line.")
    return expected


def write_hashes(folder: Path, hash_file: Path) -> int:
    """Lists all .bin and .idx files of the folder, by name; returns how many there are."""
    paths = sorted(path for path in folder.glob("*") if path.suffix in (".bin", ".idx"))
    if not paths:
        raise ValueError(f"The folder {folder} holds no .bin or .idx file: give the folder of the pieces.")
    with new_files(hash_file) as (part,):
        part.write_text("".join(f"{path.name} {sha256(path)}\n" for path in tqdm(paths, unit="file")), encoding="utf-8")
    return len(paths)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="tools.datasets.checksum_shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("folder", nargs="?", type=Path, default=Path(), metavar="DIR", help="of the pieces (default: this one)")
    flags.add_argument("--hash_file", type=Path, metavar="FILE", help=f"the list (default: {HASHES} in the folder)")
    flags.add_argument("--write", action="store_true", help="make the list instead")
    return flags


if __name__ == "__main__":
    sys.exit(main())

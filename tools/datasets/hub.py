"""Data sets of the Hugging Face hub, and those that the library `datasets` reads from a folder: `hf:NAME`, `hf:NAME:CONFIGURATION:SPLIT`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

PREFIX = "hf:"
FORM = "hf:NAME, hf:NAME:CONFIGURATION or hf:NAME:CONFIGURATION:SPLIT"


def rows(name: str) -> Iterator[Mapping[str, object]]:
    """The rows, as they come. The split is train unless it is named; an empty configuration is the data set's own choice."""
    path, configuration, split = _parts(name)
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"--input {name} needs the package datasets: pip install datasets") from error
    number = 0
    try:
        for row in datasets.load_dataset(path, configuration or None, split=split, streaming=True):
            yield row
            number += 1
    except Exception as error:  # of the network, the hub, the library and the file formats, which share no base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if number:  # no ValueError, at which what is prepared so far would be thrown away
            raise ConnectionError(f"--input {name} broke off after {number} rows ({reason}): the same command goes on from there.") from error
        raise ValueError(f"--input {name} cannot be read ({reason}): check the name ({FORM}) and that the hub can be reached from here.") from error


def _parts(name: str) -> tuple[str, str, str]:
    path, *others = name.removeprefix(PREFIX).split(":")
    if not path or len(others) > 2:
        raise ValueError(f"--input {name} names no data set of the hub: give {FORM}.")
    configuration, split = [*others, "", ""][:2]
    return path, configuration, split or "train"

"""Whether a .bin/.idx pair is sound, and if not, what is wrong and where. Status 0: sound; 1: not; 2: the question was wrong.

    python -m tools.datasets.verify data/mine_text_document
    python -m tools.datasets.verify data/mine_text_document --vocab-size 50277     # also reads every token

Training refuses exactly the pairs that have errors here. Remarks are things that it can live with and somebody should know.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import CODES, HEADER, LEGACY_MAGIC, MAGIC, VERSION, IndexedDataset, file_names
from tools.command import exit_status
from tools.datasets.pairs import SEQUENCES, prefixes, token_runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """About one pair."""

    prefix: str
    errors: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    def text(self) -> str:
        """For people."""
        title = f"{self.prefix}: " + ("sound" if not self.errors else f"{len(self.errors)} error{'s' * (len(self.errors) > 1)}")
        return "\n".join([title, *(f"  error: {error}" for error in self.errors), *(f"  remark: {remark}" for remark in self.remarks)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arrays:
    """What an .idx with a sound header says."""

    dtype: np.dtype
    sizes: NDArray[np.int32]
    offsets: NDArray[np.int64]
    doc_idx: NDArray[np.int64]


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    findings: list[Findings] = []

    def report() -> None:
        findings.extend(verify(prefix, vocab_size=options.vocab_size) for prefix in prefixes(options.pairs))
        print(json.dumps([asdict(found) for found in findings], indent=1) if options.json else "\n".join(found.text() for found in findings))

    return exit_status(report) or int(any(found.errors for found in findings))


def verify(prefix: str, *, vocab_size: int | None = None) -> Findings:
    """Everything that is wrong with a pair. ``vocab_size``: every token is also to be one of so many."""
    bin_path, idx_path = file_names(prefix)
    missing = tuple(f"{path} does not exist" for path in (bin_path, idx_path) if not path.is_file())
    if missing:
        return Findings(prefix=prefix, errors=missing)
    errors = tuple(f"{idx_path}: {error}" for error in _header_errors(idx_path))
    if errors:
        return Findings(prefix=prefix, errors=errors)
    arrays = _arrays(idx_path)
    num_bytes = bin_path.stat().st_size
    errors = tuple(f"{idx_path}: {error}" for error in [*_sequence_errors(arrays, num_bytes, bin_path), *_document_errors(arrays)])
    if errors:
        return Findings(prefix=prefix, errors=errors)
    dataset = IndexedDataset(prefix)
    strange = tuple(_strange_tokens(dataset, vocab_size)) if vocab_size is not None else ()
    return Findings(prefix=prefix, errors=strange, remarks=tuple(_remarks(dataset, num_bytes)))


def _header_errors(path: Path) -> Iterator[str]:
    """What is wrong in the first 34 bytes, or contradicts the length of the file."""
    num_bytes = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    if head.startswith(LEGACY_MAGIC):
        yield "byte 0: TNTIDX, the old kind that data_impl lazy or cached wrote; tokenize the text again"
        return
    if not head.startswith(MAGIC):
        yield f"byte 0: begins with {head[: len(MAGIC)]!r} and not with {MAGIC!r}: this is no index of a token file"
        return
    if num_bytes < HEADER.size:
        yield f"byte {num_bytes}: ends inside the header of {HEADER.size} bytes"
        return
    _, version, code, num_sequences, num_borders = HEADER.unpack(head)
    if version != VERSION:
        yield f"byte 9: version {version}, and only version {VERSION} exists"
    if code not in CODES:
        yield f"byte 17: dtype code {code}; known are {min(CODES)} to {max(CODES)}"
    expected = HEADER.size + 12 * num_sequences + 8 * num_borders
    if expected != num_bytes:
        counts = f"bytes 18 and 26: {num_sequences} sequences and {num_borders} document borders take {expected} bytes, and the file has {num_bytes}"
        yield f"{counts}; {_place_of_end(num_bytes, num_sequences, expected)}"


def _place_of_end(num_bytes: int, num_sequences: int, expected: int) -> str:
    """Where a file of the wrong length ends."""
    if num_bytes > expected:
        surplus = num_bytes - expected
        is_padded = surplus in (2, 6, 30)
        return f"{surplus} bytes too many" + (f", as if a header padded to {HEADER.size + surplus} bytes stood before the arrays" * is_padded)
    if num_bytes < HEADER.size + 4 * num_sequences:
        return f"it ends where the size of sequence {(num_bytes - HEADER.size) // 4} of {num_sequences} should be"
    if num_bytes < HEADER.size + 12 * num_sequences:
        return f"it ends where the offset of sequence {(num_bytes - HEADER.size - 4 * num_sequences) // 8} of {num_sequences} should be"
    return f"it ends inside the document borders, {expected - num_bytes} bytes too early"


def _arrays(path: Path) -> _Arrays:
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    _, _, code, num_sequences, _ = HEADER.unpack(bytes(raw[: HEADER.size]))
    sizes, offsets, borders = np.split(raw[HEADER.size :], [4 * num_sequences, 12 * num_sequences])
    return _Arrays(dtype=CODES[code], sizes=sizes.view("<i4"), offsets=offsets.view("<i8"), doc_idx=borders.view("<i8"))


def _sequence_errors(arrays: _Arrays, num_bytes: int, bin_path: Path) -> Iterator[str]:
    """A sentence for each kind of misplaced sequence: how many there are, and the first."""
    width = arrays.dtype.itemsize
    count: dict[str, int] = {}
    first: dict[str, int] = {}
    lost_bytes = 0
    for start in range(0, len(arrays.sizes), SEQUENCES):
        size = arrays.sizes[start : start + SEQUENCES].astype(np.int64)
        offset = np.asarray(arrays.offsets[start : start + SEQUENCES])
        outside = (offset < 0) | (offset > num_bytes)
        long = ~outside & (size > (num_bytes - np.where(outside, 0, offset)) // width)
        kinds = {
            "have a size below 0": size < 0,
            f"begin outside {bin_path}, which has {num_bytes} bytes": outside,
            "begin inside a token": ~outside & (offset % width != 0),
            f"reach behind the end of {bin_path}, which has {num_bytes} bytes": long,
        }
        for kind, is_wrong in kinds.items():
            if is_wrong.any():
                count[kind] = count.get(kind, 0) + int(np.count_nonzero(is_wrong))
                first.setdefault(kind, start + int(is_wrong.argmax()))
        if long.any():
            lost_bytes = max(lost_bytes, int((offset[long] + size[long] * width).max()) - num_bytes)
    for kind, number in count.items():
        place = first[kind]
        where = f"{arrays.sizes[place]} tokens of {width} bytes at byte {arrays.offsets[place]} (bytes {_place(place, arrays)} of the index)"
        lost = f"; if the .bin was cut, it lost {lost_bytes} bytes" if kind.startswith("reach") else ""
        yield f"{number} of {len(arrays.sizes)} sequences {kind}; the first is sequence {place}, {where}{lost}"


def _place(sequence: int, arrays: _Arrays) -> str:
    """Where in the index the size and the offset of a sequence stand."""
    return f"{HEADER.size + 4 * sequence} and {HEADER.size + 4 * len(arrays.sizes) + 8 * sequence}"


def _document_errors(arrays: _Arrays) -> Iterator[str]:
    doc_idx, num_sequences = arrays.doc_idx, len(arrays.sizes)
    start = HEADER.size + 12 * num_sequences
    if len(doc_idx) == 0 or doc_idx[0] != 0:
        yield f"byte {start}: doc_idx begins with {doc_idx[0] if len(doc_idx) else 'nothing'} and not with 0"
    if len(doc_idx) > 1 and doc_idx[-1] != num_sequences:
        last = start + 8 * (len(doc_idx) - 1)
        yield f"byte {last}: the last document ends at sequence {doc_idx[-1]}, and there are {num_sequences} sequences"
    backwards = 0
    first = -1
    for at in range(0, len(doc_idx), SEQUENCES):
        borders = doc_idx[at : at + SEQUENCES + 1]
        is_backwards = borders[1:] < borders[:-1]
        if is_backwards.any():
            first = at + int(is_backwards.argmax()) if first < 0 else first
            backwards += int(np.count_nonzero(is_backwards))
    if backwards:
        where = f"border {first} is {doc_idx[first]}, the next {doc_idx[first + 1]}"
        yield f"byte {start + 8 * first}: {backwards} document borders are followed by a smaller one; the first, {where}"


def _strange_tokens(dataset: IndexedDataset, vocab_size: int) -> Iterator[str]:
    """Tokens that are no ids below ``vocab_size``."""
    bin_path, _ = file_names(dataset.prefix)
    number, first = 0, -1
    for place, tokens in token_runs(dataset):
        is_strange = ~((tokens >= 0) & (tokens < vocab_size))
        if is_strange.any():
            first = place + int(is_strange.argmax()) if number == 0 else first
            number += int(np.count_nonzero(is_strange))
    if number:
        byte = first * dataset.dtype.itemsize
        (holding,) = np.nonzero((dataset.offsets <= byte) & (byte < dataset.offsets + dataset.sizes.astype(np.int64) * dataset.dtype.itemsize))
        token = np.memmap(bin_path, dtype=dataset.dtype, mode="r", offset=byte, shape=(1,))[0]
        yield (
            f"{bin_path}: {number} tokens are no ids of a vocabulary of {vocab_size}; the first is {token}, "
            f"at byte {byte}, in sequence {int(holding[0])}"
        )


def _remarks(dataset: IndexedDataset, num_bytes: int) -> Iterator[str]:
    width = dataset.dtype.itemsize
    if len(dataset.doc_idx) == 1 and len(dataset):
        yield "the index names no documents, as GPT-NeoX merges files: every sequence counts as one"
    if empty := int(np.count_nonzero(dataset.sizes == 0)):
        yield f"{empty} sequences have no tokens, the first is sequence {int((dataset.sizes == 0).argmax())}"
    if not np.issubdtype(dataset.dtype, np.integer):
        yield f"it holds {dataset.dtype}: rewards or the like, not tokens"
    spare = num_bytes - dataset.num_tokens * width
    if spare > 0:
        yield f"{spare} bytes of the .bin belong to no sequence"
    if spare < 0:
        yield f"sequences overlap: together they have {-spare} bytes more than the .bin"


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="tools.datasets.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("pairs", nargs="+", metavar="PREFIX", help="pairs, or folders of which all pairs are taken")
    flags.add_argument("--vocab-size", type=int, metavar="COUNT", help="of the tokenizer: report ids that it does not have")
    flags.add_argument("--json", action="store_true", help="print JSON")
    return flags


if __name__ == "__main__":
    sys.exit(main())

from __future__ import annotations

import errno
import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.indexed import CODES, HEADER, LEGACY_MAGIC, MAGIC, IndexedDataset, IndexedDatasetWriter, best_dtype

SEQUENCES = [[1, 2, 3], [], [4], [5, 6]]


def write(folder: Path, sequences: list[list[int]] = SEQUENCES, *, dtype: str = "u2") -> Path:
    prefix = folder / "some.text_document"
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for sequence in sequences:
            writer.add_document(sequence)
    return prefix


def index_path(prefix: Path) -> Path:
    return Path(f"{prefix}.idx")


def index_bytes(
    *, magic: bytes = MAGIC, version: int = 1, code: int = 8, counts: tuple[int, int] | None = None,
    sizes: tuple[int, ...] = (3, 0, 1, 2), offsets: tuple[int, ...] = (0, 6, 6, 8), borders: tuple[int, ...] = (0, 1, 2, 3, 4),
) -> bytes:  # fmt: skip
    """The index of SEQUENCES, with faults put in."""
    header = HEADER.pack(magic, version, code, *(counts or (len(sizes), len(borders))))
    return header + struct.pack(f"<{len(sizes)}i{len(offsets)}q{len(borders)}q", *sizes, *offsets, *borders)


def test_the_healthy_index_of_the_hostile_cases_is_the_writers(tmp_path: Path) -> None:
    assert index_path(write(tmp_path)).read_bytes() == index_bytes()


FAULTS = {
    "an empty index": (b"", "does not begin with"),
    "another file": (b"PK\x03\x04 something else, long enough to hold a header", "does not begin with"),
    "a header cut short": (index_bytes()[:20], "20 bytes, fewer than its header of 34"),
    "arrays cut short": (index_bytes()[:-1], "which take 122"),
    "bytes behind the end": (index_bytes() + b"\0", "has 123 bytes"),
    "more sequences than bytes": (index_bytes(counts=(5, 5)), "promises 5 sequences"),
    "2**64 - 1 sequences": (index_bytes(counts=(2**64 - 1, 5)), "promises 18446744073709551615 sequences"),
    "counts whose bytes wrap around 2**64": (index_bytes(counts=(4 + 2**62, 5)), "promises"),
    "another version": (index_bytes(version=2), "version 2"),
    "dtype code 0": (index_bytes(code=0), "dtype code 0"),
    "dtype code 9": (index_bytes(code=9), "dtype code 9"),
    "the legacy kind": (LEGACY_MAGIC + index_bytes()[9:], "data_impl lazy or cached"),
    "a negative size": (index_bytes(sizes=(3, -1, 1, 2)), "sequence 1 "),
    "a negative offset": (index_bytes(offsets=(0, 6, -2, 8)), "sequence 2 "),
    "an offset behind the end": (index_bytes(offsets=(0, 6, 6, 14)), "sequence 3 "),
    "an offset near 2**63": (index_bytes(offsets=(0, 6, 6, 2**63 - 2)), "sequence 3 "),
    "a size that reaches behind the end": (index_bytes(sizes=(3, 0, 1, 3)), "sequence 3 "),
    "a huge size": (index_bytes(sizes=(2**31 - 1, 0, 1, 2)), "sequence 0 "),
    "an offset inside a token": (index_bytes(offsets=(0, 6, 7, 8)), "sequence 2 "),
    "no document borders": (index_bytes(borders=()), "no document border 0"),
    "borders that start late": (index_bytes(borders=(1, 2, 3, 4)), "no document border 0"),
    "borders that end early": (index_bytes(borders=(0, 1, 2, 3)), "ends its last document at sequence 3, but has 4"),
    "borders that end late": (index_bytes(borders=(0, 1, 2, 3, 5)), "ends its last document at sequence 5"),
    "borders that run backwards": (index_bytes(borders=(0, 3, 1, 4)), "run backwards"),
    "borders whose difference overflows": (index_bytes(borders=(0, 2**63 - 1, -2, 3, 4)), "run backwards"),
    "wider tokens than the .bin": (index_bytes(code=4), "does not lie in"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_index_is_refused_with_its_name_and_the_rule(fault: str, tmp_path: Path) -> None:
    prefix = write(tmp_path)
    content, message = FAULTS[fault]
    index_path(prefix).write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        IndexedDataset(prefix)
    assert message in str(refusal.value)
    assert str(index_path(prefix)) in str(refusal.value)


def test_a_truncated_bin_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path)
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"sequence 3 .* does not lie in .*some.text_document.bin, which has 11 bytes"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_a_missing_file_is_named(kind: str, tmp_path: Path) -> None:
    prefix = write(tmp_path)
    Path(f"{prefix}.{kind}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"some.text_document.{kind} does not exist"):
        IndexedDataset(prefix)


def test_a_file_given_for_a_prefix_is_said_to_be_one(tmp_path: Path) -> None:
    prefix = write(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"data paths are prefixes, so give {prefix}"):
        IndexedDataset(f"{prefix}.bin")


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 200), change=st.binary(min_size=1, max_size=12), cut=st.integers(0, 130))
def test_a_damaged_index_is_refused_or_stays_inside_the_bin(place: int, change: bytes, cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    prefix = write(tmp_path_factory.mktemp("damaged"))
    damaged = bytearray(index_bytes())
    damaged[place : place + len(change)] = change
    index_path(prefix).write_bytes(bytes(damaged[: max(cut, 34)] if cut < 100 else damaged))
    try:
        dataset = IndexedDataset(prefix)
    except ValueError:
        return
    for sequence in range(len(dataset)):
        assert len(dataset[sequence]) == dataset.sizes[sequence]


INTERESTING = st.sampled_from([-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 4, 6, 8, 12, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 2, 2**63 - 1])


@settings(max_examples=300, deadline=None)
@given(
    code=st.integers(0, 9),
    sizes=st.lists(st.one_of(st.integers(0, 4), INTERESTING.filter(lambda value: -(2**31) <= value < 2**31)), max_size=5),
    offsets=st.lists(st.one_of(st.integers(0, 12), INTERESTING), min_size=5, max_size=5),
    borders=st.lists(st.one_of(st.integers(0, 5), INTERESTING), max_size=5),
    bin_bytes=st.integers(0, 24),
)
def test_any_numbers_are_refused_or_stay_inside_the_bin(
    code: int, sizes: list[int], offsets: list[int], borders: list[int], bin_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prefix = tmp_path_factory.mktemp("numbers") / "x"
    index_path(prefix).write_bytes(index_bytes(code=code, sizes=tuple(sizes), offsets=tuple(offsets[: len(sizes)]), borders=tuple(borders)))
    Path(f"{prefix}.bin").write_bytes(bytes(bin_bytes))
    try:
        dataset = IndexedDataset(prefix)
    except ValueError:
        return
    assert [len(row) for row in dataset] == sizes
    assert sorted(dataset.doc_idx.tolist()) == dataset.doc_idx.tolist()
    assert dataset.doc_idx.min() == 0
    assert dataset.doc_idx.max() in (0, len(sizes))


def test_a_merged_index_without_documents_is_read(tmp_path: Path) -> None:
    prefix = write(tmp_path)
    index_path(prefix).write_bytes(index_bytes(borders=(0,)))
    dataset = IndexedDataset(prefix)
    assert dataset.doc_idx.tolist() == [0]
    assert dataset.num_documents == 4
    assert [row.tolist() for row in dataset] == SEQUENCES


def test_an_empty_pair_is_written_and_read(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path, []))
    assert (len(dataset), dataset.num_tokens, dataset.doc_idx.tolist()) == (0, 0, [0])


@pytest.mark.parametrize("dtype", CODES.values(), ids=str)
def test_every_dtype_comes_back(dtype: np.dtype, tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path, dtype=str(dtype)))
    assert dataset.dtype == dtype
    assert [row.tolist() for row in dataset] == SEQUENCES


@pytest.mark.parametrize(("offset", "length", "expected"), [(0, None, [1, 2, 3]), (1, None, [2, 3]), (1, 1, [2]), (3, 0, []), (3, None, [])])
def test_a_part_of_a_sequence_is_read(offset: int, length: int | None, expected: list[int], tmp_path: Path) -> None:
    assert IndexedDataset(write(tmp_path)).get(0, offset, length).tolist() == expected


@pytest.mark.parametrize("wanted", [(4, 0, None), (-1, 0, None), (0, -1, None), (0, 0, 4), (0, 3, 1), (0, 4, None), (0, 1, -1), (1, 0, 1)])
def test_no_read_leaves_a_sequence(wanted: tuple[int, int, int | None], tmp_path: Path) -> None:
    with pytest.raises(IndexError, match=r"do(es)? not exist"):
        IndexedDataset(write(tmp_path)).get(*wanted)


def test_tokens_cannot_be_changed_through_the_map(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        IndexedDataset(write(tmp_path))[0][0] = 9


def test_a_dataset_travels_to_another_process(tmp_path: Path) -> None:
    again = pickle.loads(pickle.dumps(IndexedDataset(write(tmp_path), warmup=True)))
    assert [row.tolist() for row in again] == SEQUENCES


def test_documents_of_several_sequences_keep_their_borders(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "x", "i4") as writer:
        writer.add([1])
        writer.add([2, 3])
        writer.end_document()
        writer.add_document([4])
    dataset = IndexedDataset(tmp_path / "x")
    assert (dataset.doc_idx.tolist(), dataset.num_documents, len(dataset)) == ([0, 2, 3], 2, 3)


@pytest.mark.parametrize("token", [-1, 65536])
def test_a_token_that_does_not_fit_is_refused_and_nothing_is_left(token: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"Token {token} does not fit uint16"), IndexedDatasetWriter(tmp_path / "x", "u2") as writer:
        writer.add([1, token])
    assert list(tmp_path.iterdir()) == []


class FullDisk(io.RawIOBase):
    """Takes nothing, as a disk that is full."""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fails_inside", [True, False])
def test_a_full_disk_leaves_nothing(fails_inside: bool, tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(tmp_path / "x", "u2")
    writer._bin.close()
    writer._bin = io.BufferedWriter(FullDisk())
    with pytest.raises(OSError, match="No space left"), writer:
        writer.add_document([0] * (10_000 if fails_inside else 1))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_writer_leaves_the_old_pair_as_it_was(tmp_path: Path) -> None:
    prefix = write(tmp_path)
    with pytest.raises(ValueError, match="does not fit"), IndexedDatasetWriter(prefix, "u2") as writer:
        writer.add_document([9, -9])
    assert [row.tolist() for row in IndexedDataset(prefix)] == SEQUENCES
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, "uint16"), (65500, "int32"), (50277, "uint16"), (100_000, "int32")])
def test_the_dtype_follows_the_vocabulary(vocab_size: int, dtype: str) -> None:
    assert best_dtype(vocab_size) == dtype

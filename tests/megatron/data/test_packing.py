"""Sizes that no test can store: more tokens than 31 or 32 bits count, and the wide index arrays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron.data import index_builder, index_cache, packing
from megatron.data.gpt_dataset import GPTDataset, read_samples
from megatron.data.index_cache import open_index
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.packing import SampleIndex, SampleRequest, build_index, shuffle_dtype
from tests.tools.datasets.writing import write_sparse_pair
from tools.bench.index_build import defined_index

ARRAYS = ("doc_idx", "sample_idx", "shuffle_idx")


def request(sizes: np.ndarray, **changes: int) -> SampleRequest:
    return replace(SampleRequest(first_document=0, last_document=len(sizes), seq_length=2048, num_samples=1_000_000, seed=1234), **changes)


@pytest.mark.parametrize("num_samples", [1_000_000, 3_000_000])
def test_more_tokens_than_32_bits_count_are_cut_as_the_definition_says(num_samples: int) -> None:
    sizes = np.random.RandomState(0).randint(0, 2_000_000, 5000).astype(np.int32)
    assert sizes.sum(dtype=np.int64) > 2**32
    wanted = request(sizes, num_samples=num_samples)
    built, defined = build_index(wanted, sizes), defined_index(wanted, sizes)
    assert built.num_rows * 2048 > 2**32
    for name in ARRAYS:
        assert np.array_equal(getattr(built, name), getattr(defined, name)), name


def test_sequences_as_long_as_their_sizes_can_say_do_not_overflow() -> None:
    sizes = np.full(40, np.iinfo(np.int32).max, dtype=np.int32)
    wanted = request(sizes, seq_length=1_000_003, num_samples=100_000)
    built, defined = build_index(wanted, sizes), defined_index(wanted, sizes)
    assert np.array_equal(built.sample_idx, defined.sample_idx)
    assert packing.count_tokens(sizes, wanted) == 40 * (2**31 - 1)


def test_samples_behind_4_gigabytes_are_read_where_they_lie(tmp_path: Path) -> None:
    """The sequences are holes of 2 GiB whose first and last token is their number."""
    tokens = IndexedDataset(write_sparse_pair(tmp_path / "x", [2**30] * 4))
    wanted = request(tokens.sizes, seq_length=2**20, num_samples=4000)
    dataset = GPTDataset(tokens, build_index(wanted, tokens.sizes), seq_length=2**20)
    place_of = np.argsort(dataset.index.shuffle_idx)
    for position, sequence in enumerate(dataset.index.doc_idx.tolist()):
        row = read_samples(dataset, [int(place_of[position * 2**10])]).text[0]
        assert row[0] == sequence + 1
        assert not row[1:].any()
        if position < 3:
            end = read_samples(dataset, [int(place_of[(position + 1) * 2**10 - 1])]).text[0]
            assert end[-2:].tolist() == [sequence + 1, dataset.index.doc_idx[position + 1] + 1]


@pytest.mark.parametrize(("num_samples", "dtype"), [(2**32 - 3, "uint32"), (2**32 - 2, "int64"), (2**40, "int64")])
def test_places_are_64_bit_where_gpt_neox_makes_them_so(num_samples: int, dtype: str) -> None:
    assert shuffle_dtype(num_samples) == dtype


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every index had more than 2**32 samples."""
    for module in (index_builder, index_cache):
        monkeypatch.setattr(module, "sample_index_dtype", lambda num_samples: np.dtype(np.int64))
    monkeypatch.setattr(packing, "shuffle_dtype", lambda num_samples: np.dtype(np.int64))


def is_same(wide: SampleIndex, narrow: SampleIndex) -> bool:
    assert (wide.doc_idx.dtype, wide.sample_idx.dtype, wide.shuffle_idx.dtype) == (np.int32, np.int64, np.int64)
    return all(np.array_equal(getattr(wide, name), getattr(narrow, name)) for name in ARRAYS)


@pytest.mark.usefixtures("wide")
def test_the_64_bit_branches_give_the_same_order_and_the_same_samples(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "x", "u2") as writer:
        for size in range(1, 60):
            writer.add_document(np.arange(size))
    tokens = IndexedDataset(tmp_path / "x")
    wanted = request(tokens.sizes, seq_length=13, num_samples=500)
    defined = defined_index(wanted, tokens.sizes)
    stream = np.concatenate([tokens[sequence] for sequence in defined.doc_idx.tolist()])
    dataset = GPTDataset.open(tokens, "train_0", wanted)
    assert is_same(dataset.index, defined)
    for place in range(dataset.num_readable):
        start = int(defined.shuffle_idx[place]) * 13
        assert read_samples(dataset, [place]).text[0].tolist() == stream[start : start + 14].tolist()


@pytest.mark.usefixtures("wide")
def test_64_bit_arrays_of_gpt_neox_are_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with IndexedDatasetWriter(tmp_path / "x", "u2") as writer:
        for size in range(1, 60):
            writer.add_document(np.arange(size))
    tokens = IndexedDataset(tmp_path / "x")
    wanted = request(tokens.sizes, seq_length=13, num_samples=500)
    index = build_index(wanted, tokens.sizes)
    for name in ARRAYS:
        np.save(f"{index_cache.cache_names(tokens.prefix, 'train_0', wanted)[1]}_{name}.npy", getattr(index, name))
    assert is_same(open_index(tokens, "train_0", wanted), index)
    assert "which another program wrote: its content fits the data" in caplog.text

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.gpt_dataset import IGNORED_LABEL, GPTDataset, read_samples
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.packing import PackImpl, SampleIndex, SampleRequest, build_index


def write(prefix: Path, rows: list[list[int]], dtype: str = "i4") -> IndexedDataset:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for row in rows:
            writer.add_document(row)
    return IndexedDataset(prefix)


def request(count: int, *, num_samples: int = 6, seq_length: int = 4, pack_impl: PackImpl = "packed", allow_chopped: bool = True) -> SampleRequest:
    return SampleRequest(
        first_document=0,
        last_document=count,
        seq_length=seq_length,
        num_samples=num_samples,
        seed=3,
        pack_impl=pack_impl,
        allow_chopped=allow_chopped,
    )


def open_dataset(tokens: IndexedDataset, wanted: SampleRequest, labels: IndexedDataset | None = None) -> GPTDataset:
    return GPTDataset(tokens, build_index(wanted, tokens.sizes), seq_length=wanted.seq_length, labels=labels)


@pytest.mark.parametrize("seq_length", [1, 2, 3, 7, 20])
def test_packed_samples_cut_the_shuffled_stream(seq_length: int, tmp_path: Path) -> None:
    tokens = write(tmp_path / "x", [[10, 11, 12], [], [20], [30, 31, 32, 33, 34], [40, 41]])
    dataset = open_dataset(tokens, request(5, seq_length=seq_length))
    stream = np.concatenate([tokens[int(sequence)] for sequence in dataset.index.doc_idx])
    for place in range(dataset.num_readable):
        start = int(dataset.index.shuffle_idx[place]) * seq_length
        assert read_samples(dataset, [place]).text[0].tolist() == stream[start : start + seq_length + 1].tolist()
        assert read_samples(dataset, [place]).label is None


def test_the_last_packed_sample_is_there_but_not_counted(tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path / "x", [[1, 2, 3, 4, 5]] * 5), request(5))
    assert len(dataset) == dataset.num_readable - 1
    read_samples(dataset, [len(dataset)])
    for place in (-1, dataset.num_readable):
        with pytest.raises(IndexError, match=f"Sample {place} of .*x does not exist"):
            read_samples(dataset, [place])


def test_unpacked_samples_are_one_sequence_each_with_their_padding_hidden(tmp_path: Path) -> None:
    tokens = write(tmp_path / "x", [[1, 2], [], [3, 4, 5, 6, 7, 8], [9, 9, 9, 9, 9]])
    dataset = open_dataset(tokens, request(4, pack_impl="unpacked"))
    assert len(dataset) == dataset.num_readable == 6
    samples = read_samples(dataset, range(6))
    assert samples.label is not None
    rows = {tuple(text): label for text, label in zip(samples.text.tolist(), samples.label.tolist(), strict=True)}
    assert rows == {
        (1, 2, 0, 0, 0): [1, 2, IGNORED_LABEL, IGNORED_LABEL, IGNORED_LABEL],
        (3, 4, 5, 6, 7): [3, 4, 5, 6, 7],
        (9, 9, 9, 9, 9): [9, 9, 9, 9, 9],
    }


@pytest.mark.parametrize("pack_impl", ["pack_until_overflow", "unpacked"])
def test_without_chopping_long_sequences_are_left_out(pack_impl: PackImpl, tmp_path: Path) -> None:
    tokens = write(tmp_path / "x", [[1, 2], [3, 4, 5, 6, 7, 8], [9, 9]])
    dataset = open_dataset(tokens, request(3, pack_impl=pack_impl, allow_chopped=False))
    assert 3 not in read_samples(dataset, range(len(dataset))).text


def test_packs_stay_inside_the_split(tmp_path: Path) -> None:
    tokens = write(tmp_path / "x", [[document] * 2 for document in range(1, 9)])
    wanted = SampleRequest(first_document=2, last_document=5, seq_length=4, num_samples=9, seed=3, pack_impl="pack_until_overflow")
    dataset = open_dataset(tokens, wanted)
    assert set(read_samples(dataset, range(9)).text.flat) <= {0, 3, 4, 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"last_document": 4}, "lies inside"),
        ({"first_document": 3}, "not empty"),
        ({"first_document": -1}, "lies inside"),
        ({"seq_length": 0}, "at least 1 token"),
        ({"seed": -1}, "takes 0 to 4294967295"),
        ({"seed": 2**32}, "takes 0 to 4294967295"),
        ({"num_epochs": 1}, "not both"),
        ({"num_samples": None}, "not neither"),
        ({"num_samples": 0}, "at least 1"),
        ({"first_document": 1, "last_document": 2}, "hold no tokens"),
        ({"num_samples": None, "num_epochs": 1, "pack_impl": "unpacked"}, "set train_iters instead of train_epochs"),
        ({"allow_chopped": False, "seq_length": 1, "pack_impl": "unpacked"}, "finds no sequence it may use"),
        ({"num_samples": None, "num_epochs": 1, "seq_length": 6}, "too few for one sample of 6"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, object], message: str) -> None:
    fields = {"first_document": 0, "last_document": 3, "seq_length": 2, "num_samples": 5, "seed": 1, **changes}
    with pytest.raises(ValueError, match=message):
        build_index(SampleRequest(**fields), np.array([3, 0, 3], dtype=np.int32))  # type: ignore[arg-type]


def test_labels_of_other_lengths_are_refused(tmp_path: Path) -> None:
    tokens, labels = write(tmp_path / "x", [[1, 2], [3]]), write(tmp_path / "y", [[1], [2, 3]])
    with pytest.raises(ValueError, match="does not hold one label for each token"):
        open_dataset(tokens, request(2, seq_length=1), labels)


@pytest.mark.parametrize("pack_impl", ["packed", "pack_until_overflow", "unpacked"])
def test_fewer_labels_than_tokens_are_refused_before_an_index_is_built(pack_impl: PackImpl, tmp_path: Path) -> None:
    tokens, labels = write(tmp_path / "x", [[1, 2], [3, 4]]), write(tmp_path / "y", [[1, 2]])
    with pytest.raises(ValueError, match="does not hold one label for each token"):
        GPTDataset.open(tokens, "train_0", request(2, seq_length=2, pack_impl=pack_impl), labels=labels)


def test_a_file_of_floats_is_no_token_file(tmp_path: Path) -> None:
    tokens = write(tmp_path / "rewards", [[1, 2, 3]], "f4")
    with pytest.raises(ValueError, match="holds float32, and tokens are integers"):
        open_dataset(tokens, request(1))


@pytest.mark.parametrize("pack_impl", ["packed", "pack_until_overflow", "unpacked"])
def test_the_pieces_of_a_sample_are_its_tokens(pack_impl: PackImpl, tmp_path: Path) -> None:
    tokens = write(tmp_path / "x", [[10, 11, 12], [], [20], [30, 31, 32, 33, 34, 35, 36], [40, 41]])
    dataset = open_dataset(tokens, request(5, seq_length=4, pack_impl=pack_impl))
    for place in range(dataset.num_readable):
        read = [token for piece in dataset.pieces(place) for token in tokens.get(*piece).tolist()]
        assert read_samples(dataset, [place]).text[0].tolist() == read + [0] * (5 - len(read))
        assert all(piece.length > 0 for piece in dataset.pieces(place))


NUMBERS = st.one_of(st.integers(-6, 12), st.sampled_from([-(2**31), 2**31 - 1]))


@settings(max_examples=200, deadline=None)
@given(
    doc_idx=st.lists(NUMBERS, min_size=1, max_size=6),
    sample_idx=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=4, max_size=4),
    shuffle_idx=st.lists(NUMBERS, min_size=3, max_size=3),
    is_packed=st.booleans(),
)
def test_an_index_of_any_numbers_reads_tokens_of_the_file_or_says_that_they_do_not_exist(
    doc_idx: list[int],
    sample_idx: list[tuple[int, int]],
    shuffle_idx: list[int],
    is_packed: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tokens = write(tmp_path_factory.mktemp("any") / "x", [[10, 11, 12], [], [20], [30, 31, 32, 33, 34]])
    rows = np.array(sample_idx, dtype=np.int32)
    index = SampleIndex(doc_idx=np.array(doc_idx, dtype=np.int32), sample_idx=rows if is_packed else rows[:, 0], shuffle_idx=np.array(shuffle_idx))
    dataset = GPTDataset(tokens, index, seq_length=4)
    for place in range(3):
        try:
            text = read_samples(dataset, [place]).text[0]
        except IndexError:
            continue
        assert text.shape == (5,)
        assert set(text.tolist()) <= {0, 10, 11, 12, 20, 30, 31, 32, 33, 34}

from __future__ import annotations

import itertools
import subprocess
import sys
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron.data.gpt_dataset import GPTDataset
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.loader import BatchLoader
from megatron.data.packing import SampleRequest, build_index
from sepllm.pattern import AttentionPattern

PATTERN = AttentionPattern(initial_tokens=1, separator_ids=(5,), windows=(2, 4))


@dataclass
class Numbers:
    """Sample i is ``[i, i, i]``; the last one is there but not counted, as in packed data."""

    length: int
    is_labelled: bool = False
    seq_length: int = 2

    def __len__(self) -> int:
        return self.length - 1

    @property
    def num_readable(self) -> int:
        return self.length

    def read_into(self, place: int, *, text: NDArray[np.int64], label: NDArray[np.int64] | None) -> None:
        text[:] = place
        if label is not None:
            label[:] = place - 1


def read(loader: BatchLoader, count: int | None = None) -> list[list[int]]:
    return [batch.ids[:, 0].tolist() for batch in itertools.islice(loader, count)]


def test_a_run_ends_with_an_error_only_if_more_is_asked_for() -> None:
    loader = BatchLoader(Numbers(7), PATTERN, micro_batch_size=2)
    assert read(loader, 3) == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="The data ran out: all whole batches of its 7 samples were read once"):
        read(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_that_resumes_gives_what_the_uninterrupted_one_gives(num_workers: int) -> None:
    def batches(consumed_samples: int) -> list[list[int]]:
        loader = BatchLoader(
            Numbers(40),
            PATTERN,
            micro_batch_size=2,
            data_parallel_rank=1,
            data_parallel_size=3,
            consumed_samples=consumed_samples,
            num_workers=num_workers,
        )
        return read(loader, (36 - consumed_samples) // 6)

    assert batches(0)[3:] == batches(18) == [[20, 21], [26, 27], [32, 33]]


def test_workers_give_the_same_batches_ranges_included() -> None:
    loaders = [BatchLoader(Numbers(9), PATTERN, micro_batch_size=2, num_workers=workers) for workers in (0, 2)]
    for here, there in zip(*(itertools.islice(loader, 4) for loader in loaders), strict=True):
        assert torch.equal(here.ids, there.ids)
        assert set(there.layout._ranges) == {(2, None), (4, None)}
        assert torch.equal(here.layout.ranges(1).dense(), there.layout.ranges(1).dense())


@pytest.mark.parametrize("consumed_samples", [0, 2, 4, 18])
def test_each_pass_repeats_the_same_order_without_the_ragged_tail(consumed_samples: int) -> None:
    loader = BatchLoader(Numbers(6), PATTERN, micro_batch_size=2, passes=5, consumed_samples=consumed_samples)
    assert read(loader, 10 - consumed_samples // 2) == ([[0, 1], [2, 3]] * 5)[consumed_samples // 2 :]
    with pytest.raises(ValueError, match="5 samples were read 5 times"):
        list(loader)


def test_passes_without_end_go_on() -> None:
    assert read(BatchLoader(Numbers(4), PATTERN, micro_batch_size=3, passes=None), 100) == [[0, 1, 2]] * 100


def test_a_run_goes_on_with_another_batch_size_at_the_next_sample() -> None:
    assert read(BatchLoader(Numbers(20), PATTERN, micro_batch_size=4, consumed_samples=10), 2) == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert read(BatchLoader(Numbers(9), PATTERN, micro_batch_size=4, passes=3, consumed_samples=6), 2) == [[6, 7, 0, 1], [2, 3, 4, 5]]


def test_less_data_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="3 samples, fewer than one global micro-batch of 4"):
        BatchLoader(Numbers(3), PATTERN, micro_batch_size=2, data_parallel_size=2)


def test_a_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="Rank 2 of 2"):
        BatchLoader(Numbers(9), PATTERN, micro_batch_size=1, data_parallel_rank=2, data_parallel_size=2)


def test_label_rows_become_labels() -> None:
    (batch,) = itertools.islice(BatchLoader(Numbers(5, is_labelled=True), PATTERN, micro_batch_size=2), 1)
    assert batch.loss_mask.tolist() == [[0, 0], [1, 1]]
    assert batch.labels.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_token_outside_the_vocabulary_is_a_sentence_and_not_an_index(num_workers: int) -> None:
    loader = BatchLoader(Numbers(9), PATTERN, micro_batch_size=2, vocab_size=5, num_workers=num_workers)
    assert read(loader, 2) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match=r"^The data holds token 5, and the model has 5 \(padded_vocab_size\): it was made with another tokenizer"):
        read(loader, 3)


def test_a_negative_token_is_none_and_a_negative_label_is_ignored() -> None:
    labelled = BatchLoader(Numbers(5, is_labelled=True), PATTERN, micro_batch_size=2, vocab_size=9)
    assert read(labelled, 2) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="The data holds token -1,"):
        read(BatchLoader(Shifted(5), PATTERN, micro_batch_size=2, vocab_size=9), 1)


class Shifted(Numbers):
    """Sample i is full of i - 1."""

    def read_into(self, place: int, *, text: NDArray[np.int64], label: NDArray[np.int64] | None) -> None:
        text[:] = place - 1


def test_no_batch_is_kept() -> None:
    seen: list[int] = []

    class Counting(Numbers):
        def read_into(self, place: int, *, text: NDArray[np.int64], label: NDArray[np.int64] | None) -> None:
            seen.append(place)
            super().read_into(place, text=text, label=label)

    read(BatchLoader(Counting(4), PATTERN, micro_batch_size=3, passes=None), 3)
    assert seen == [0, 1, 2] * 3


def documents(prefix: Path, *, length: int) -> IndexedDataset:
    """A hundred documents of so many tokens below 1000, two bytes each."""
    with IndexedDatasetWriter(prefix, "u2") as writer:
        for first in range(100):
            writer.add_document(np.arange(first, first + length) % 1000)
    return IndexedDataset(prefix)


def packed(tokens: IndexedDataset, *, seq_length: int, labels: IndexedDataset | None = None) -> GPTDataset:
    request = SampleRequest(first_document=0, last_document=len(tokens), seq_length=seq_length, num_samples=None, num_epochs=1, seed=1)
    return GPTDataset(tokens, build_index(request, tokens.sizes), seq_length=seq_length, labels=labels)


@pytest.mark.parametrize("is_labelled", [False, True])
def test_reading_a_batch_takes_the_memory_of_its_rows_and_no_more(is_labelled: bool, tmp_path: Path) -> None:
    """What numpy allocates, that is. A copy beside the one into the rows, even of a single row, would show."""
    tokens = documents(tmp_path / "x", length=5000)
    dataset = packed(tokens, seq_length=4096, labels=tokens if is_labelled else None)
    batches = iter(BatchLoader(dataset, PATTERN, micro_batch_size=8))
    next(batches)
    row_bytes = 4097 * 8
    tracemalloc.start()
    next(batches)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    rows_bytes = (1 + is_labelled) * 8 * row_bytes
    assert rows_bytes <= peak_bytes < rows_bytes + row_bytes // 2


EPOCH = """
import itertools
import sys
import tracemalloc
from pathlib import Path

from megatron.data.gpt_dataset import GPTDataset
from megatron.data.indexed import IndexedDataset
from megatron.data.loader import BatchLoader
from megatron.data.packing import SampleRequest, build_index
from sepllm.pattern import AttentionPattern

def own_kilobytes():
    status = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in status if line.startswith(("RssAnon:", "RssShmem:")))

prefix, num_workers = sys.argv[1], int(sys.argv[2])
tokens = IndexedDataset(prefix)
request = SampleRequest(first_document=0, last_document=len(tokens), seq_length=512, num_samples=None, num_epochs=1, seed=1)
dataset = GPTDataset(tokens, build_index(request, tokens.sizes), seq_length=512)
pattern = AttentionPattern(initial_tokens=1, separator_ids=(5,), windows=(64,))
batches = iter(BatchLoader(dataset, pattern, micro_batch_size=4, passes=None, num_workers=num_workers))
size = 0
for batch in itertools.islice(batches, 200):
    size = sum(tensor.nbytes for tensor in (batch.ids, batch.labels, batch.loss_mask))
before = own_kilobytes()
for batch in itertools.islice(batches, 1500):
    pass
print(own_kilobytes() - before, 1500 * size // 1024)
"""


@pytest.mark.parametrize("num_workers", [0, 1])
def test_memory_stays_the_same_over_epochs(num_workers: int, tmp_path: Path) -> None:
    """What the process itself holds: pages of the mapped file come and go as the system likes."""
    documents(tmp_path / "x", length=5000)
    command = [sys.executable, "-c", EPOCH, str(tmp_path / "x"), str(num_workers)]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown, all_batches = map(int, done.stdout.split())
    assert all_batches > 50_000
    assert grown < 2_000

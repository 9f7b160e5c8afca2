from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron.data.batch import Batch
from megatron.data.loader import BatchLoader
from megatron.data.packet import ALIGNMENT, Packet
from sepllm.pattern import AttentionPattern

PATTERN = AttentionPattern(initial_tokens=1, separator_ids=(5,), windows=(2, 4))


def batch() -> Batch:
    return Batch.from_rows(torch.arange(20).view(2, 10), PATTERN, masked_id=3)


def tensors(value: Batch) -> list[Tensor]:
    ranges = [value.layout.ranges(layer) for layer in range(PATTERN.num_layers)]
    return [value.ids, value.labels, value.loss_mask, value.layout.is_initial, value.layout.is_separator] + [
        tensor for made in ranges for tensor in (made.index, made.far_lo, made.far_hi, made.band_lo, made.band_hi, *(made.extremes or ()))
    ]


@pytest.mark.parametrize("travels", [False, True])
def test_what_comes_out_of_a_packet_is_what_went_in(travels: bool) -> None:
    packet = Packet.of(batch())
    opened = (pickle.loads(pickle.dumps(packet)) if travels else packet).open()
    for given, found in zip(tensors(batch()), tensors(opened), strict=True):
        assert (found.dtype, found.shape) == (given.dtype, given.shape)
        assert torch.equal(found, given)
    assert opened.layout.pattern == PATTERN


def test_taking_a_batch_apart_copies_only_what_is_not_contiguous() -> None:
    given = batch()
    for before, after in zip(tensors(given), tensors(Packet.of(given).open()), strict=True):
        assert after.is_contiguous()
        assert (after.data_ptr() == before.data_ptr()) == before.is_contiguous()


def test_a_tensor_that_occurs_twice_is_stored_once() -> None:
    tensor = torch.arange(1000)
    twice = Packet.of([tensor, tensor, tensor[:0], torch.zeros(())])
    assert len(pickle.dumps(twice)) < 8 * 1000 + 1000
    first, second, empty, scalar = twice.open()
    assert first is second
    assert (empty.shape, scalar.shape) == ((0,), ())


def test_a_packet_is_pinned_in_one_piece_each_tensor_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[Tensor] = []

    def empty(*size: int, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        assert pin_memory
        pieces.append(torch.zeros(*size, dtype=dtype))
        return pieces[-1]

    packet = Packet.of(batch())
    monkeypatch.setattr(torch, "empty", empty)
    opened = packet.pin_memory().open()
    monkeypatch.undo()
    (piece,) = pieces
    for given, found in zip(tensors(batch()), tensors(opened), strict=True):
        assert torch.equal(found, given)
        assert found.untyped_storage().data_ptr() == piece.data_ptr()
        assert (found.data_ptr() - piece.data_ptr()) % ALIGNMENT == 0


class Rows:
    """Sample i is full of i."""

    num_readable = 40
    seq_length = 8
    is_labelled = False

    def __len__(self) -> int:
        return 40

    def read_into(self, place: int, *, text: NDArray[np.int64], label: NDArray[np.int64] | None) -> None:
        text[:] = place


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_pinned_and_arrive_on_the_device_as_they_are(num_workers: int) -> None:
    loaders = [BatchLoader(Rows(), PATTERN, micro_batch_size=2, num_workers=num_workers, pinned=pinned) for pinned in (False, True)]
    for plain, pinned in zip(*(itertools.islice(loader, 10) for loader in loaders), strict=True):
        assert all(tensor.is_pinned() for tensor in tensors(pinned))
        arrived = pinned.to("cuda")
        torch.cuda.synchronize()
        for given, found in zip(tensors(plain), tensors(arrived), strict=True):
            assert torch.equal(found.cpu(), given)

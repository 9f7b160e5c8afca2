"""Micro-batches of one data-parallel rank, from any sample of a run on.

Step k always consumes the samples ``k * TBS`` to ``(k + 1) * TBS``, however they are spread over micro-batches, ranks and
accumulation: each global micro-batch is a run of consecutive samples, and rank r takes the r-th slice of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatron.data.batch import Batch
from megatron.data.gpt_dataset import SampleDataset, read_samples
from megatron.data.packet import Packet
from sepllm.pattern import AttentionPattern


class BatchLoader:
    """Iterates over the batches of one rank; every ``iter`` starts at ``consumed_samples`` again. Keeps no batch."""

    def __init__(
        self,
        dataset: SampleDataset,
        pattern: AttentionPattern,
        *,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        consumed_samples: int = 0,
        passes: int | None = 1,
        masked_id: int | None = None,
        document_end_id: int | None = None,
        vocab_size: int | None = None,
        num_workers: int = 0,
        pinned: bool = False,
    ) -> None:
        """``consumed_samples``: by all ranks, since the start of the run. ``passes`` over the data, each in the same order
        (`train_epochs`); None: without end. ``masked_id`` and ``document_end_id``: see `Batch.from_rows`. ``vocab_size``:
        a token outside of it is an error; None trusts the data. ``num_workers``: processes that read ahead; 0 reads in this one.
        ``pinned``: in memory from which a CUDA device copies while the process goes on.
        """
        self.dataset = dataset
        # A single pass may read the sample that `len` leaves out, so that a run of exactly that many samples can end.
        self.places = Places(
            num_samples=len(dataset) if passes != 1 else dataset.num_readable,
            micro_batch_size=micro_batch_size,
            rank=data_parallel_rank,
            num_ranks=data_parallel_size,
            first=consumed_samples,
            passes=passes,
        )
        self._make = _Maker(dataset=dataset, pattern=pattern, masked_id=masked_id, document_end_id=document_end_id, vocab_size=vocab_size)
        self._num_workers = num_workers
        self._pinned = pinned

    def __iter__(self) -> Iterator[Batch]:
        """Batches until the data ends; asking for one more is an error that says so."""
        for made in self._made():
            if isinstance(made, ValueError):
                raise made
            yield made
        passes = self.places.passes
        raise ValueError(
            f"The data ran out: all whole batches of its {self.places.num_samples} samples were read "
            f"{'once' if passes == 1 else f'{passes} times'}. Give more data, train for fewer iterations, or set train_epochs."
        )

    def _made(self) -> Iterator[Batch | ValueError]:
        """Batches of all places, in order. What must leave the process that makes it, or be pinned, travels in one piece."""
        if self._num_workers == 0 and not self._pinned:
            yield from map(self._make, self.places)
            return
        packets: DataLoader[Packet[Batch | ValueError]] = DataLoader(
            cast(Dataset, _Itself()),
            batch_sampler=self.places,
            collate_fn=_Sender(make=self._make),
            num_workers=self._num_workers,
            pin_memory=self._pinned,
        )
        for packet in packets:
            yield packet.open()


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Iterates over lists of ``micro_batch_size`` places in the data set: those that one rank reads.

    It may start at any sample, so a run can go on with another batch size. A pass that is repeated leaves its ragged tail out.
    """

    num_samples: int
    """Of one pass."""
    micro_batch_size: int
    rank: int
    num_ranks: int
    first: int
    """Samples that all ranks have consumed before."""
    passes: int | None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_ranks or self.micro_batch_size < 1:
            raise ValueError(f"Rank {self.rank} of {self.num_ranks} with micro-batches of {self.micro_batch_size} reads nothing.")
        if self.num_samples < self.group:
            raise ValueError(f"The data has {self.num_samples} samples, fewer than one global micro-batch of {self.group}: use more data.")

    @property
    def group(self) -> int:
        """Samples of one micro-batch of all ranks."""
        return self.micro_batch_size * self.num_ranks

    def __iter__(self) -> Iterator[list[int]]:
        whole = self.num_samples // self.group * self.group
        end = self.num_samples if self.passes == 1 else whole * self.passes if self.passes else None
        at = self.first
        while end is None or at + self.group <= end:
            start = at + self.rank * self.micro_batch_size
            yield [place if self.passes == 1 else place % whole for place in range(start, start + self.micro_batch_size)]
            at += self.group


class _Itself(Dataset[int]):
    """Every place is itself: the samples are read where a batch is made of them."""

    def __getitem__(self, place: int) -> int:
        return place


@dataclass(frozen=True, slots=True, kw_only=True)
class _Maker:
    """Places to a batch. An object and not a closure, so that worker processes can be sent it."""

    dataset: SampleDataset
    pattern: AttentionPattern
    masked_id: int | None
    document_end_id: int | None
    vocab_size: int | None

    def __call__(self, places: list[int]) -> Batch:
        samples = read_samples(self.dataset, places)
        text, label = torch.from_numpy(samples.text), None if samples.label is None else torch.from_numpy(samples.label)
        if self.vocab_size is not None:
            self._check_tokens(text)
            if label is not None:
                self._check_tokens(label.amax().clamp(min=0))  # any label below 0 is one that does not count
        return Batch.from_rows(text, self.pattern, label=label, masked_id=self.masked_id, document_end_id=self.document_end_id)

    def _check_tokens(self, tokens: Tensor) -> None:
        assert self.vocab_size is not None
        lowest, highest = (int(extreme) for extreme in tokens.aminmax())
        if lowest < 0 or highest >= self.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(
                f"The data holds token {wrong}, and the model has {self.vocab_size} (padded_vocab_size): it was made with another tokenizer, or is "
                f"damaged. `python -m tools.datasets.verify PREFIX --vocab-size {self.vocab_size}` says where."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sender:
    """Places to a batch in one piece, or to the sentence that says why there is none."""

    make: _Maker

    def __call__(self, places: list[int]) -> Packet[Batch | ValueError]:
        try:
            return Packet.of(self.make(places))
        except ValueError as error:
            return Packet.of(error)

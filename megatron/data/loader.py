"""Micro-batches of one data-parallel rank, from any sample of a run on.

Step k always consumes the samples ``k * TBS`` to ``(k + 1) * TBS``, however they are spread over micro-batches, ranks and
accumulation: each global micro-batch is a run of consecutive samples, and rank r takes the r-th slice of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron.data.batch import Batch
from megatron.data.gpt_dataset import Sample, SampleDataset
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
        num_workers: int = 0,
        pinned: bool = False,
    ) -> None:
        """``consumed_samples``: by all ranks, since the start of the run. ``passes`` over the data, each in the same order
        (`train_epochs`); None: without end. ``masked_id`` and ``document_end_id``: see `Batch.from_rows`. ``num_workers``:
        processes that read ahead; 0 reads in this one. ``pinned``: in memory from which a CUDA device copies while the process goes on.
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
        self._collate = _Collate(pattern=pattern, masked_id=masked_id, document_end_id=document_end_id)
        self._num_workers = num_workers
        self._pinned = pinned

    def __iter__(self) -> Iterator[Batch]:
        """Batches until the data ends; asking for one more is an error that says so."""
        travels = self._num_workers > 0 or self._pinned
        batches: DataLoader = DataLoader(
            _Rows(self.dataset),
            batch_sampler=self.places,
            collate_fn=_Packed(self._collate) if travels else self._collate,
            num_workers=self._num_workers,
            pin_memory=self._pinned,
        )
        for batch in batches:
            yield batch.open() if travels else batch
        passes = self.places.passes
        raise ValueError(
            f"The data ran out: all whole batches of its {self.places.num_samples} samples were read "
            f"{'once' if passes == 1 else f'{passes} times'}. Give more data, train for fewer iterations, or set train_epochs."
        )


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Collate:
    """Rows to a batch. An object and not a closure, so that worker processes can be sent it."""

    pattern: AttentionPattern
    masked_id: int | None
    document_end_id: int | None

    def __call__(self, rows: list[Sample]) -> Batch:
        text = torch.from_numpy(np.stack([row["text"] for row in rows]))
        labels = [row["label"] for row in rows if "label" in row]
        if labels and len(labels) != len(rows):
            raise ValueError("Some data sets of the blend have label files and some have none: give label_data_paths for all of them.")
        label = torch.from_numpy(np.stack(labels)) if labels else None
        return Batch.from_rows(text, self.pattern, label=label, masked_id=self.masked_id, document_end_id=self.document_end_id)


@dataclass(frozen=True, slots=True)
class _Packed:
    """Rows to a batch in one piece."""

    collate: _Collate

    def __call__(self, rows: list[Sample]) -> Packet[Batch]:
        return Packet.of(self.collate(rows))


class _Rows(Dataset[Sample]):
    """The data set as torch wants one."""

    def __init__(self, dataset: SampleDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, place: int) -> Sample:
        return self.dataset[place]

"""Which samples a run reads: of the training data from where it stands, of the others the same for each evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.config.schema import Config
from megatron.data.batch import Batch
from megatron.data.build import Datasets, IndexBuilder, build_datasets, sample_counts
from megatron.data.gpt_dataset import SampleDataset
from megatron.data.loader import BatchLoader
from megatron.data.tokenizer import Tokenizer
from megatron.parallel.collectives import barrier
from megatron.parallel.mesh import Mesh
from megatron.training.progress import Progress
from megatron.training.random_state import quietly_started


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """The data sets of a run, and the batches of this process."""

    config: Config
    mesh: Mesh
    datasets: Datasets
    end_of_document: int

    @classmethod
    def open(cls, config: Config, mesh: Mesh, tokenizer: Tokenizer, *, start: Progress = Progress()) -> RunData:
        """The data sets that the configuration names, for a run that begins at ``start``. All processes call this together."""
        training = config.training
        builder = IndexBuilder.of_rank(
            rank=mesh.rank, local_rank=mesh.local_rank, use_shared_fs=config.data.use_shared_fs, barrier=lambda: barrier(mesh)
        )
        counts = sample_counts(
            train_iters=training.train_iters,
            eval_interval=training.eval_interval,
            eval_iters=training.eval_iters,
            train_batch_size=config.batch.train_batch_size,
            iteration=start.iteration,
            consumed_samples=start.consumed_samples,
        )
        datasets = build_datasets(config.data, seq_length=config.model.seq_length, samples=counts, seed=training.seed, builder=builder)
        if datasets.train is None and training.train_iters != 0:
            raise ValueError("There is nothing to train on: split leaves the training part no document.")
        return cls(config=config, mesh=mesh, datasets=datasets, end_of_document=tokenizer.eod_id)

    @property
    def document_end_id(self) -> int | None:
        """After which token attention and positions start anew. None: after none."""
        return self.end_of_document if self.config.attention.reset_at_document_end else None

    @property
    def train_iters(self) -> int:
        """Steps of the whole run: `train_iters`, or as many whole ones as `train_epochs` passes over the data yield."""
        training, batch = self.config.training, self.config.batch
        if training.train_iters is not None:
            return training.train_iters
        assert training.train_epochs is not None
        assert self.datasets.train is not None
        per_pass = len(self.datasets.train) // (batch.train_micro_batch_size_per_gpu * self.mesh.data.size)
        return per_pass * training.train_epochs // batch.gradient_accumulation_steps

    def training(self, *, consumed_samples: int) -> Iterator[Batch]:
        """This process's micro-batches from there on."""
        assert self.datasets.train is not None
        passes = self.config.training.train_epochs or 1
        return self._batches(self.datasets.train, first=consumed_samples, passes=passes, num_workers=self.config.data.num_workers)

    def evaluation(self, dataset: SampleDataset, *, place: int) -> tuple[Iterator[Batch], int]:
        """This process's micro-batches of the ``place``-th evaluation (from 0) and their number.

        Each evaluation has samples of its own, which depend on nothing but its place; they come round again where the data is
        too small for that.
        """
        size = self.config.batch.train_batch_size
        steps = min(self.config.training.eval_iters, dataset.num_readable // size)
        if steps == 0:
            return iter(()), 0
        places = dataset.num_readable // (steps * size)
        first = place % places * steps * size
        return self._batches(dataset, first=first, passes=1, num_workers=0), steps * self.config.batch.gradient_accumulation_steps

    def _batches(self, dataset: SampleDataset, *, first: int, passes: int, num_workers: int) -> Iterator[Batch]:
        loader = BatchLoader(
            dataset,
            self.config.attention.prefill,
            micro_batch_size=self.config.batch.train_micro_batch_size_per_gpu,
            data_parallel_rank=self.mesh.data.rank,
            data_parallel_size=self.mesh.data.size,
            consumed_samples=first,
            passes=passes,
            masked_id=self.end_of_document if self.config.data.eod_mask_loss else None,
            document_end_id=self.document_end_id,
            vocab_size=self.config.model.padded_vocab_size,
            num_workers=num_workers,
            pinned=self.mesh.device.type == "cuda",
        )
        return quietly_started(loader, self.mesh.device)


class Timed:
    """An iterator of micro-batches that knows how long it was waited for."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._waited_s = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        asked = time.perf_counter()
        batch = next(self._batches)
        self._waited_s += time.perf_counter() - asked
        return batch

    def take_waited_s(self) -> float:
        """Seconds waited since the last call of this."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

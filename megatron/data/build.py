"""From the `data_path` keys of a run to its training, validation and test samples."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from megatron.config.schema import DataConfig
from megatron.data.blend import BlendedDataset, normalised, samples_of_parts, split_bounds, weights_by_num_documents
from megatron.data.block_cache import BlockCache
from megatron.data.gpt_dataset import GPTDataset, SampleDataset
from megatron.data.indexed import IndexedDataset
from megatron.data.packing import SampleRequest

log = logging.getLogger(__name__)
D = TypeVar("D", bound=SampleDataset)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleCounts:
    """Samples that a run reads of each split. None: one pass over the data (`train_epochs`)."""

    train: int | None
    valid: int | None
    test: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Datasets:
    """None: that split has no data, or none of it is asked for."""

    train: SampleDataset | None
    valid: SampleDataset | None
    test: SampleDataset | None


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexBuilder:
    """Who builds the index arrays that all ranks read, and how the others wait for it."""

    is_builder: bool = True
    """Of arrays that lie beside the data."""
    is_node_builder: bool = True
    """Of arrays that lie in a node's cache, because the data is remote."""
    barrier: Callable[[], None] = lambda: None

    @classmethod
    def of_rank(cls, *, rank: int, local_rank: int, use_shared_fs: bool, barrier: Callable[[], None]) -> IndexBuilder:
        """The first rank builds, or the first of each node where nodes do not share the folder of the data."""
        return cls(is_builder=(rank if use_shared_fs else local_rank) == 0, is_node_builder=local_rank == 0, barrier=barrier)


def sample_counts(
    *, train_iters: int | None, eval_interval: int, eval_iters: int, train_batch_size: int, iteration: int = 0, consumed_samples: int = 0
) -> SampleCounts:
    """What a run of ``train_iters`` steps reads: every evaluation counts, with one more after the last step.

    A run that goes on from ``iteration`` has read ``consumed_samples`` before, by steps that may have been of another size.
    """
    if train_iters is None:
        return SampleCounts(train=None, valid=None, test=None)
    train = consumed_samples + max(0, train_iters - iteration) * train_batch_size
    evaluations = train_iters // eval_interval + 1
    return SampleCounts(train=train, valid=evaluations * eval_iters * train_batch_size, test=eval_iters * train_batch_size)


def build_datasets(data: DataConfig, *, seq_length: int, samples: SampleCounts, seed: int, builder: IndexBuilder | None = None) -> Datasets:
    """The samples of every split. All ranks call this with the same arguments but ``builder``."""
    recipe = _Recipe(data=data, seq_length=seq_length, seed=seed, builder=builder or IndexBuilder())
    if data.data_path is not None:
        return recipe.split_file(data.data_path, samples)
    if not data.train_data_paths:
        raise ValueError("Neither data_path nor train_data_paths is set: name the token files to train on.")
    train = recipe.blend("train", data.train_data_paths, data.train_label_data_paths, data.train_data_weights, samples.train)
    valid = recipe.blend("valid", data.valid_data_paths, data.valid_label_data_paths, data.valid_data_weights, samples.valid)
    test = recipe.blend("test", data.test_data_paths, data.test_label_data_paths, data.test_data_weights, samples.test)
    return Datasets(train=train, valid=valid, test=test)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    data: DataConfig
    seq_length: int
    seed: int
    builder: IndexBuilder

    def file(self, prefix: str) -> IndexedDataset:
        return IndexedDataset(prefix, warmup=self.data.mmap_warmup, cache=BlockCache.of_user(limit_gb=self.data.remote_cache_gb))

    def split_file(self, prefix: str, samples: SampleCounts) -> Datasets:
        """`data_path`: documents of one file, cut in three by `split`."""
        tokens = self.file(prefix)
        bounds = split_bounds(self.data.split, len(tokens))

        def part(name: str, place: int, count: int | None) -> GPTDataset | None:
            if count == 0:
                return None
            if bounds[place] == bounds[place + 1]:
                log.warning("split %r leaves no document of %d for %s.", self.data.split, len(tokens), name)
                return None
            dataset = self.open(name, tokens, None, bounds[place], bounds[place + 1], count)
            return _enough(dataset, count, f"{prefix} ({name} documents {bounds[place]} to {bounds[place + 1]})")

        return Datasets(train=part("train", 0, samples.train), valid=part("valid", 1, samples.valid), test=part("test", 2, samples.test))

    def blend(
        self,
        name: str,
        prefixes: tuple[str, ...] | None,
        label_prefixes: tuple[str, ...] | None,
        weights: tuple[float, ...] | None,
        count: int | None,
    ) -> BlendedDataset | None:
        """`<name>_data_paths`: whole files, each with a weight. GPT-NeoX blends a single one too, and so do we."""
        if not prefixes or count == 0:
            return None
        files = [self.file(prefix) for prefix in prefixes]
        labels = self.label_files(name, len(files), label_prefixes)
        shares = self.weights(name, files, weights)
        counts = [None] * len(files) if count is None else samples_of_parts(shares, count)
        parts: list[SampleDataset] = []
        for place, (tokens, label, wanted) in enumerate(zip(files, labels, counts, strict=True)):
            if wanted == 0:
                raise ValueError(f"{name}_data_weights gives {tokens.prefix} no sample: leave it out of {name}_data_paths, or weigh it more.")
            parts.append(self.open(f"{name}_{place}", tokens, label, 0, len(tokens), wanted))
        return _enough(BlendedDataset(parts, shares, num_samples=count or 0), count, f"{name}_data_paths")

    def weights(self, name: str, files: list[IndexedDataset], weights: tuple[float, ...] | None) -> list[float]:
        if self.data.weight_by_num_documents:
            return weights_by_num_documents([len(tokens) for tokens in files], alpha=self.data.weighted_sampler_alpha)
        if weights is not None and len(weights) != len(files):
            raise ValueError(f"{name}_data_weights has {len(weights)} entries and {name}_data_paths {len(files)}: give one weight for each path.")
        return normalised(weights or [1.0] * len(files))

    def label_files(self, name: str, count: int, prefixes: tuple[str, ...] | None) -> list[IndexedDataset | None]:
        if prefixes is None:
            return [None] * count
        if len(prefixes) != count:
            raise ValueError(f"{name}_label_data_paths has {len(prefixes)} entries and {name}_data_paths {count}: give one label file for each path.")
        return [self.file(prefix) for prefix in prefixes]

    def open(self, name: str, tokens: IndexedDataset, labels: IndexedDataset | None, first: int, last: int, count: int | None) -> GPTDataset:
        request = SampleRequest(
            first_document=first,
            last_document=last,
            seq_length=self.seq_length,
            num_samples=count,
            num_epochs=1 if count is None else None,
            seed=self.seed,
            pack_impl=self.data.pack_impl,
            allow_chopped=self.data.allow_chopped,
        )
        is_builder = self.builder.is_node_builder if tokens.is_remote else self.builder.is_builder
        try:
            return GPTDataset.open(tokens, name, request, labels=labels, is_builder=is_builder, barrier=self.builder.barrier)
        except ValueError as error:
            raise ValueError(f"{tokens.prefix}: {error}") from error


def _enough(dataset: D, count: int | None, name: str) -> D:
    """The data set, if the run never asks it for more than it has."""
    if count is not None and dataset.num_readable < count:
        raise ValueError(
            f"{name} yields {dataset.num_readable} samples before one of its files runs out, and the run reads {count}: "
            "use weights nearer to the sizes of the files, or fewer iterations."
        )
    return dataset

"""What a training step reads: its samples, the documents that they are cut from, and their text.

    python -m tools.datasets.step_contents your.yml --step 1000 --tokenizer
    python -m tools.datasets.step_contents checkpoints/mine --step 1000 --rank 3 --json

Give a run's YAML files as to deepy.py, or a checkpoint folder of it, whose saved configuration and number of devices then count. Step K, from 0
on, leads from iteration K to K + 1: the first that a run goes on with after loading global_stepK, and the one that its log calls K + 1.
The samples of a whole step depend on its batch size alone; which rank reads which depends on the number of devices.

The sample index is taken from beside the data, or built and kept there, as a run would.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.config.keys import canonical
from megatron.config.loader import load_config, parse_override
from megatron.config.schema import Config
from megatron.data.blend import BlendedDataset
from megatron.data.build import build_datasets, sample_counts
from megatron.data.gpt_dataset import GPTDataset, SampleDataset, read_samples
from megatron.data.loader import BatchLoader
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.launch.arguments import config_paths
from megatron.training.manifest import MANIFEST, Manifest
from megatron.training.progress import Progress
from megatron.training.weights import saved_config_files, saved_overrides, step_directory
from tools.command import exit_status
from tools.datasets.pairs import document_of, ids_text, text_of
from tools.sepllm.vocabulary import open_tokenizer

OF_THE_RUN = "the run's"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A stretch of a document."""

    document: int
    sequence: int
    """The same as the document unless documents have several sequences."""
    first_token: int
    """Of the sequence."""
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSample:
    """A sample that a step reads."""

    place: int
    """Among all samples of the run, in the order they are read."""
    rank: int
    """Data-parallel rank that reads it."""
    micro_batch: int
    """Of the step, from 0 on."""
    pair: str
    """Prefix of the token file."""
    sources: tuple[Source, ...]
    """In order. The last token is only a label here; packed samples begin with the last token of the one before in their stream."""
    ids: NDArray[np.int64]
    """``[seq_length + 1]``"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRun:
    """A configuration, and where its checkpoint stands if it came out of one."""

    config: Config
    progress: Progress = Progress()

    def consumed_samples(self, step: int) -> int:
        """Samples that the run has read before a step. A checkpoint knows those before it; afterwards every step reads a whole batch."""
        size = self.config.batch.train_batch_size
        if step < self.progress.iteration and self.progress.consumed_samples != self.progress.iteration * size:
            raise ValueError(
                f"This checkpoint of iteration {self.progress.iteration} has read {self.progress.consumed_samples} samples, no multiple of its batch "
                f"size {size}, so the run began with another: give a checkpoint from before step {step}."
            )
        return self.progress.consumed_samples + (step - self.progress.iteration) * size


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)

    def report() -> None:
        run = open_run(options.configs, folder=options.conf_dir, overrides=dict(map(parse_override, options.set)), devices=options.devices)
        tokenizer = _tokenizer(options.tokenizer, run.config)
        samples = step_samples(run, options.step, rank=options.rank)
        shown = itertools.islice(samples, options.most)
        if options.json:
            for sample in shown:
                print(json.dumps(_as_json(sample, options.step, tokenizer), ensure_ascii=False))
            return
        size = run.config.batch.train_batch_size
        first = run.consumed_samples(options.step)
        print(f"step {options.step} (iteration {options.step + 1} of the log): samples {first} to {first + size - 1} of the run")
        for sample in shown:
            print(_as_text(sample, tokenizer))

    return exit_status(report)


def open_run(names: Sequence[str], *, folder: str = "", overrides: Mapping[str, object] | None = None, devices: int | None = None) -> SavedRun:
    """The run of these YAML files, or of one checkpoint folder. ``devices``: by default the checkpoint's number, else one."""
    changes = {canonical(key): value for key, value in (overrides or {}).items()}
    if len(names) != 1 or not Path(names[0]).is_dir():
        return SavedRun(config=load_config(config_paths(names, folder), overrides=changes, world_size=devices or 1))
    step = step_directory(names[0])
    files = saved_config_files(step)
    if not files:
        raise ValueError(f"{step} has no configs/ folder: give the run's YAML files instead.")
    manifest = Manifest.model_validate_json((step / MANIFEST).read_text(encoding="utf-8")) if (step / MANIFEST).is_file() else None
    saved = {canonical(key): value for key, value in saved_overrides(step).items()}
    config = load_config(files, overrides=saved | changes, world_size=devices or (manifest.world_size if manifest else 1))
    return SavedRun(config=config, progress=manifest.progress if manifest else Progress())


def step_samples(run: SavedRun, step: int, *, rank: int | None = None) -> Iterator[StepSample]:
    """The samples of a step in the order of the run, or those that one data-parallel rank reads. From the data sets and the loader of training."""
    config, batch = run.config, run.config.batch
    if step < 0 or (config.training.train_iters is not None and step >= config.training.train_iters):
        last = "" if config.training.train_iters is None else f" to {config.training.train_iters - 1}"
        raise ValueError(f"--step is {step}, and the steps of the run count from 0{last}: give one of them.")
    if rank is not None and not 0 <= rank < batch.data_parallel_size:
        raise ValueError(
            f"--rank is {rank}, and the data-parallel ranks are 0 to {batch.data_parallel_size - 1}: give one of them, or say with --devices how "
            "many devices the run has."
        )
    first, dataset = run.consumed_samples(step), training_data(run)
    ranks = range(batch.data_parallel_size) if rank is None else (rank,)
    places = {reader: micro_batches(config, dataset, first=first, rank=reader) for reader in ranks}
    if any(len(batches) < batch.gradient_accumulation_steps for batches in places.values()):
        raise ValueError(f"--step is {step}, and the data ends before it: give an earlier step.")
    return (
        _sample(dataset, place, of_run=first + (turn * batch.data_parallel_size + reader) * len(row) + number, rank=reader, micro_batch=turn)
        for turn in range(batch.gradient_accumulation_steps)
        for reader in ranks
        for row in [places[reader][turn]]
        for number, place in enumerate(row)
    )


def training_data(run: SavedRun) -> SampleDataset:
    """The training samples of a run, built as the trainer builds them."""
    config, training = run.config, run.config.training
    counts = sample_counts(
        train_iters=training.train_iters,
        eval_interval=training.eval_interval,
        eval_iters=0,
        train_batch_size=config.batch.train_batch_size,
        iteration=run.progress.iteration,
        consumed_samples=run.progress.consumed_samples,
    )
    counts = replace(counts, valid=0, test=0)
    train = build_datasets(config.data, seq_length=config.model.seq_length, samples=counts, seed=training.seed).train
    if train is None:
        raise ValueError("This run trains on nothing: split leaves the training part no document, or train_iters is 0.")
    return train


def micro_batches(config: Config, dataset: SampleDataset, *, first: int, rank: int) -> list[list[int]]:
    """Places in the data set that a rank reads in the step that begins at the sample ``first``, by micro-batch."""
    loader = BatchLoader(
        dataset,
        config.attention.prefill,
        micro_batch_size=config.batch.train_micro_batch_size_per_gpu,
        data_parallel_rank=rank,
        data_parallel_size=config.batch.data_parallel_size,
        consumed_samples=first,
        passes=config.training.train_epochs or 1,
    )
    return list(itertools.islice(loader.places, config.batch.gradient_accumulation_steps))


def _sample(dataset: SampleDataset, place: int, *, of_run: int, rank: int, micro_batch: int) -> StepSample:
    ids = read_samples(dataset, [place]).text[0]
    part, row = dataset, place
    if isinstance(dataset, BlendedDataset):
        part, row = dataset.parts[int(dataset.part_of[place])], int(dataset.row_of[place])
    assert isinstance(part, GPTDataset)
    sources = tuple(
        Source(document=document_of(part.tokens, piece.sequence), sequence=piece.sequence, first_token=piece.offset, num_tokens=piece.length)
        for piece in part.pieces(row)
    )
    return StepSample(place=of_run, rank=rank, micro_batch=micro_batch, pair=part.tokens.prefix, sources=sources, ids=ids)


def _tokenizer(asked: str | None, config: Config) -> Tokenizer | None:
    if asked is None:
        return None
    return build_tokenizer(config.tokenizer) if asked == OF_THE_RUN else open_tokenizer(asked)


def _as_text(sample: StepSample, tokenizer: Tokenizer | None) -> str:
    sources = "; ".join(
        f"document {source.document}{f', sequence {source.sequence}' * (source.sequence != source.document)}, "
        f"tokens {source.first_token} to {source.first_token + source.num_tokens - 1}"
        for source in sample.sources
    )
    content = ids_text(sample.ids) if tokenizer is None else text_of(sample.ids, tokenizer)
    return f"\nsample {sample.place} (rank {sample.rank}, micro-batch {sample.micro_batch}) of {sample.pair}: {sources}\n{content}"


def _as_json(sample: StepSample, step: int, tokenizer: Tokenizer | None) -> dict[str, object]:
    ids: dict[str, object] = {"ids": sample.ids.tolist()}
    text: dict[str, object] = {} if tokenizer is None else {"text": text_of(sample.ids, tokenizer)}
    return {
        "step": step,
        "sample": sample.place,
        "rank": sample.rank,
        "micro_batch": sample.micro_batch,
        "pair": sample.pair,
        "sources": [asdict(source) for source in sample.sources],
        **ids,
        **text,
    }


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="tools.datasets.step_contents", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("configs", nargs="+", metavar="CONFIG", help="YAML files (.yml may be left out), or one checkpoint folder")
    flags.add_argument("-d", "--conf_dir", default="", metavar="DIR", help="folder of the YAML files")
    flags.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key, as deepy.py does")
    flags.add_argument("--devices", type=int, metavar="N", help="the run has so many (default: the checkpoint's number, else 1)")
    flags.add_argument("--step", type=int, required=True, metavar="K", help="counted from 0")
    flags.add_argument("--rank", type=int, metavar="R", help="only what this data-parallel rank reads (default: the whole step)")
    flags.add_argument("--most", type=int, metavar="COUNT", help="show at most so many samples")
    flags.add_argument(
        "--tokenizer", nargs="?", const=OF_THE_RUN, metavar="TOKENIZER", help="show text, by the run's tokenizer or the one named here (default: ids)"
    )
    flags.add_argument("--json", action="store_true", help="print one object a line")
    return flags


if __name__ == "__main__":
    sys.exit(main())

"""Whether the data loader keeps up: tokens a second that it delivers, beside what the fastest model here consumes.

    python -m tools.bench.loader --workers 0 1 2 --save

The loader reads a real token file (the demo's, made where it is not there yet), packs samples in GPT-NeoX's order and makes each
micro-batch's layout, in this process (0 workers) or in others. The model is the smallest of configs/size/ with the data's own vocabulary.
Both are measured alone, one after the other, with nothing of the one running during the other.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from megatron.config.schema import Config
from megatron.data.gpt_dataset import GPTDataset, read_samples
from megatron.data.indexed import IndexedDataset
from megatron.data.loader import BatchLoader
from megatron.data.packing import SampleRequest, build_index
from megatron.training.random_state import quietly_started
from tools.bench import report
from tools.bench.arms import ALL_ARMS, PRECISIONS, Trainee, config_of
from tools.bench.machine import describe
from tools.bench.text import DEMO_FOLDER
from tools.command import until_stopped
from tools.datasets import demo_corpus

WANTED = 20.0
"""Times what the model consumes."""
FEWEST_BATCHES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    workers: int
    first_batch_s: float
    """Until the first batch was there: starting the workers and opening the data."""
    tokens_per_s: float
    ratio: float
    """To what the model consumes."""
    batches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A token file and what a model needs to know of it."""

    dataset: GPTDataset
    separator_ids: tuple[int, ...]
    vocab_size: int


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    try:
        result, is_enough = run(arguments)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    report.deliver(result, arguments, "loader", arguments.model, f"s{arguments.seq_length}")
    return 0 if is_enough else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="tools.bench.loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--folder", type=Path, default=DEMO_FOLDER, help="as prepare_data.py demo makes it (default: %(default)s)")
    flags.add_argument("--model", default="14m", help="what consumes, a size of configs/size/ (default: %(default)s)")
    flags.add_argument("--seq-length", type=int, default=2048, metavar="S")
    flags.add_argument("--batch", type=int, default=4, help="rows of a micro-batch (default: %(default)s)")
    flags.add_argument("--window", type=int, default=64, help="n, the nearest keys that a query reads (default: %(default)s)")
    flags.add_argument("--dtype", choices=PRECISIONS, default="fp32", help="of the model (default: %(default)s)")
    flags.add_argument("--device", default="cpu", help="of the model (default: %(default)s)")
    flags.add_argument("--threads", type=int, default=2, help="of the model, on a CPU (default: %(default)s)")
    flags.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="processes that load (default: %(default)s)")
    flags.add_argument("--seconds", type=float, default=5, help="for each number of workers, and for the model (default: %(default)s)")
    return report.parsed(flags, argv)


def run(arguments: argparse.Namespace) -> tuple[report.Result, bool]:
    """The result, and whether the best loader delivers as much as is `WANTED`."""
    machine = describe(torch.device(arguments.device))
    source = open_source(arguments.folder, seq_length=arguments.seq_length, batch=arguments.batch)
    config = config_of(
        arguments.model,
        length=arguments.seq_length,
        window=arguments.window,
        batch=arguments.batch,
        dtype=arguments.dtype,
        separator_ids=source.separator_ids,
        vocab_size=source.vocab_size,
        device=arguments.device,
    )
    consumed = consumption(config, first_rows(source.dataset, arguments.batch), torch.device(arguments.device), seconds=arguments.seconds)
    rates = [delivery(source.dataset, config, workers=workers, seconds=arguments.seconds, consumed=consumed) for workers in arguments.workers]
    best = max(rate.ratio for rate in rates)
    is_enough = best >= WANTED
    verdict = f"The loader delivers {best:.0f}x what {arguments.model} consumes; {WANTED:.0f}x is wanted: {'' if is_enough else 'NOT '}reached."
    table = _table(rates, arguments, consumed)
    print(table.text(), verdict, sep="\n")
    result = report.Result(
        header={**machine.as_dict(), "command": arguments.command, "data": source.dataset.tokens.prefix, "model_tokens_per_s": consumed},
        body={"rows": [asdict(rate) for rate in rates]},
        tables=[table],
        notes=[verdict],
        title=f"Data loader beside {arguments.model}: {machine.title()}",
        picture=None,
    )
    return result, is_enough


def _table(rates: Sequence[Rate], arguments: argparse.Namespace, consumed: float) -> report.Table:
    consumer = f"{arguments.model} by {arguments.threads} threads consumes {consumed:,.0f} tokens/s"
    return report.Table(
        title=f"S = {arguments.seq_length}, {arguments.batch} rows; {consumer}.",
        columns=("workers", "", "first batch s", "tokens/s", "to the model", "batches"),
        rows=[
            (str(rate.workers), "", f"{rate.first_batch_s:.2f}", f"{rate.tokens_per_s:,.0f}", f"{rate.ratio:.0f}x", str(rate.batches))
            for rate in rates
        ],
    )


def open_source(folder: Path, *, seq_length: int, batch: int) -> Source:
    """The demo's training tokens, cut into samples; the folder is made where it is not there."""
    if not (folder / "data.json").exists():
        print(f"Making {folder} (as prepare_data.py demo does) ...", flush=True)
        demo_corpus.build([*demo_corpus.shakespeare(), *demo_corpus.king_james()], folder)
    facts = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    tokens = IndexedDataset(folder / "train")
    request = SampleRequest(first_document=0, last_document=len(tokens), seq_length=seq_length, num_samples=4 * batch, seed=1234)
    dataset = GPTDataset(tokens, build_index(request, tokens.sizes), seq_length=seq_length)
    return Source(dataset=dataset, separator_ids=tuple(facts["separator_token_ids"]), vocab_size=facts["vocab_size"])


def first_rows(dataset: GPTDataset, count: int) -> Tensor:
    return torch.from_numpy(read_samples(dataset, range(count)).text)


def consumption(config: Config, text: Tensor, device: torch.device, *, seconds: float) -> float:
    """Tokens a second of SepLLM's training step on rows that are there, by the median step."""
    trainee = Trainee(ALL_ARMS["sepllm"], config, device)
    trainee.step(text)
    elapsed: list[float] = []
    while sum(elapsed) < seconds or len(elapsed) < 3:
        elapsed.append(trainee.step(text).total_s)
    return config.model.seq_length * len(text) / median(elapsed)


def delivery(dataset: GPTDataset, config: Config, *, workers: int, seconds: float, consumed: float) -> Rate:
    """What the loader delivers, with the first batch's wait apart."""
    pattern, batch = config.attention.prefill, config.batch.train_micro_batch_size_per_gpu
    loader = BatchLoader(dataset, pattern, micro_batch_size=batch, passes=None, num_workers=workers)
    start = time.perf_counter()
    batches = quietly_started(loader, torch.device("cpu"))
    next(batches)
    first = time.perf_counter()
    count = 0
    while (elapsed := time.perf_counter() - first) < seconds or count < FEWEST_BATCHES:
        next(batches)
        count += 1
    tokens_per_s = count * batch * dataset.seq_length / elapsed
    return Rate(workers=workers, first_batch_s=first - start, tokens_per_s=tokens_per_s, ratio=tokens_per_s / consumed, batches=count)


if __name__ == "__main__":
    sys.exit(until_stopped(main))

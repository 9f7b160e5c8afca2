"""What a generated token costs with a SepCache and with transformers' DynamicCache, in time and in bytes of keys and values.

    python -m tools.bench.decoding --lengths 1024 2048 4096 8192 16384 32768 --save

Two models of the same random weights: one as transformers has it, with a DynamicCache; one attached to, with a SepCache. Both read the same
text up to a length, then take turns of a few generated tokens each, so that what else runs on the machine slows both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.cache_utils import Cache

from sepllm.hf import SepCache, attach
from tools.bench import report
from tools.bench.machine import describe
from tools.bench.measure import clock_s
from tools.command import exit_status

CHUNK = 512
"""Tokens of the text that are read at once."""
VOCABULARY, SEPARATORS = 1024, range(9)
SEPARATOR_SHARE = 0.14
"""Of English text in Pythia's tokenizer."""
WARM_UP = 4
"""Tokens that are generated before those that are timed."""
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Both arms after a text of so many tokens."""

    seq_length: int
    dynamic_ms: float
    """Median of a generated token."""
    sep_ms: float
    ratio: float
    """How many times faster the SepCache is: median over the turns of the ratio inside a turn."""
    ratio_low: float
    ratio_high: float
    """Over turns, 10 and 90 %."""
    dynamic_bytes: int
    """Keys and values of all layers, mean over the generated tokens."""
    sep_bytes: int
    sep_allocated_bytes: int
    """The most that is set aside for them."""


class Arm:
    """A model in the middle of a text."""

    def __init__(self, model: GPTNeoXForCausalLM, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self._next = torch.zeros(1, 1, dtype=torch.int64, device=model.device)

    @torch.inference_mode()
    def read(self, ids: Tensor) -> None:
        """The text goes on with ``ids [1, T]``."""
        for chunk in ids.split(CHUNK, 1):
            self._step(chunk)

    @torch.inference_mode()
    def generate(self, count: int) -> tuple[float, list[int]]:
        """Seconds of a token, and the bytes of keys and values after each."""
        held, start_s = [], clock_s(self.model.device)
        for _ in range(count):
            self._step(self._next)
            held.append(stored_bytes(self.cache))
        return (clock_s(self.model.device) - start_s) / count, held

    def _step(self, ids: Tensor) -> None:
        logits = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self._next = logits[:, -1:].argmax(-1)


def stored_bytes(cache: Cache) -> int:
    """Of the keys and values that later tokens may read, in all layers."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: run(parse(argv)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="tools.bench.decoding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lengths = [1024, 2048, 4096, 8192, 16384, 32768]
    flags.add_argument(
        "--lengths", type=int, nargs="+", default=lengths, metavar="S", help="tokens before those that are timed (default: %(default)s)"
    )
    flags.add_argument(
        "--equal-lengths",
        type=int,
        nargs="*",
        default=[512, 2048],
        metavar="S",
        help="tokens, likewise, of texts from which the SepCache drops nothing (default: %(default)s)",
    )
    flags.add_argument("--layers", type=int, default=4, help="of the model (default: %(default)s)")
    flags.add_argument("--hidden", type=int, default=256, help="size of the model, in heads of 64 (default: %(default)s)")
    flags.add_argument(
        "--cache", type=int, nargs=4, default=[4, 128, 256, 512], metavar=("A", "S", "W", "C"), help="SepCache's sizes (default: %(default)s)"
    )
    flags.add_argument("--turns", type=int, default=8, help="of each arm at each length (default: %(default)s)")
    flags.add_argument("--tokens", type=int, default=32, help="that are generated in a turn (default: %(default)s)")
    flags.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    flags.add_argument("--threads", type=int, default=1, help="of a CPU (default: %(default)s)")
    return report.parsed(flags, argv, draws=True)


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    machine = describe(device)
    first, second = make_model(arguments, device), make_model(arguments, device)
    with attach(second):
        rows = measured_at(arguments.lengths, (Arm(first, DynamicCache()), Arm(second, make_cache(arguments))), arguments)
        large = make_cache(arguments, total=_longest(arguments))
        equal_rows = measured_at(arguments.equal_lengths, (Arm(first, DynamicCache()), Arm(second, large)), arguments)
    result = as_result(rows, equal_rows, arguments, machine.as_dict(), title=f"Decoding with a SepCache and a DynamicCache: {machine.title()}")
    print("", *(table.text() for table in result.tables), sep="\n")
    report.deliver(result, arguments, "decoding")


def make_model(arguments: argparse.Namespace, device: torch.device) -> GPTNeoXForCausalLM:
    """The same one every time."""
    if arguments.hidden % 64:
        raise ValueError(f"--hidden is {arguments.hidden}: it must be a multiple of 64, the size of a head.")
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        intermediate_size=4 * arguments.hidden,
        max_position_embeddings=_longest(arguments),
    )
    return GPTNeoXForCausalLM(config).to(device).eval()


def make_cache(arguments: argparse.Namespace, *, total: int | None = None) -> SepCache:
    """With ``total`` instead of the ``c`` that was asked for."""
    initial, separators, local, asked_for = arguments.cache
    return SepCache(
        init_cache_size=initial,
        sep_cache_size=separators,
        local_size=local,
        cache_size=total or asked_for,
        USE_MAX_SEP_CACHE=True,
        compress_prefill=True,
        layer_num=arguments.layers,
        separator_token_ids=SEPARATORS,
        PADDING_ID=-1,
    )


def random_text(length: int) -> Tensor:
    """``[1, length]`` int64, with as many separators as English has."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(len(SEPARATORS), VOCABULARY, (1, length), generator=generator)
    separators = torch.randint(0, len(SEPARATORS), (1, length), generator=generator)
    return torch.where(torch.rand(1, length, generator=generator) < SEPARATOR_SHARE, separators, words)


def measured_at(lengths: Sequence[int], arms: tuple[Arm, Arm], arguments: argparse.Namespace) -> list[Row]:
    """A row for each length of one text, shortest first."""
    rows: list[Row] = []
    text, read = random_text(max(lengths, default=0)).to(arguments.device), 0
    for length in sorted(lengths):
        for arm in arms:
            arm.read(text[:, read:length])
        read = length
        rows.append(measured(arms, length, arguments))
        print(asdict(rows[-1]), flush=True)
    return rows


def measured(arms: tuple[Arm, Arm], length: int, arguments: argparse.Namespace) -> Row:
    """What a token costs after ``length`` tokens. The tokens that are generated join the text."""
    for arm in arms:
        arm.generate(WARM_UP)
    seconds: list[tuple[float, float]] = []
    held: tuple[list[int], list[int]] = ([], [])
    allocated = 0
    for _ in range(arguments.turns):
        taken = []
        for arm, sizes in zip(arms, held, strict=True):
            elapsed_s, stored = arm.generate(arguments.tokens)
            taken.append(elapsed_s)
            sizes.extend(stored)
        seconds.append((taken[0], taken[1]))
        allocated = max(allocated, sum(layer.num_allocated_bytes for layer in arms[1].cache.layers))
    ratios = [dynamic / sep for dynamic, sep in seconds]
    return Row(
        seq_length=length,
        dynamic_ms=1000 * median(dynamic for dynamic, _ in seconds),
        sep_ms=1000 * median(sep for _, sep in seconds),
        ratio=median(ratios),
        ratio_low=float(np.quantile(ratios, 0.1)),
        ratio_high=float(np.quantile(ratios, 0.9)),
        dynamic_bytes=round(sum(held[0]) / len(held[0])),
        sep_bytes=round(sum(held[1]) / len(held[1])),
        sep_allocated_bytes=allocated,
    )


def as_result(
    rows: Sequence[Row], equal_rows: Sequence[Row], arguments: argparse.Namespace, machine: dict[str, object], *, title: str
) -> report.Result:
    table = report.Table(
        title="A generated token after so many: tokens per second, and MiB of keys and values. The ratio is the median over turns (10 and 90 %).",
        columns=("tokens", "", "DynamicCache /s", "SepCache /s", "times faster", "DynamicCache MiB", "SepCache MiB", "allocated MiB"),
        rows=[
            (
                str(row.seq_length),
                "",
                f"{1000 / row.dynamic_ms:.1f}",
                f"{1000 / row.sep_ms:.1f}",
                f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})",
                f"{row.dynamic_bytes / MIB:.2f}",
                f"{row.sep_bytes / MIB:.2f}",
                f"{row.sep_allocated_bytes / MIB:.2f}",
            )
            for row in rows
        ],
    )
    equal = report.Table(
        title="The same while nothing is dropped, so that both hold equally many tokens: ms of a generated token.",
        columns=("tokens", "", "DynamicCache ms", "SepCache ms", "times faster"),
        rows=[
            (str(row.seq_length), "", f"{row.dynamic_ms:.2f}", f"{row.sep_ms:.2f}", f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})")
            for row in equal_rows
        ],
    )
    panels = [
        report.Panel(title="time of a token", unit="ms", curves=_curves(rows, "dynamic_ms", "sep_ms")),
        report.Panel(title="keys and values", unit="bytes", curves=_curves(rows, "dynamic_bytes", "sep_bytes")),
    ]
    return report.Result(
        header={
            **machine,
            "command": arguments.command,
            "model": f"GPT-NeoX, {arguments.layers} layers of {arguments.hidden}",
            "sep_cache": arguments.cache,
        },
        body={"rows": [asdict(row) for row in rows], "equal_rows": [asdict(row) for row in equal_rows]},
        tables=[table, equal] if equal_rows else [table],
        notes=[],
        title=title,
        picture=partial(report.draw, panels, title),
    )


def _longest(arguments: argparse.Namespace) -> int:
    """More tokens than any text will have."""
    lengths = [*arguments.lengths, *arguments.equal_lengths]
    return max(lengths) + len(lengths) * (arguments.turns * arguments.tokens + WARM_UP) + sum(arguments.cache)


def _curves(rows: Sequence[Row], dynamic: str, sep: str) -> list[report.Curve]:
    names = (("DynamicCache", dynamic, True), ("SepCache", sep, False))
    return [
        report.Curve(label=label, points={row.seq_length: getattr(row, name) for row in rows}, family=label, is_baseline=is_baseline)
        for label, name, is_baseline in names
    ]


if __name__ == "__main__":
    sys.exit(main())

"""Plan a run for machines that are not here: memory, communication, expected time, and the layout that suits them.

    python -m tools.plan -d configs size/1.4b method/sepllm-n64 run/pile --vocab-size 50277 --gpus 8 64 --hardware h100
    python -m tools.plan --table --gpus 1 8 64 512 4096 --hardware h100

First the layout as configured, then the fastest that fits of all pipeline x tensor x context x data layouts, with what the next ones lose.
Nothing is started and no GPU is needed. Only `--hardware cpu` measures anything: this machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

from megatron.config.loader import ConfigError, load_config, parse_override
from megatron.config.schema import Config
from megatron.launch.arguments import config_paths
from megatron.launch.kept import expected_kept_ratio
from tools.command import exit_status
from tools.plan import report
from tools.plan.cost import Text, estimate
from tools.plan.hardware import NAMES, Hardware, hardware_named
from tools.plan.search import search

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = ("160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
PYTHIA_VOCAB = 50277
SHARE = 0.115
"""Separators of the Pile, as the paper's Table 3 implies (`python -m tools.sepllm.flops`)."""
FLAGS = tuple(field.name for field in fields(Hardware) if field.name not in ("name", "source"))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    return exit_status(lambda: run(arguments))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="tools.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("configs", nargs="*", metavar="CONFIG", help="the files of one run, as for deepy.py; .yml may be left out")
    flags.add_argument("-d", "--conf-dir", default="", metavar="DIR", help="folder of these files")
    flags.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key, as for deepy.py")
    flags.add_argument("--gpus", type=int, nargs="+", default=[8], metavar="N", help="numbers of devices (default: 8)")
    flags.add_argument("--hardware", choices=NAMES, default="h100", help="published figures; cpu: this machine, measured (default: %(default)s)")
    flags.add_argument("--separators", type=float, default=SHARE, metavar="SHARE", help="of the text's tokens (default: %(default)s, the Pile's)")
    flags.add_argument("--vocab-size", type=int, metavar="N", help="of the tokenizer, where its file is not here (Pythia's: 50277)")
    flags.add_argument("--table", action="store_true", help="a Markdown table of the Pythia sizes under SepLLM instead")
    flags.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES, help="of the table (default: all)")
    for name in FLAGS:
        kind = int if name == "devices_per_node" else float
        flags.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help="instead of the hardware's own")
    arguments = flags.parse_args(argv)
    if bool(arguments.configs) == arguments.table:
        flags.error("give the configurations of one run, or --table.")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    if min(arguments.gpus) < 1:
        raise ValueError(f"--gpus {min(arguments.gpus)}: give 1 or more.")
    if not 0 <= arguments.separators <= 1:
        raise ValueError(f"--separators {arguments.separators}: give a share from 0 to 1.")
    given = {name: getattr(arguments, name) for name in FLAGS if getattr(arguments, name) is not None}
    hardware = replace(hardware_named(arguments.hardware), **given)
    for line in table(arguments, hardware) if arguments.table else plans(arguments, hardware):
        print(line, flush=True)


def plans(arguments: argparse.Namespace, hardware: Hardware) -> Iterator[str]:
    """For every number of devices the layout as given and the one suggested."""
    for devices in arguments.gpus:
        config, mistake = load(arguments, hardware, devices)
        text = text_of(config, arguments.separators)
        if devices == arguments.gpus[0]:
            yield from report.heading(hardware, text)
        yield f"\n{devices} x {hardware.name}, {config.batch.train_batch_size:,} samples of {config.model.seq_length:,} tokens a step"
        if mistake is None:
            yield "as configured"
            yield from report.plan(estimate(config, hardware, text), hardware, text)
        else:
            yield f"as configured it does not divide: {mistake}"
        yield from report.suggestion(search(config, hardware, text, devices=devices), config, hardware, text)


def load(arguments: argparse.Namespace, hardware: Hardware, devices: int) -> tuple[Config, str | None]:
    """The run on so many devices. Where they do not divide, on the fewest on which it can be had, and the mistake."""
    paths = config_paths(arguments.configs, arguments.conf_dir)
    overrides = dict(map(parse_override, arguments.set))
    mistake: ConfigError | None = None
    for world_size in (devices, *(2**power for power in range(10))):
        try:
            config = load_config(
                paths,
                overrides=overrides,
                world_size=world_size,
                device="cpu" if hardware.name == "cpu" else "cuda",
                vocab_size=arguments.vocab_size,
            )
        except ConfigError as error:
            mistake = mistake or error
            continue
        if config.model.padded_vocab_size is None:
            raise ValueError("The size of the vocabulary is not known, as the tokenizer's file is not here: add --vocab-size (Pythia's is 50277).")
        return config, None if mistake is None else str(mistake)
    assert mistake is not None
    raise mistake


def text_of(config: Config, share: float) -> Text:
    return Text(share=share, kept_ratio=expected_kept_ratio(config.attention.prefill, config.model.seq_length, share=share))


def table(arguments: argparse.Namespace, hardware: Hardware) -> Iterator[str]:
    """The suggested layout of every size on every number of devices."""
    yield from report.TABLE_HEAD
    for size in arguments.sizes:
        paths = [CONFIGS / f"{name}.yml" for name in (f"size/{size}", "method/sepllm-n64", "run/pile")]
        config = load_config(paths, world_size=1, vocab_size=PYTHIA_VOCAB)
        text = text_of(config, arguments.separators)
        for devices in arguments.gpus:
            yield report.table_row(size, devices, search(config, hardware, text, devices=devices))


if __name__ == "__main__":
    sys.exit(main())

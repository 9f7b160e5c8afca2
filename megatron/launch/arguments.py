"""The command line of `deepy.py`, and that of a script started by hand."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.config.loader import parse_override

_SUFFIXES = (".yml", ".yaml", ".json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """What the user asked for."""

    script: str
    configs: tuple[Path, ...]
    overrides: dict[str, object]
    """YAML key, or `block.member`, to value: the flags that stand for a key, then every `--set`."""
    check: bool = False
    """Print the plan and start nothing."""
    devices: int | None = None
    """Plan for this many devices. None: for those that are there."""
    dry_run: bool = False
    """Print the command of each host and start nothing."""


def parse(argv: Sequence[str]) -> Arguments:
    """The arguments of `deepy.py SCRIPT CONFIG...`. Leaves with status 2 where they are wrong."""
    parser = argparse.ArgumentParser(prog="deepy.py", description="Start a script on every device that the configuration names.", allow_abbrev=False)
    parser.add_argument("script", help="train.py, generate.py, eval.py, or a script of your own")
    add_config_arguments(parser)
    parser.add_argument("--check", action="store_true", help="print the resolved plan and start nothing")
    parser.add_argument("--devices", type=int, metavar="N", help="with --check: plan for N devices, whatever is there")
    parser.add_argument("--dry-run", action="store_true", help="print the command of each host and start nothing")
    parser.add_argument(
        "--no-preflight", dest="no_ssh_check", action="store_const", const=True, help="the key no_ssh_check: do not ask other hosts before starting"
    )
    parser.add_argument("--autotuning", choices=["tune", "run"], help=argparse.SUPPRESS)
    given = parser.parse_intermixed_args(argv)
    if given.autotuning:
        parser.error("--autotuning is DeepSpeed's tuner, which this project does not support: choose the micro batch with --check and --set.")
    if given.devices is not None and (not given.check or given.devices < 1):
        parser.error("--devices N plans for N devices (1 or more) and goes with --check; what a job runs on, hostfile and num_gpus say.")
    return Arguments(
        script=given.script,
        configs=config_paths(given.configs, given.conf_dir),
        overrides=overrides_of(given, parser),
        check=given.check,
        devices=given.devices,
        dry_run=given.dry_run,
    )


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Names of configuration files, and the flags that change single keys."""
    parser.add_argument("configs", nargs="+" if required else "*", metavar="CONFIG", help="YAML files; .yml may be left out")
    parser.add_argument("-d", "--conf_dir", default="", metavar="DIR", help="folder of the configuration files")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key, or one member: fp16.enabled=false")
    for key in ("wandb_group", "wandb_run_name", "wandb_team", "eval_results_prefix"):
        parser.add_argument(f"--{key}", metavar="TEXT", help=f"the key {key}")
    parser.add_argument("--eval_tasks", nargs="+", metavar="TASK", help="the key eval_tasks")
    parser.add_argument("--iteration", type=int, metavar="N", help="which checkpoint of `load` to take")
    parser.add_argument("-H", "--hostfile", metavar="FILE", help="the key hostfile")
    parser.add_argument("-i", "--sample_input_file", metavar="FILE", help="the key sample_input_file")
    parser.add_argument("-o", "--sample_output_file", metavar="FILE", help="the key sample_output_file")


_KEY_FLAGS = (
    "wandb_group",
    "wandb_run_name",
    "wandb_team",
    "eval_results_prefix",
    "eval_tasks",
    "iteration",
    "hostfile",
    "sample_input_file",
    "sample_output_file",
    "no_ssh_check",
)


def overrides_of(given: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, object]:
    """The keys that the command line changes. A flag that was not given changes nothing."""
    overrides: dict[str, object] = {key: value for key in _KEY_FLAGS if (value := getattr(given, key, None)) is not None}
    for text in given.set:
        try:
            key, value = parse_override(text)
        except ValueError as mistake:
            parser.error(str(mistake))
        overrides[key] = value
    return overrides


def config_paths(names: Sequence[str], folder: str) -> tuple[Path, ...]:
    """The files of these names, `.yml` appended where no suffix of a configuration is there."""
    return tuple(Path(folder) / (name if name.endswith(_SUFFIXES) else f"{name}.yml") for name in names)

"""The configuration of a worker process, however it was started: by deepy, by torchrun or srun, or by hand."""

from __future__ import annotations

import argparse
import base64
import os
import sys
import zlib
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from megatron.config.loader import config_from_json, config_to_json
from megatron.config.schema import Config
from megatron.launch.arguments import add_config_arguments, config_paths, overrides_of
from megatron.launch.environment import prepare_worker
from megatron.launch.inputs import obstacles
from megatron.launch.loading import load
from megatron.launch.resources import computes_in_fp16, device_kind

_WORLD_SIZES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Where starters announce the number of processes. SLURM_NTASKS is also that of a shell in which nothing was started yet."""


def worker_config(argv: Sequence[str] | None = None, environ: MutableMapping[str, str] | None = None) -> Config:
    """What this process is to do. Call it before torch is imported: it also completes the environment.

    deepy hands over ``--config FILE`` or ``--config-base64 TEXT``, resolved. Otherwise the arguments are those of deepy without the
    script, resolved for as many devices as the starter has announced (one by default). Wrong ones end the process with status 2.
    """
    environ = os.environ if environ is None else environ
    parser = _parser()
    given = parser.parse_intermixed_args(sys.argv[1:] if argv is None else argv)
    try:
        config = _read(given, parser, environ)
    except (ValueError, OSError) as mistake:
        print(mistake, file=sys.stderr)
        raise SystemExit(2) from None
    prepare_worker(environ, device=config.runtime.device)
    return config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Run as one worker. `deepy.py` starts one on every device.")
    parser.add_argument("--config", metavar="FILE", help="a resolved configuration, as deepy writes it")
    parser.add_argument("--config-base64", metavar="TEXT", help="the same as one word")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    add_config_arguments(parser, required=False)
    return parser


def _read(given: argparse.Namespace, parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> Config:
    overrides = overrides_of(given, parser)
    resolved = given.config or given.config_base64
    if resolved and (given.configs or overrides):
        parser.error("--config and --config-base64 hold a resolved configuration: give no YAML files and change no keys beside them.")
    if given.config:
        return config_from_json(Path(given.config).read_text())
    if given.config_base64:
        return decode_config(given.config_base64)
    if not given.configs:
        parser.error("give configuration files: python train.py CONFIG..., or python deepy.py train.py CONFIG...")
    return _resolve(config_paths(given.configs, given.conf_dir), overrides, Path(parser.prog).name, environ)


def encode_config(config: Config) -> str:
    """The resolved configuration as one word for a command line."""
    return base64.urlsafe_b64encode(zlib.compress(config_to_json(config).encode(), 9)).decode()


def decode_config(text: str) -> Config:
    """The inverse of `encode_config`."""
    return config_from_json(zlib.decompress(base64.urlsafe_b64decode(text)).decode())


def _resolve(paths: Sequence[Path], overrides: Mapping[str, object], script: str, environ: Mapping[str, str]) -> Config:
    world_size = next((int(environ[name]) for name in _WORLD_SIZES if environ.get(name)), 1)
    device = device_kind(environ)
    config = load(paths, overrides=overrides, world_size=world_size, device=device, script=script).config
    found = obstacles(config, script=script, has_fp16=computes_in_fp16(device))
    if found:
        raise ValueError("\n".join(found))
    return config

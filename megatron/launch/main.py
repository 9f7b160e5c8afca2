"""`deepy.py`: read the configuration, count the devices, then print the plan or start the workers and wait."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence

from megatron.config.loader import LoadedConfig, load_launch
from megatron.launch import runner
from megatron.launch.arguments import Arguments, parse
from megatron.launch.inputs import obstacles
from megatron.launch.loading import load
from megatron.launch.plan import plan_text
from megatron.launch.resources import Resources, computes_in_fp16, device_kind, find_resources

BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status of the job; 2, and a sentence a mistake, where it cannot be started."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        return _check(arguments, os.environ) if arguments.check else _start(arguments, os.environ)
    except BrokenPipeError:  # of `deepy.py --check | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as mistake:
        print(mistake, file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:  # before there was a job
        return 128 + signal.SIGINT


def _check(arguments: Arguments, environ: Mapping[str, str]) -> int:
    if arguments.devices is None:
        resources = _resources(arguments, environ)
    else:
        resources = Resources(hosts={"these": tuple(range(arguments.devices))}, device=device_kind(environ))
    loaded = _load(arguments, resources)
    is_elsewhere = arguments.devices is not None
    has_fp16 = is_elsewhere or computes_in_fp16(resources.device)
    found = obstacles(loaded.config, script=arguments.script, has_fp16=has_fp16)
    print(plan_text(loaded.config, notes=loaded.notes, obstacles=found, where=_in_words(resources)), flush=True)
    return 0


def _start(arguments: Arguments, environ: Mapping[str, str]) -> int:
    script = runner.find_script(arguments.script)
    resources = _resources(arguments, environ)
    loaded = _load(arguments, resources)
    found = obstacles(loaded.config, script=arguments.script, has_fp16=computes_in_fp16(resources.device))
    job = runner.make_job(loaded.config, resources, script=script)
    if arguments.dry_run:
        print(runner.dry_run(job, environ))
        return 0
    if found:
        raise ValueError("\n".join(found))
    for note in loaded.notes:
        print(note, file=sys.stderr)
    return runner.run(job, environ)


def _resources(arguments: Arguments, environ: Mapping[str, str]) -> Resources:
    return find_resources(load_launch(arguments.configs, overrides=arguments.overrides), environ)


def _load(arguments: Arguments, resources: Resources) -> LoadedConfig:
    return load(arguments.configs, overrides=arguments.overrides, world_size=resources.world_size, device=resources.device, script=arguments.script)


def _in_words(resources: Resources) -> str:
    hosts = f" on {len(resources.hosts)} hosts" if len(resources.hosts) > 1 else ""
    return f"{resources.world_size} {resources.device}{hosts}"

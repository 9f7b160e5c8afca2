"""Starts the workers of a job and waits for them. Both ways go through DeepSpeed's launcher.

One host: its node launcher directly, so that Ctrl-C ends this job and nothing else (the multi-host runner ends every DeepSpeed
launcher of the machine). Several hosts, or `force_multi`: its runner, which starts the node launcher on each through pdsh, mpirun or srun.
"""

from __future__ import annotations

import base64
import ctypes
import json
import shlex
import signal
import socket
import subprocess
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron.config.loader import config_to_json
from megatron.config.schema import Config, LaunchConfig
from megatron.launch.environment import REPOSITORY, worker_variables
from megatron.launch.resources import Resources

DEFAULT_PORT = 29500
_LIBC = ctypes.CDLL(None)
LAUNCHERS = ("pdsh", "openmpi", "mpich", "impi", "mvapich", "slurm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A process to start, and what it needs."""

    command: tuple[str, ...]
    variables: dict[str, str]
    """Added to the environment."""
    files: dict[Path, str]
    """What must lie on this machine's disk before it starts."""
    ends_with_parent: bool = False
    """Whether it gets TERM when the process that started it is killed."""

    def __str__(self) -> str:
        """The command as one would type it."""
        return shlex.join([*(f"{name}={value}" for name, value in sorted(self.variables.items())), *self.command])


def make_job(config: Config, resources: Resources, *, script: Path, folder: Path, environ: Mapping[str, str]) -> Job:
    """The process that starts this script on these devices. ``folder`` is for its files and must outlive it."""
    local_size = max(len(slots) for slots in resources.hosts.values())
    variables = worker_variables(environ, device=resources.device, local_size=local_size)
    if is_local(config.launch, resources):
        config_file = folder / "config.json"
        command = local_command(config.launch, resources, script, config_file)
        return Job(command=command, variables=variables, files={config_file: config_to_json(config)}, ends_with_parent=True)
    if config.launch.launcher not in LAUNCHERS:
        raise ValueError(
            f"launcher {config.launch.launcher} does not start workers on other hosts: use one of {', '.join(LAUNCHERS)}, or start "
            f"`{script.name} CONFIG...` on each host yourself (torchrun, srun)."
        )
    exported = {name: value for name, value in variables.items() if name in ("PYTHONPATH", "DS_ACCELERATOR")}
    return Job(command=runner_command(config, resources, script), variables=exported, files={})


def is_local(launch: LaunchConfig, resources: Resources) -> bool:
    """Whether the workers are started on this machine, without ssh, mpirun or srun."""
    return len(resources.hosts) == 1 and not launch.force_multi


def local_command(launch: LaunchConfig, resources: Resources, script: Path, config_file: Path) -> tuple[str, ...]:
    """DeepSpeed's node launcher for the one host."""
    hosts = {host: list(slots) for host, slots in resources.hosts.items()}
    return (
        *(sys.executable, "-u", "-m", "deepspeed.launcher.launch"),
        f"--world_info={base64.urlsafe_b64encode(json.dumps(hosts).encode()).decode()}",
        f"--master_addr={launch.master_addr or '127.0.0.1'}",
        f"--master_port={_free_port(launch.master_port)}",
        *("--no_local_rank", "--log_level=warning"),
        *(str(script), "--config", str(config_file)),
    )


def runner_command(config: Config, resources: Resources, script: Path) -> tuple[str, ...]:
    """DeepSpeed's runner with the flags that differ from its defaults. The configuration travels on the command line: no shared disk is needed."""
    launch = config.launch
    flags: dict[str, object] = {
        "hostfile": resources.hostfile,
        "include": launch.include,
        "exclude": launch.exclude,
        "num_nodes": launch.num_nodes,
        "num_gpus": launch.num_gpus,
        "master_port": launch.master_port if launch.master_port != DEFAULT_PORT else None,
        "master_addr": launch.master_addr,
        "launcher": launch.launcher if launch.launcher != "pdsh" else None,
        "launcher_args": launch.launcher_args,
    }
    given = [f"--{name}={value}" for name, value in flags.items() if value is not None and value != ""]
    switches = [f"--{name}" for name in ("force_multi", "no_ssh_check") if getattr(launch, name)]
    return (
        *(sys.executable, "-u", "-m", "deepspeed.launcher.runner"),
        *given,
        *switches,
        *("--no_local_rank", "--log_level=warning"),
        *(str(script), "--config-base64", encode_config(config)),
    )


def encode_config(config: Config) -> str:
    """The resolved configuration as one word for a command line."""
    return base64.urlsafe_b64encode(zlib.compress(config_to_json(config).encode(), 9)).decode()


def run(job: Job, environ: Mapping[str, str]) -> int:
    """Start the job, wait, and return its exit status (128 + n where signal n ended it).

    The job has a session of its own, so that Ctrl-C reaches this process alone. It passes INT, TERM, HUP and USR1 on as TERM, at which
    a training run saves and ends.
    """
    for path, text in job.files.items():
        path.write_text(text)
    watch = _end_with_parent if job.ends_with_parent else None
    process = subprocess.Popen(job.command, env={**environ, **job.variables}, start_new_session=True, preexec_fn=watch)

    def forward(number: int, frame: FrameType | None) -> None:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    try:
        status = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def _end_with_parent() -> None:
    """Have Linux send TERM to the calling process when its parent dies, however it dies."""
    pr_set_pdeathsig = 1
    _LIBC.prctl(pr_set_pdeathsig, int(signal.SIGTERM))


def find_script(name: str) -> Path:
    """The script of this name, in the current folder or else beside `deepy.py`."""
    for place in (Path(name), REPOSITORY / name):
        if place.is_file():
            return place.resolve()
    raise ValueError(f"script {name} is neither in this folder nor in {REPOSITORY}: name train.py, generate.py, eval.py, or one of your own.")


def _free_port(wanted: int) -> int:
    """A port that nobody listens on. The default stands for any: between looking and listening lie seconds, in which a second job on this
    machine would find the same one free. A chosen one that is taken: ValueError."""
    try:
        return _bind(wanted if wanted != DEFAULT_PORT else 0)
    except OSError:
        raise ValueError(f"master_port {wanted} is in use on this machine: leave it out, or choose another.") from None


def _bind(port: int) -> int:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))
        return int(listener.getsockname()[1])

"""Starts the ranks of a job and waits for them.

One host: `megatron.launch.node` here. Several, or `force_multi`: the same on each through pdsh; or DeepSpeed's runner, which knows how to call
mpirun and srun. DeepSpeed's own way through pdsh is not taken: asked to stop, it ends every DeepSpeed job on those hosts, whoever's it is.
"""

from __future__ import annotations

import secrets
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from megatron.config.schema import Config
from megatron.launch.environment import REPOSITORY, python_path
from megatron.launch.node import Placement
from megatron.launch.pdsh import allow_connections, exported, remote_command
from megatron.launch.ports import DEFAULT_PORT, free_port
from megatron.launch.preflight import ask_hosts
from megatron.launch.processes import ends_with_parent, shell_status, stop_signals
from megatron.launch.remote import RemoteJob
from megatron.launch.resources import Resources, is_elsewhere
from megatron.launch.worker import encode_config

LAUNCHERS = ("pdsh", "openmpi", "mpich", "impi", "mvapich", "slurm")
_NODE = ("-m", "megatron.launch.node")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A script, its configuration, and where it runs."""

    name: str
    config: Config
    resources: Resources
    script: Path

    @property
    def is_local(self) -> bool:
        """Whether the ranks are started on this machine, without ssh, mpirun or srun."""
        return len(self.resources.hosts) == 1 and not self.config.launch.force_multi

    def placement(self, *, address: str | None = None, port: int | None = None) -> Placement:
        """Where the ranks run and meet: at what the configuration says, else at ``address``, else at the first host by its name."""
        launch, hosts = self.config.launch, self.resources.hosts
        found = launch.master_addr or address or ("127.0.0.1" if self.is_local else next(iter(hosts)))
        return Placement(hosts=hosts, device=self.resources.device, master_addr=found, master_port=port or launch.master_port)

    def node_words(self, placement: Placement, node: int, *, is_remote: bool) -> tuple[str, ...]:
        """What Python is given to start the ranks of a host."""
        lifeline = (f"--job={self.name}",) if is_remote else ()
        return (*_NODE, *lifeline, *placement.arguments(node), str(self.script), "--config-base64", encode_config(self.config))


def make_job(config: Config, resources: Resources, *, script: Path) -> Job:
    """The job, with a name that no other has. ValueError for a launcher that reaches no other host, and for one host that is not this one.

    Ranks that mpirun or srun start learn from the configuration where they meet: at the first host, where it does not say.
    """
    job = Job(name=f"sepllm-{secrets.token_hex(8)}", config=config, resources=resources, script=script)
    launcher = config.launch.launcher
    if job.is_local and resources.hostfile is not None and is_elsewhere(next(iter(resources.hosts))):
        raise ValueError(
            f"The only host is {next(iter(resources.hosts))}, which is another machine than this: set force_multi to true to start there over ssh, "
            "or leave hostfile out to run here."
        )
    if job.is_local or launcher == "pdsh":
        return job
    if launcher not in LAUNCHERS:
        raise ValueError(
            f"launcher {launcher} does not start workers on other hosts: use one of {', '.join(LAUNCHERS)}, or start "
            f"`{script.name} CONFIG...` on each host yourself (torchrun, srun)."
        )
    first = config.launch.master_addr or next(iter(resources.hosts))
    launch = config.launch.model_copy(update={"master_addr": first})
    return replace(job, config=config.model_copy(update={"launch": launch}))


def run(job: Job, environ: Mapping[str, str]) -> int:
    """Start the job, wait, and return its exit status (128 + n where signal n ended it)."""
    if job.is_local:
        placement = job.placement(port=free_port(job.config.launch.master_port))
        return _wait_for(job.node_words(placement, 0, is_remote=False), environ)
    if job.config.launch.launcher != "pdsh":
        return _wait_for((*_NODE, "--launcher", *runner_command(job)), {**environ, **_for_the_runner(job, environ)})
    allow_connections(len(job.resources.hosts))
    variables = exported(environ)
    placement = job.placement()
    if not job.config.launch.no_ssh_check:
        answer = ask_hosts(job.config, job.resources, job=job.name, script=job.script, variables=variables)
        placement = job.placement(address=answer.address, port=answer.port)
    commands = {host: remote_command(job.node_words(placement, node, is_remote=True), variables) for node, host in enumerate(job.resources.hosts)}
    return RemoteJob(job.name, commands, variables=variables, launcher_args=job.config.launch.launcher_args).wait()


def dry_run(job: Job, environ: Mapping[str, str]) -> str:
    """For each host, the variables of its ranks and the command that starts them, to be typed there or here."""
    if not job.is_local and job.config.launch.launcher != "pdsh":
        variables = [f"{name}={value}" for name, value in sorted(_for_the_runner(job, environ).items())]
        return shlex.join([*variables, *runner_command(job)])
    placement = job.placement()
    lines = []
    for node, host in enumerate(placement.hosts):
        lines += [f"# {host}: {_in_words(placement.variables(node, rank))}" for rank in placement.ranks(node)]
        words = job.node_words(placement, node, is_remote=False)
        if job.is_local:
            lines.append(shlex.join([f"PYTHONPATH={python_path(environ)}", sys.executable, "-u", *words]))
        else:
            lines.append(remote_command(words, exported(environ)))
    if job.config.launch.master_port == DEFAULT_PORT:
        lines.append(f"# deepy takes any free port of the first host in place of {DEFAULT_PORT}.")
    return "\n".join(lines)


def _in_words(variables: Mapping[str, str]) -> str:
    return shlex.join(f"{name}={value}" for name, value in variables.items())


def runner_command(job: Job) -> tuple[str, ...]:
    """DeepSpeed's runner with the flags that differ from its defaults."""
    launch = job.config.launch
    flags: dict[str, object] = {
        "hostfile": job.resources.hostfile,
        "include": launch.include,
        "exclude": launch.exclude,
        "num_nodes": launch.num_nodes,
        "num_gpus": launch.num_gpus,
        "master_port": launch.master_port if launch.master_port != DEFAULT_PORT else None,
        "master_addr": launch.master_addr,
        "launcher": launch.launcher,
        "launcher_args": launch.launcher_args,
    }
    given = [f"--{name}={value}" for name, value in flags.items() if value is not None and value != ""]
    switches = [f"--{name}" for name in ("force_multi", "no_ssh_check") if getattr(launch, name)]
    return (
        *(sys.executable, "-u", "-m", "deepspeed.launcher.runner"),
        *given,
        *switches,
        *("--no_local_rank", "--log_level=warning"),
        *(str(job.script), "--config-base64", encode_config(job.config)),
    )


def _for_the_runner(job: Job, environ: Mapping[str, str]) -> dict[str, str]:
    """What DeepSpeed's runner, and through it the ranks, need beside the environment."""
    accelerator = {"DS_ACCELERATOR": "cpu"} if job.resources.device == "cpu" else {}
    return {"PYTHONPATH": python_path(environ), **accelerator}


def _wait_for(words: tuple[str, ...], environ: Mapping[str, str]) -> int:
    """The exit status of `megatron.launch.node` on this machine.

    It has a session of its own, so that Ctrl-C reaches this process alone, which passes INT, TERM, HUP and USR1 on as TERM: training saves
    and ends. It gets HUP when this process is killed.
    """
    environ = {**environ, "PYTHONPATH": python_path(environ)}
    command = (sys.executable, "-u", *words)
    process = subprocess.Popen(command, env=environ, start_new_session=True, preexec_fn=ends_with_parent(signal.SIGHUP))

    def forward(number: int, frame: FrameType | None) -> None:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, forward) for number in stop_signals()}
    try:
        return shell_status(process.wait())
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def find_script(name: str) -> Path:
    """The script of this name, in the current folder or else beside `deepy.py`."""
    for place in (Path(name), REPOSITORY / name):
        if place.is_file():
            return place.resolve()
    raise ValueError(f"script {name} is neither in this folder nor in {REPOSITORY}: name train.py, generate.py, eval.py, or one of your own.")

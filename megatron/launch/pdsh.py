"""Commands on other hosts, one pdsh and one ssh for each, and what comes back from them."""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO

from megatron.launch.environment import python_path
from megatron.launch.processes import ends_with_parent

EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL", "GLOO", "TORCH", "WANDB", "DS_ACCELERATOR", "XDG_CACHE_HOME")
"""Beginnings of the names that are handed to other hosts. Others go into `.deepspeed_env`."""
_SSH_OPTIONS = "-oBatchMode=yes -oServerAliveInterval=5 -oServerAliveCountMax=3"
"""Never ask for a password; notice within twenty seconds that a host is gone."""
_LONGEST_COMMAND = 130_000
"""Linux passes no longer argument, and the whole command is one for ssh."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """Something that a host has told deepy."""

    host: str
    event: str
    """The word after the job's name in a line of `megatron.launch.node` or `megatron.launch.probe`; `closed`: the connection has ended."""
    content: Mapping[str, object]


def exported(environ: Mapping[str, str]) -> dict[str, str]:
    """What other hosts get of this environment, and the lines `NAME=VALUE` of `.deepspeed_env` at home and, before it, in this folder."""
    found = {name: value for name, value in environ.items() if name.startswith(EXPORTED)}
    found["PYTHONPATH"] = python_path(environ)
    for folder in (Path.home(), Path()):
        file = folder / environ.get("DS_ENV_FILE", ".deepspeed_env")
        if file.is_file():
            found |= _read_variables(file)
    return found


def _read_variables(file: Path) -> dict[str, str]:
    lines = [(number, line.strip()) for number, line in enumerate(file.read_text().splitlines(), 1)]
    found = {}
    for number, line in lines:
        name, equals, value = line.partition("=")
        if not line or line.startswith("#"):
            continue
        if not equals or not name.strip().isidentifier():
            raise ValueError(f"{file}, line {number}: {line!r} is not of the form NAME=VALUE.")
        found[name.strip()] = value.strip()
    return found


def remote_command(words: Sequence[str], variables: Mapping[str, str]) -> str:
    """What a shell on another host is given: the same folder, these variables, the same Python running ``words``."""
    environ = [f"{name}={value}" for name, value in sorted(variables.items())]
    return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['env', *environ, sys.executable, '-u', *words])}"


class Connection:
    """One command on one host. What it says comes as `Said` into ``events``, other lines go to ``show``, labelled."""

    def __init__(
        self, host: str, command: str, *, job: str, events: SimpleQueue[Said], show: Callable[[str, IO[bytes]], None], launcher_args: str = ""
    ) -> None:
        self.host = host
        self.notes: list[str] = []
        """What pdsh and ssh themselves have said."""
        self._job = f"{job} "
        self._events = events
        self._show = show
        self._process = subprocess.Popen(
            pdsh_command(host, command, launcher_args),
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=ends_with_parent(signal.SIGKILL),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def close(self) -> None:
        """Hangs up: the command's standard input ends. What it says from now on is lost."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        stdout, stderr = self._process.stdout, self._process.stderr
        assert stdout is not None
        assert stderr is not None
        aside = threading.Thread(target=self._read_errors, args=(stderr,), daemon=True)
        aside.start()
        for line in stdout:
            self._hear(line.decode(errors="replace"))
        aside.join()
        self._process.wait()
        self._events.put(Said(host=self.host, event="closed", content={}))

    def _hear(self, line: str) -> None:
        """Files what is for deepy and shows what is not: ranks write to the same stream, and one of them may not have ended its line."""
        shown, mark, told = line.partition(self._job)
        event, _, content = told.partition(" ")
        try:
            said = Said(host=self.host, event=event, content=json.loads(content)) if mark else None
        except ValueError:  # a rank has written into it
            shown, said = line, None
        if shown:
            self._show(f"{self.host}: {shown}" + ("" if shown.endswith("\n") else "\n"), sys.stdout.buffer)
        if said is not None:
            self._events.put(said)

    def _read_errors(self, stderr: IO[bytes]) -> None:
        for line in stderr:
            text = line.decode(errors="replace")
            if text.startswith(("pdsh@", "ssh: ")):
                self.notes.append(text.rstrip())
            else:
                self._show(f"{self.host}: {text}", sys.stderr.buffer)


def allow_connections(count: int) -> None:
    """Raises this process's limit of open files, as far as the system lets it, to what two commands on each of so many hosts need."""
    files = 256 + 8 * count
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files if hard == resource.RLIM_INFINITY else min(files, hard), hard))


def pdsh_command(host: str, command: str, launcher_args: str) -> list[str]:
    """What starts a command on a host. ValueError where pdsh is missing or the command is too long for Linux."""
    if shutil.which("pdsh") is None:
        raise ValueError("pdsh is not installed, which starts the ranks of other hosts: install it (apt-get install pdsh), or choose a launcher.")
    text = command.replace("%", "%%")
    if len(text) > _LONGEST_COMMAND:
        raise ValueError(f"The command for {host} has {len(text):,} characters, and Linux passes {_LONGEST_COMMAND:,}: shorten the configuration.")
    return ["pdsh", "-S", "-N", *shlex.split(launcher_args), "-w", host, text]


def _environment() -> dict[str, str]:
    more = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {_SSH_OPTIONS}".strip()
    return {**os.environ, "PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": more}

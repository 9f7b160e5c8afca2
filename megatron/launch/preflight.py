"""Asks every host, all at once, whether the job can run there, before any rank is started or any device held."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO

from megatron.config.schema import Config
from megatron.launch.environment import REPOSITORY
from megatron.launch.pdsh import Connection, Said, remote_command
from megatron.launch.probe import Answer, Machine, machine
from megatron.launch.resources import Resources
from megatron.launch.worker import encode_config

ANSWER_S = 60.0


def ask_hosts(config: Config, resources: Resources, *, job: str, script: Path, variables: Mapping[str, str]) -> Answer:
    """The first host's answer, with the address and port at which the ranks meet. ValueError with every host's obstacles, each with a remedy."""
    events: SimpleQueue[Said] = SimpleQueue()
    heard: dict[str, list[str]] = {host: [] for host in resources.hosts}

    def keep(text: str, stream: IO[bytes]) -> None:
        host, _, line = text.partition(": ")
        heard[host].append(line.rstrip())

    open_ = {}
    for node, (host, slots) in enumerate(resources.hosts.items()):
        words = _probe(config, node=node, slots=slots, job=job, script=script, is_shared=len(resources.hosts) > 1 and config.data.use_shared_fs)
        command = remote_command(words, variables)
        open_[host] = Connection(host, command, job=job, events=events, show=keep, launcher_args=config.launch.launcher_args)
    try:
        answers = _collect(set(open_), events)
    finally:
        for connection in open_.values():
            connection.close()
    mistakes = []
    here = machine(config, script)
    for host, connection in open_.items():
        if host in answers:
            mistakes += [f"{host}: {sentence}" for sentence in (*answers[host].obstacles, *differences(answers[host].machine, here))]
        else:
            mistakes.append(f"{host}: {no_answer([*heard[host], *connection.notes], host)}")
    first = next(iter(resources.hosts))
    if first in answers and answers[first].address is None:
        mistakes.append(f"{first}: `hostname -I` names no address there: give one that the other hosts reach as master_addr.")
    if mistakes:
        raise ValueError("\n".join([*mistakes, "Nothing was started. To start without asking the hosts: --no-preflight, or no_ssh_check: true."]))
    return answers[first]


def _probe(config: Config, *, node: int, slots: tuple[int | str, ...], job: str, script: Path, is_shared: bool) -> list[str]:
    gpus = max((slot + 1 for slot in slots if isinstance(slot, int)), default=0)
    words = ["-m", "megatron.launch.probe", f"--job={job}", f"--node={node}", f"--gpus={gpus}", f"--script={script}"]
    return [*words, *(["--shared"] if is_shared else []), f"--config-base64={encode_config(config)}"]


def _collect(waiting: set[str], events: SimpleQueue[Said]) -> dict[str, Answer]:
    """The answers that come in time."""
    answers: dict[str, Answer] = {}
    deadline = time.monotonic() + ANSWER_S
    while waiting:
        try:
            said = events.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            break
        if said.event == "answer":
            answers[said.host] = Answer.model_validate(said.content)
        waiting.discard(said.host)
    return answers


def differences(there: Machine, here: Machine) -> list[str]:
    """In what a host differs from this machine, one sentence each."""
    found = [
        f"{name} is {there.versions[name]}, on this machine {here.versions[name]}: install the same on all hosts (requirements/train.txt)."
        for name in here.versions
        if there.versions[name] != here.versions[name]
    ]
    if there.code != here.code:
        found.append(f"{REPOSITORY} or the script holds other code than on this machine: bring all hosts to the same commit.")
    elif there.config != here.config:
        found.append("the configuration reads differently there (another pydantic or Python?): install the same packages on all hosts.")
    found += [
        f"{path} is another file ({there.inputs[path]}) than on this machine ({here.inputs[path]}): copy it again, or mount the same file system."
        for path in here.inputs
        if path in there.inputs and there.inputs[path] != here.inputs[path]
    ]
    return found


def no_answer(lines: list[str], host: str) -> str:
    """Why a host has not answered, and the remedy, from what it and ssh have said instead."""
    said = "\n  ".join(lines[-10:])
    heard = f"It said:\n  {said}" if said else f"It said nothing in {ANSWER_S:.0f} seconds."
    if "exit code 255" in said:
        remedy = f"ssh does not get there: make `ssh -o BatchMode=yes {host} true` work (address, sshd, key in authorized_keys, known host key)."
    elif "exit code" in said:
        remedy = f"the same Python, {REPOSITORY} and current folder must be there at the same paths as on this machine."
    else:
        remedy = f"see whether `ssh -o BatchMode=yes {host} true` comes back."
    return f"no answer: {remedy} {heard}"

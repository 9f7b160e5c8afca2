"""Starts the ranks of one host and stays with them: `python -m megatron.launch.node`. Standard library only, as it runs on every host.

deepy starts it, here or through pdsh; by hand it takes the command that `deepy.py --dry-run` prints for each host. Through pdsh its standard input
is the lifeline, which ends when deepy, pdsh, ssh or the connection does; what it tells deepy are lines that begin with the job's name.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from megatron.launch.environment import worker_variables
from megatron.launch.workers import Failure, Workers

Slots = tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the ranks of a job run."""

    hosts: Mapping[str, Slots]
    """In the order of their ranks."""
    device: str
    master_addr: str
    master_port: int

    def ranks(self, node: int) -> range:
        """The ranks of the host with this number."""
        sizes = [len(slots) for slots in self.hosts.values()]
        return range(sum(sizes[:node]), sum(sizes[: node + 1]))

    def variables(self, node: int, rank: int) -> dict[str, str]:
        """What tells a rank who it is."""
        ranks = self.ranks(node)
        slots = list(self.hosts.values())[node]
        found = {
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": self.master_port,
            "WORLD_SIZE": sum(map(len, self.hosts.values())),
            "RANK": rank,
            "LOCAL_RANK": rank - ranks.start,
            "LOCAL_SIZE": len(ranks),
            "CROSS_RANK": node,
            "CROSS_SIZE": len(self.hosts),
        }
        if self.device == "cuda":
            found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, slots))
        return {name: str(value) for name, value in found.items()}

    def arguments(self, node: int) -> tuple[str, ...]:
        """What `python -m megatron.launch.node` is told of this."""
        world = base64.urlsafe_b64encode(json.dumps(dict(self.hosts)).encode()).decode()
        places = (f"--world={world}", f"--node={node}", f"--device={self.device}")
        return (*places, f"--master-addr={self.master_addr}", f"--master-port={self.master_port}")


def main(argv: Sequence[str] | None = None) -> int:
    """The status of the first rank that failed, else 0."""
    given = _parser().parse_args(argv)
    if given.launcher:
        return Workers({0: ((given.script, *given.arguments), os.environ)}, report=lambda _: None, are_launchers=True).wait()
    hosts = {host: tuple(slots) for host, slots in json.loads(base64.urlsafe_b64decode(given.world)).items()}
    placement = Placement(hosts=hosts, device=given.device, master_addr=given.master_addr, master_port=given.master_port)
    return _run_remote(placement, given) if given.job else _run_here(placement, given)


def _run_here(placement: Placement, given: argparse.Namespace) -> int:
    failures: list[Failure] = []
    commands = _commands(placement, given.node, (given.script, *given.arguments))
    status = Workers(commands, report=failures.append).wait()
    for failure in failures:
        if len(commands) > 1 or failure.status > 128:  # of a rank that is alone, its traceback is the last on the screen anyway
            print(failure.in_words(list(placement.hosts)[given.node]), file=sys.stderr)
    return status


def _run_remote(placement: Placement, given: argparse.Namespace) -> int:
    with listening(given.job, given.node):
        tell(given.job, "started", {})
        commands = _commands(placement, given.node, (given.script, *given.arguments))
        status = Workers(commands, report=lambda failure: tell(given.job, "failed", asdict(failure)), lifeline=sys.stdin.fileno()).wait()
        tell(given.job, "ended", {"status": status})
    return status


def _commands(placement: Placement, node: int, script: Sequence[str]) -> dict[int, tuple[Sequence[str], Mapping[str, str]]]:
    ranks = placement.ranks(node)
    environ = os.environ | worker_variables(os.environ, device=placement.device, local_size=len(ranks))
    return {rank: ((sys.executable, "-u", *script), environ | placement.variables(node, rank)) for rank in ranks}


def tell(job: str, event: str, content: Mapping[str, object]) -> None:
    """One line for deepy, as long as somebody reads it."""
    try:
        sys.stdout.write(f"{job} {event} {json.dumps(content)}\n")
        sys.stdout.flush()
    except OSError:
        pass


def listening(job: str, node: int) -> socket.socket:
    """The mark by which `megatron.launch.stop` finds this process and no other: a socket that Linux removes when the process ends."""
    mark = socket.socket(socket.AF_UNIX)
    mark.bind(mark_name(job, node))
    mark.listen()
    return mark


def mark_name(job: str, node: int) -> str:
    return f"\0{job}-{node}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron.launch.node", description="Start the ranks of one host and stay with them.", allow_abbrev=False)
    parser.add_argument("--job", help="what lines for deepy begin with; standard input is then the lifeline")
    parser.add_argument("--launcher", action="store_true", help="the command is DeepSpeed's runner")
    parser.add_argument("--world", help="hosts and their slots, as JSON in base64")
    parser.add_argument("--node", type=int, default=0, help="number of this host")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--master-addr")
    parser.add_argument("--master-port", type=int)
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


if __name__ == "__main__":
    sys.exit(main())

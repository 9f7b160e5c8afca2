"""A job on several hosts, seen from deepy: starts its `megatron.launch.node` on each, and brings all of them to an end together."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import FrameType
from typing import IO

from megatron.launch.pdsh import Connection, Said, remote_command
from megatron.launch.processes import stop_signals
from megatron.launch.workers import Failure

LOST = 255
"""Status of a job that has lost a host, as ssh's own."""
_SETTLE_S = 1.0
"""How long to wait, after a first failure, for one that came before it and is told later."""
_CONFIRM_S = 25.0
"""How long the hosts may take to say that nothing is left of the job."""


class RemoteJob:
    """The processes of one job on its hosts, from start to end."""

    def __init__(self, job: str, commands: Mapping[str, str], *, variables: Mapping[str, str], launcher_args: str) -> None:
        """``commands``: what starts the ranks of each host. ``variables``: environment of whatever else is started there."""
        self._job = job
        self._variables = variables
        self._launcher_args = launcher_args
        self._nodes = {host: node for node, host in enumerate(commands)}
        self._events: SimpleQueue[Said] = SimpleQueue()
        self._open = {host: self._connect(host, command) for host, command in commands.items()}
        self._started: set[str] = set()
        self._statuses: dict[str, int] = {}
        self._failures: list[tuple[float, str, int]] = []
        """When, in words, status."""
        self._requests = 0
        self._deadline: float | None = None
        self._is_hanging_up = False

    def wait(self) -> int:
        """The exit status of the job, once no host has anything left of it; the first failure is the last on the screen."""
        previous = {number: signal.signal(number, self._request) for number in stop_signals()}
        try:
            while self._open:
                self._step()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            for connection in self._open.values():
                connection.close()
        if self._failures:
            _, words, status = min(self._failures)
            print(words, file=sys.stderr)
            return status
        return max([128 + signal.SIGINT if self._is_hanging_up else 0, *self._statuses.values()])

    def _connect(self, host: str, command: str) -> Connection:
        return Connection(host, command, job=self._job, events=self._events, show=show, launcher_args=self._launcher_args)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._events.put(Said(host="deepy", event="asked", content={}))

    def _step(self) -> None:
        """Waits for the next thing that happens, and acts on it."""
        limit = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        try:
            said = self._events.get(timeout=limit)
        except Empty:
            self._give_up() if self._is_hanging_up else self._hang_up()
            return
        if said.event == "asked":
            self._stop()
        elif said.event == "started":
            self._started.add(said.host)
        elif said.event == "ended":
            self._ended(said.host, int(str(said.content["status"])))
        elif said.event == "failed":
            failure = Failure(**said.content)  # type: ignore[arg-type]
            self._fail(failure.time_s, failure.in_words(said.host), failure.status)
        elif said.event == "closed" and (connection := self._open.pop(said.host, None)) is not None:
            self._closed(connection)

    def _ended(self, host: str, status: int) -> None:
        self._statuses[host] = status
        if status and not self._failures and not self._requests:
            self._fail(time.time(), f"{host}: somebody else than deepy has asked its ranks to stop.", status)

    def _closed(self, connection: Connection) -> None:
        if connection.host in self._statuses or self._is_hanging_up:
            return
        said = "; ".join(connection.notes) or "without a word"
        self._fail(
            0.0,  # before any rank that has failed: ranks fail because a host is lost, no host is lost because of a rank
            f"{connection.host}: the connection, or the process that starts the ranks there, was lost ({said}). If nobody ended it, look at "
            f"`ssh {connection.host}` and at dmesg there.",
            LOST,
        )

    def _fail(self, time_s: float, words: str, status: int) -> None:
        self._failures.append((time_s, words, status))
        if self._deadline is None:
            self._deadline = time.monotonic() + _SETTLE_S

    def _stop(self) -> None:
        """First to save and end; the second time, or before all ranks are started, to end."""
        self._requests += 1
        if self._requests == 1 and self._started >= self._open.keys() and self._deadline is None:
            self._signal_all("TERM")
        elif not self._is_hanging_up:
            self._hang_up()

    def _hang_up(self) -> None:
        self._is_hanging_up = True
        self._deadline = time.monotonic() + _CONFIRM_S
        for host in self._open.keys() - self._started:
            self._open.pop(host).close()
        self._signal_all("HUP")

    def _give_up(self) -> None:
        print(f"{', '.join(self._open)}: not confirmed that the ranks have ended; they do once they notice that deepy is gone.", file=sys.stderr)
        while self._open:
            self._open.popitem()[1].close()

    def _signal_all(self, name: str) -> None:
        for host in self._open:
            words = ("-m", "megatron.launch.stop", self._job, str(self._nodes[host]), name)
            Connection(host, remote_command(words, self._variables), job=self._job, events=SimpleQueue(), show=show)


def show(text: str, stream: IO[bytes]) -> None:
    """Writes a line that came from a host, as long as somebody reads it."""
    with suppress(OSError, ValueError):
        stream.write(text.encode())
        stream.flush()

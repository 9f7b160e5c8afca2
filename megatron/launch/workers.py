"""Child processes that live and die together: watched, asked to stop, ended, and the first to fail is reported with its last words."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from megatron.launch.processes import adopt_orphans, children, ends_with_parent, kill_descendants, shell_status

FAILED_S = 3.0
"""How long the others may take to end by themselves once a worker has failed. They can save nothing without it."""
HANG_UP_S = 5.0
"""The same once whoever started this job is gone, or has asked a second time."""
_REMEMBERED_BYTES = 16384
_CHUNK_BYTES = 65536
_TRACEBACK = "Traceback (most recent call last)"
_LINES_WITHOUT_TRACEBACK = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The end of a worker that nobody had asked to end."""

    rank: int
    status: int
    """As a shell gives it."""
    time_s: float
    """When, in seconds since 1970."""
    last_words: str
    """The end of what it wrote to its standard error: its traceback where there is one."""

    def in_words(self, host: str) -> str:
        said = f" The last it said:\n{self.last_words}" if self.last_words else " It said nothing."
        return f"rank {self.rank} on {host} {_ending(self.status)}.{said}"


@dataclass(slots=True)
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    remembered: bytearray = field(default_factory=bytearray)
    pending: bytearray = field(default_factory=bytearray)
    """The beginning of a line that has not ended yet."""


class Workers:
    """Started processes, by rank. `wait` ends when all of them, and everything they have started, are gone.

    TERM, INT and USR1 ask them to stop: each gets TERM, at which training saves and ends, and time without limit. A second such signal gives
    ``HANG_UP_S``; so does HUP, and the end of ``lifeline``. One that fails takes the others along within ``FAILED_S``.
    """

    def __init__(
        self,
        commands: Mapping[int, tuple[Sequence[str], Mapping[str, str]]],
        *,
        report: Callable[[Failure], None],
        lifeline: int | None = None,
        are_launchers: bool = False,
    ) -> None:
        """``commands``: for each rank its command and its whole environment. ``lifeline``: a file whose end means that nobody waits for this job.

        ``are_launchers``: each command is DeepSpeed's runner, which starts mpirun or srun and passes no signal on. These get USR1, which they
        hand to their ranks as it is; at TERM, mpirun would allow the ranks a few seconds.
        """
        adopt_orphans()
        self._report = report
        self._are_launchers = are_launchers
        self._selector = selectors.DefaultSelector()
        self._requests = 0
        self._status = 0
        self._is_ending = False
        self._deadline: float | None = None
        self._listen_to_signals()
        if lifeline is not None:
            self._selector.register(lifeline, selectors.EVENT_READ, partial(self._watch_lifeline, lifeline))
        stdin = subprocess.DEVNULL if lifeline is not None else None
        self._alive = {rank: self._start(rank, command, environ, stdin) for rank, (command, environ) in commands.items()}
        self._all = list(self._alive.values())

    def wait(self) -> int:
        """The status of the first that failed, else 0."""
        while self._alive:
            limit = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            for key, _ in self._selector.select(limit):
                key.data()
            if self._deadline is not None and time.monotonic() >= self._deadline:
                kill_descendants()
                self._deadline = None
        kill_descendants()
        for worker in self._all:
            while self._hear(worker):
                pass
        return self._status

    def _start(self, rank: int, command: Sequence[str], environ: Mapping[str, str], stdin: int | None) -> _Worker:
        process = subprocess.Popen(
            command, env=dict(environ), stdin=stdin, stderr=subprocess.PIPE, bufsize=0, preexec_fn=ends_with_parent(signal.SIGKILL)
        )
        worker = _Worker(rank, process)
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), False)
        self._selector.register(process.stderr, selectors.EVENT_READ, partial(self._hear, worker))
        return worker

    def _hear(self, worker: _Worker) -> bool:
        """Passes on what the worker has written to its standard error, in whole lines, and remembers the end of it. False: nothing came."""
        stderr = worker.process.stderr
        assert stderr is not None
        chunk = None if stderr.closed else stderr.read(_CHUNK_BYTES)
        if chunk:
            worker.remembered = (worker.remembered + chunk)[-_REMEMBERED_BYTES:]
            worker.pending += chunk
            end = 1 + max(worker.pending.rfind(b"\n"), worker.pending.rfind(b"\r"))
            if len(worker.pending) > _CHUNK_BYTES:
                end = len(worker.pending)
            _write(worker.pending[:end])
            del worker.pending[:end]
        elif chunk == b"":
            _write(worker.pending)
            self._selector.unregister(stderr)
            stderr.close()
        return bool(chunk)

    def _look_for_ended(self) -> None:
        for worker in list(self._alive.values()):
            if worker.process.poll() is not None:
                self._ended(worker, time_s=time.time())

    def _ended(self, worker: _Worker, *, time_s: float) -> None:
        del self._alive[worker.rank]
        status = shell_status(worker.process.returncode)
        if status == 0:
            return
        self._status = self._status or status
        if not self._is_ending and self._requests == 0:
            self._hear(worker)
            words = last_words(worker.remembered.decode(errors="replace"))
            self._report(Failure(rank=worker.rank, status=status, time_s=time_s, last_words=words))
        self._end_within(FAILED_S)

    def _listen_to_signals(self) -> None:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writer)
        self._selector.register(reader, selectors.EVENT_READ, partial(self._signalled, reader))

    def _signalled(self, reader: int) -> None:
        for number in os.read(reader, 64):
            if number == signal.SIGCHLD:
                self._look_for_ended()
            elif number == signal.SIGHUP:
                self._end_within(HANG_UP_S)
            elif number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._requests += 1
                if self._requests > 1:
                    self._end_within(HANG_UP_S)
                else:
                    self._send(signal.SIGUSR1 if self._are_launchers else signal.SIGTERM)

    def _watch_lifeline(self, lifeline: int) -> None:
        if not os.read(lifeline, _CHUNK_BYTES):
            self._selector.unregister(lifeline)
            self._end_within(HANG_UP_S)

    def _end_within(self, seconds: float) -> None:
        if not self._is_ending:
            self._is_ending = True
            self._deadline = time.monotonic() + seconds
            self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        for worker in self._alive.values():
            started = children(worker.process.pid) if self._are_launchers else []
            for pid in started or [worker.process.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)


def last_words(text: str) -> str:
    """The last traceback of a text and what follows it; without one, its last lines."""
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(_TRACEBACK)]
    return "\n".join(lines[starts[-1] :] if starts else lines[-_LINES_WITHOUT_TRACEBACK:])


def _ending(status: int) -> str:
    if status <= 128:
        return f"left with status {status}"
    try:
        name = signal.Signals(status - 128).name
    except ValueError:
        return f"left with status {status}"
    hint = " (Linux does that when memory runs out: look at dmesg)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def _write(text: bytes | bytearray) -> None:
    """Writes to standard error, as long as somebody reads it."""
    with suppress(OSError):
        sys.stderr.buffer.write(text)
        sys.stderr.buffer.flush()

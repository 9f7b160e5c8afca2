"""What Linux offers to end exactly the processes of one job: signals at a parent's death, adopted orphans, a process's descendants."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_LIBC = ctypes.CDLL(None)
_SIGNAL_AT_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG
_ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER


def stop_signals() -> tuple[signal.Signals, ...]:
    """Those that ask a job to stop: INT, TERM, USR1, and HUP unless this process was told to ignore it, as nohup does."""
    hang_up = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *hang_up)


def ends_with_parent(number: signal.Signals) -> Callable[[], None]:
    """For ``preexec_fn``: the child gets this signal when its parent, the calling process, dies, however it dies."""
    parent = os.getpid()

    def prepare() -> None:
        _LIBC.prctl(_SIGNAL_AT_PARENTS_DEATH, int(number), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def adopt_orphans() -> None:
    """Makes descendants of this process its children when their own parents die, so that none is ever out of sight."""
    _LIBC.prctl(_ADOPT_ORPHANS, 1, 0, 0, 0)


def children(pid: int) -> list[int]:
    """The living children of a process."""
    return _children_by_parent().get(pid, [])


def descendants(pid: int) -> list[int]:
    """The living children of a process, their children, and so on."""
    by_parent = _children_by_parent()
    found = list(by_parent.get(pid, []))
    for child in found:
        found += by_parent.get(child, [])
    return found


def kill_descendants(*, timeout_s: float = 10.0) -> list[int]:
    """Kills whatever this process has started, directly or not, and waits for it. What is left is stuck in the kernel."""
    deadline = time.monotonic() + timeout_s
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return left


def shell_status(returncode: int) -> int:
    """An exit status as a shell gives it: 128 + n where signal n ended the process."""
    return returncode if returncode >= 0 else 128 - returncode


def _children_by_parent() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # it has ended meanwhile
        if state not in "ZX":
            found.setdefault(int(parent), []).append(int(folder.name))
    return found

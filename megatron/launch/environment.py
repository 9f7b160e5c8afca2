"""Environment variables that workers need before torch is imported, and the folder of DeepSpeed's compiled operators."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import tempfile
from collections.abc import Mapping, MutableMapping
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""glibc gives blocks above 32 MB (logits) back to the system as soon as they are freed, and the next step faults every page in again.
Keeping them made a step of the demo's model 1.2 times as fast on two CPU cores."""


def worker_variables(environ: Mapping[str, str], *, device: str, local_size: int) -> dict[str, str]:
    """What to add to an environment for ``local_size`` workers on one host. Variables that the user has set stay as they are."""
    cores = len(os.sched_getaffinity(0))
    wanted = {"OMP_NUM_THREADS": str(max(1, cores // local_size)), "TORCH_EXTENSIONS_DIR": str(extensions_folder(environ))}
    if device == "cpu":
        wanted |= {"DS_ACCELERATOR": "cpu", **KEEP_FREED_MEMORY}
    added = {name: value for name, value in wanted.items() if not environ.get(name)}
    if python_path(environ) != environ.get("PYTHONPATH"):
        added["PYTHONPATH"] = python_path(environ)
    return added


def python_path(environ: Mapping[str, str]) -> str:
    """PYTHONPATH with the repository in it."""
    path = [place for place in environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    return os.pathsep.join(path if str(REPOSITORY) in path else [str(REPOSITORY), *path])


def extensions_folder(environ: Mapping[str, str]) -> Path:
    """Folder of this user's compiled operators, one for each host and version of Python and torch."""
    build = f"{socket.gethostname()}-py{sys.version_info.major}{sys.version_info.minor}-torch{version('torch')}"
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if not _can_write(cache):
        cache = Path(tempfile.gettempdir()) / f"user-{os.getuid()}"
    return cache / "sepllm" / "torch_extensions" / build


def prepare_worker(environ: MutableMapping[str, str], *, device: str) -> None:
    """Complete this process's environment. Call it before torch is imported; under deepy only the compiled operators are left to guard."""
    environ.update(worker_variables(environ, device=device, local_size=int(environ.get("LOCAL_SIZE") or environ.get("LOCAL_WORLD_SIZE") or 1)))
    if environ["TORCH_EXTENSIONS_DIR"] == str(extensions_folder(environ)):
        guard_extensions(extensions_folder(environ))


def guard_extensions(folder: Path) -> int:
    """Join the jobs that use this folder, for the life of this process; the first one in removes locks that dead jobs left.

    torch marks a folder in which it compiles by a file named `lock`, and waits for ever for one whose owner was killed. Each of our
    workers holds a shared lock of the operating system on `jobs`, which ends with its process: who gets it alone knows that nobody compiles.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "jobs", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for stale in folder.glob("*/lock"):
            stale.unlink()
    except BlockingIOError:
        pass
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _can_write(folder: Path) -> bool:
    while not os.path.exists(folder):  # and not Path.exists, which raises PermissionError below folders that are closed to this user
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)

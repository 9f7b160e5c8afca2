"""Variables of the workers, and the folder of compiled operators that no dead job can lock."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from megatron.launch.environment import KEEP_FREED_MEMORY, REPOSITORY, extensions_folder, guard_extensions, worker_variables
from megatron.launch.inputs import nearest_folder


def test_cores_are_divided_among_the_workers_of_a_host() -> None:
    cores = len(os.sched_getaffinity(0))
    assert worker_variables({}, device="cpu", local_size=1)["OMP_NUM_THREADS"] == str(cores)
    assert worker_variables({}, device="cpu", local_size=10 * cores)["OMP_NUM_THREADS"] == "1"


def test_variables_that_the_user_has_set_stay() -> None:
    mine = {"OMP_NUM_THREADS": "3", "TORCH_EXTENSIONS_DIR": "/x", "DS_ACCELERATOR": "cpu", "PYTHONPATH": f"/y:{REPOSITORY}"}
    mine |= dict.fromkeys(KEEP_FREED_MEMORY, "7")
    assert worker_variables(mine, device="cpu", local_size=1) == {}


def test_the_repository_comes_first_on_the_python_path() -> None:
    assert worker_variables({"PYTHONPATH": "/y"}, device="cuda", local_size=1)["PYTHONPATH"] == f"{REPOSITORY}:/y"
    assert worker_variables({}, device="cuda", local_size=1)["PYTHONPATH"] == str(REPOSITORY)


def test_only_cpu_workers_are_told_so() -> None:
    for name in ("DS_ACCELERATOR", *KEEP_FREED_MEMORY):
        assert name in worker_variables({}, device="cpu", local_size=1)
        assert name not in worker_variables({}, device="cuda", local_size=1)


def test_compiled_operators_lie_in_the_users_cache(tmp_path: Path) -> None:
    assert tmp_path in extensions_folder({"XDG_CACHE_HOME": str(tmp_path)}).parents


def test_a_cache_below_a_folder_that_is_closed_to_this_user_is_no_traceback(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # to root nothing is closed
    try:
        assert extensions_folder({"XDG_CACHE_HOME": str(closed / "cache")}).name.startswith(socket.gethostname())
        assert nearest_folder(closed / "checkpoints" / "mine") in closed.parents or user != 0
    finally:
        os.seteuid(user)


def test_a_lock_left_by_a_dead_job_is_removed_by_the_first_job(tmp_path: Path) -> None:
    stale = tmp_path / "cpu_adam" / "lock"
    stale.parent.mkdir()
    stale.touch()
    os.close(guard_extensions(tmp_path))
    assert not stale.exists()


def test_a_lock_is_left_alone_while_another_job_lives(tmp_path: Path) -> None:
    other = guard_extensions(tmp_path)
    held = tmp_path / "cpu_adam" / "lock"
    held.parent.mkdir()
    held.touch()
    mine = guard_extensions(tmp_path)
    assert held.exists()
    os.close(other)
    fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(mine)

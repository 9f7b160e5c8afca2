"""Processes that live and die together, watched by a process of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron.launch import stop
from megatron.launch.environment import REPOSITORY
from megatron.launch.node import listening
from megatron.launch.processes import children, descendants, shell_status
from megatron.launch.workers import Failure, last_words
from tests.megatron.launch.waiting import is_running, wait_until

WATCHER = """
import os, sys
from megatron.launch.workers import Workers
lifeline = sys.stdin.fileno() if sys.argv[1] == "lifeline" else None
report = lambda failure: print(failure.in_words("here"), flush=True)
commands = {rank: ((sys.executable, "-c", code), os.environ | {"RANK": str(rank)}) for rank, code in enumerate(sys.argv[2:])}
sys.exit(Workers(commands, report=report, lifeline=lifeline).wait())
"""
READY = "import os, pathlib, signal, sys, time; pathlib.Path('pid' + os.environ['RANK']).write_text(str(os.getpid())); "
WAITS = f"{READY} time.sleep(100)"
SAVES = f"import signal; signal.signal(15, lambda *_: sys.exit(0)); {READY} time.sleep(100)"
STUBBORN = f"import signal; signal.signal(15, signal.SIG_IGN); {READY} time.sleep(100)"
NOISY = f"import signal; signal.signal(15, signal.SIG_IGN); {READY}\nwhile True: sys.stderr.write('noise\\n' * 1000)"
HAS_CHILDREN = (
    f"import subprocess; child = subprocess.Popen(['sleep', '100'], start_new_session=True); "
    f"open('child', 'w').write(str(child.pid)); {READY} time.sleep(100)"
)

Watch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    started: list[subprocess.Popen[str]] = []

    def run(*codes: str, lifeline: bool = False) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", WATCHER, "lifeline" if lifeline else "none", *codes]
        environ = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        started.append(
            subprocess.Popen(words, cwd=tmp_path, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def pids(folder: Path, count: int) -> list[int]:
    files = [folder / f"pid{rank}" for rank in range(count)]
    assert wait_until(lambda: all(file.exists() and file.read_text() for file in files), seconds=30)
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize(("code", "status"), [("", 0), ("import sys; sys.exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_the_status_is_that_of_the_worker(watch: Watch, code: str, status: int) -> None:
    assert watch(code).wait(timeout=30) == status


def test_a_failure_takes_the_others_along_even_stubborn_ones_and_is_reported_with_its_traceback(watch: Watch, tmp_path: Path) -> None:
    process = watch(
        STUBBORN, f"{READY} sys.stderr.write('noise\\n'); [time.sleep(0.02) for _ in iter(lambda: os.path.exists('pid0'), True)]; int('x')"
    )
    told, written = process.communicate(timeout=30)
    assert process.returncode == 1
    assert told.startswith("rank 1 on here left with status 1. The last it said:\nTraceback (most recent call last):\n")
    assert told.rstrip().endswith("ValueError: invalid literal for int() with base 10: 'x'")
    assert written.startswith("noise\n")
    assert not any(map(is_running, pids(tmp_path, 2)))


def test_asked_once_workers_have_the_time_they_need_and_asked_twice_a_few_seconds(watch: Watch, tmp_path: Path) -> None:
    process = watch(SAVES, STUBBORN)
    ranks = pids(tmp_path, 2)
    process.terminate()
    assert wait_until(lambda: not is_running(ranks[0]), seconds=10)
    assert is_running(ranks[1])
    process.terminate()
    assert process.wait(timeout=30) == 137
    assert not is_running(ranks[1])


def test_a_worker_that_never_stops_talking_is_ended_too(watch: Watch, tmp_path: Path) -> None:
    process = watch(NOISY)
    reader = threading.Thread(target=lambda: process.stderr.read())
    reader.start()
    pids(tmp_path, 1)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=30) == 137
    reader.join()


def test_workers_that_stop_when_asked_leave_status_0_and_no_report(watch: Watch, tmp_path: Path) -> None:
    process = watch(SAVES, SAVES)
    pids(tmp_path, 2)
    process.send_signal(signal.SIGINT)
    told, written = process.communicate(timeout=30)
    assert (process.returncode, told, written) == (0, "", "")


@pytest.mark.parametrize("damage", ["lifeline", "hang-up", "killed"])
def test_no_worker_outlives_whoever_started_it(watch: Watch, tmp_path: Path, damage: str) -> None:
    process = watch(WAITS, STUBBORN, lifeline=True)
    ranks = pids(tmp_path, 2)
    if damage == "lifeline":
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    else:
        process.send_signal(signal.SIGHUP if damage == "hang-up" else signal.SIGKILL)
    assert wait_until(lambda: not any(map(is_running, ranks)), seconds=15)
    assert process.wait(timeout=10) != 0


def test_what_a_killed_worker_has_started_in_a_session_of_its_own_ends_too(watch: Watch, tmp_path: Path) -> None:
    process = watch(HAS_CHILDREN)
    (rank,) = pids(tmp_path, 1)
    child = int((tmp_path / "child").read_text())
    os.kill(rank, signal.SIGKILL)
    assert process.wait(timeout=30) == 137
    assert not is_running(child)


def test_last_words_are_the_last_traceback_or_the_last_lines() -> None:
    assert last_words("a\nTraceback (most recent call last):\n old\nb\nTraceback (most recent call last):\n new\nError: c\nlater") == (
        "Traceback (most recent call last):\n new\nError: c\nlater"
    )
    assert last_words("\n".join(map(str, range(50)))).splitlines() == [str(line) for line in range(30, 50)]
    assert Failure(rank=0, status=139, time_s=0, last_words="").in_words("a") == "rank 0 on a was ended by SIGSEGV. It said nothing."
    assert "dmesg" in Failure(rank=0, status=137, time_s=0, last_words="").in_words("a")


def test_a_status_is_counted_as_a_shell_does() -> None:
    assert [shell_status(returncode) for returncode in (0, 7, -9)] == [0, 7, 137]


def test_stop_signals_the_process_that_holds_the_jobs_socket_and_no_other(tmp_path: Path) -> None:
    code = (
        "import sys, time; from megatron.launch.node import listening; mark = listening(sys.argv[1], 3); print('ready', flush=True); time.sleep(100)"
    )
    jobs = [f"test-{os.getpid()}-{number}" for number in range(2)]
    processes = [subprocess.Popen([sys.executable, "-c", code, job], cwd=REPOSITORY, stdout=subprocess.PIPE) for job in jobs]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        assert stop.main([jobs[0], "2", "TERM"]) == 0
        assert stop.main(["no such job", "3", "HUP"]) == 0
        assert [process.poll() for process in processes] == [None, None]
        assert stop.main([jobs[0], "3", "HUP"]) == 0
        assert processes[0].wait(timeout=10) == -signal.SIGHUP
        assert processes[1].poll() is None
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_mark_ends_with_its_process() -> None:
    name = f"test-{os.getpid()}"
    listening(name, 0).close()
    with listening(name, 0) as again:
        assert again.family == socket.AF_UNIX


def test_descendants_are_children_and_theirs() -> None:
    shell = subprocess.Popen(["sh", "-c", "sh -c 'sleep 100; :'; :"])
    try:
        assert wait_until(lambda: len(descendants(shell.pid)) == 2, seconds=10)
        assert children(shell.pid) == descendants(shell.pid)[:1]
        assert shell.pid in descendants(os.getpid())
    finally:
        for pid in [*descendants(shell.pid), shell.pid]:
            os.kill(pid, signal.SIGKILL)
        shell.wait()

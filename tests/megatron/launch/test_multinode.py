"""deepy on two hosts, through pdsh and ssh: placement, pre-flight, Ctrl-C, failures, and whatever may be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import IndexedDatasetWriter
from megatron.launch.environment import REPOSITORY
from tests.megatron.launch.cluster import HOSTS, Cluster, why_not
from tests.megatron.launch.waiting import is_running, wait_until

pytestmark = pytest.mark.multinode

TINY = ("-d", str(REPOSITORY / "configs" / "local"), "tiny", "tiny-sepllm", "-H", "hostfile", "--set", "train_batch_size=12")
SCRIPT = """
import json, os, pathlib, signal, socket, sys, time
from megatron.launch.worker import worker_config
config = worker_config()
names = ("RANK", "LOCAL_RANK", "LOCAL_SIZE", "WORLD_SIZE", "MASTER_ADDR", "FROM_FILE")
mine = {name: os.environ.get(name) for name in names} | {"host": socket.gethostname(), "pid": os.getpid()}
folder = pathlib.Path(config.checkpoint.save)
folder.mkdir(exist_ok=True)
(folder / "part").with_suffix(f".{mine['RANK']}").write_text(json.dumps(mine))
(folder / "part").with_suffix(f".{mine['RANK']}").rename(folder / f"rank{mine['RANK']}")
if config.training.seed == 1:  # waits, whatever it is asked
    signal.signal(signal.SIGTERM, lambda *_: sys.stdout.write("was asked\\n"))
    for _ in range(600):
        time.sleep(0.1)
if config.training.seed == 2:  # rank 1 fails, the others wait
    if mine["RANK"] == "1":
        time.sleep(0.5)
        raise ValueError("what rank 1 cannot bear")
    time.sleep(100)
"""
WAITS = "seed=1"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    made = Cluster(folder=tmp_path_factory.mktemp("cluster"))
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where deepy is called: a script, a hostfile with unequal hosts, `.deepspeed_env`, data."""
    place = tmp_path_factory.mktemp("job")
    (place / "ranks.py").write_text(SCRIPT)
    (place / "hostfile").write_text("node1 slots=1\nnode2 slots=2\n")
    (place / "equal").write_text("node1 slots=1\nnode2 slots=1\n")
    (place / ".deepspeed_env").write_text('# for every host\n\nFROM_FILE=a "b" 100% $HOME\n')
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(place / "text", np.uint16) as writer:
        for _ in range(200):
            writer.add_document([*random.integers(32, 127, int(random.integers(100, 300))).tolist(), 0])
    return place


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A running job."""

    process: subprocess.Popen[str]
    save: Path

    def ranks(self, count: int = 3) -> list[dict[str, str]]:
        """What each rank said of itself, once all have."""
        files = [self.save / f"rank{rank}" for rank in range(count)]
        assert wait_until(lambda: all(file.exists() for file in files) or self.process.poll() is not None, seconds=90)
        return [json.loads(file.read_text()) for file in files]

    def lines_until(self, text: str, *, times: int = 1) -> list[str]:
        """The next lines on the screen, up to the one that is the ``times``-th to hold ``text``; all of them where there are fewer."""
        assert self.process.stdout is not None
        lines: list[str] = []
        while sum(text in line for line in lines) < times and (line := self.process.stdout.readline()):
            lines.append(line)
        return lines

    def end(self, *, seconds: float = 60) -> tuple[int, str]:
        """Exit status and everything on the screen."""
        text, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, text


Start = Callable[..., Started]


@pytest.fixture
def start(cluster: Cluster, folder: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts deepy on the first host."""
    started: list[subprocess.Popen[str]] = []

    def run(*words: str, script: str = "ranks.py") -> Started:
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")  # with compiled operators, which hosts have not in their own homes
        environ = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": cache}
        save = tmp_path / f"save{len(started)}"
        command = cluster.deepy(script, *TINY, "--set", f"save={save}", "--set", "checkpoint_factor=1000", *words)
        started.append(
            subprocess.Popen(command, cwd=folder, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        )
        return Started(process=started[-1], save=save)

    yield run
    for process in started:
        process.kill()
        process.communicate()


def all_gone(ranks: list[dict[str, str]], *, seconds: float) -> bool:
    return wait_until(lambda: not any(is_running(int(rank["pid"])) for rank in ranks), seconds=seconds)


def test_ranks_are_placed_as_the_hostfile_says_and_get_the_environment(start: Start) -> None:
    job = start()
    ranks = job.ranks()
    assert job.end()[0] == 0
    assert [(rank["host"], rank["RANK"], rank["LOCAL_RANK"], rank["LOCAL_SIZE"]) for rank in ranks] == [
        ("node1", "0", "0", "1"),
        ("node2", "1", "0", "2"),
        ("node2", "2", "1", "2"),
    ]
    assert {rank["WORLD_SIZE"] for rank in ranks} == {"3"}
    assert {rank["MASTER_ADDR"] for rank in ranks} == {"10.199.8.1"}
    assert {rank["FROM_FILE"] for rank in ranks} == {'a "b" 100% $HOME'}


def test_include_may_leave_one_device_of_each_host(start: Start) -> None:
    job = start("--set", "include=node1@node2:1", "--set", "master_port=29611")
    ranks = job.ranks(2)
    assert job.end()[0] == 0
    assert [(rank["host"], rank["LOCAL_RANK"], rank["LOCAL_SIZE"]) for rank in ranks] == [("node1", "0", "1"), ("node2", "0", "1")]


def test_a_failing_rank_ends_all_hosts_and_its_traceback_is_last(start: Start) -> None:
    job = start("--set", "seed=2")
    ranks = job.ranks()
    failed_s = time.monotonic()
    status, screen = job.end()
    assert time.monotonic() - failed_s < 20
    assert status == 1
    assert "rank 1 on node2 left with status 1. The last it said:\nTraceback (most recent call last):\n" in screen
    assert screen.rstrip().endswith("ValueError: what rank 1 cannot bear")
    assert all_gone(ranks, seconds=1)


def kill(*pids: int) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def kill_deepy(cluster: Cluster, job: Started, ranks: list[dict[str, str]]) -> None:
    kill(job.process.pid)


def kill_a_rank(cluster: Cluster, job: Started, ranks: list[dict[str, str]]) -> None:
    kill(int(ranks[2]["pid"]))


def kill_a_node_launcher(cluster: Cluster, job: Started, ranks: list[dict[str, str]]) -> None:
    kill(*cluster.find("node2", "-m megatron.launch.node", "--node=1"))


def kill_an_ssh(cluster: Cluster, job: Started, ranks: list[dict[str, str]]) -> None:
    kill(*(pid for pid in cluster.find("node1", "ssh ", "-oBatchMode", " node2 ") if "pdsh" not in Path(f"/proc/{pid}/comm").read_text()))


def kill_a_pdsh(cluster: Cluster, job: Started, ranks: list[dict[str, str]]) -> None:
    kill(*cluster.find("node1", "pdsh -S", " node2 "))


def crash_a_host(cluster: Cluster, job: Started, ranks: list[dict[str, str]]) -> None:
    cluster.crash("node2")


@pytest.mark.parametrize("damage", [kill_deepy, kill_a_rank, kill_a_node_launcher, kill_an_ssh, kill_a_pdsh, crash_a_host])
def test_whatever_is_killed_no_rank_is_left_on_any_host(
    damage: Callable[[Cluster, Started, list[dict[str, str]]], None], cluster: Cluster, start: Start
) -> None:
    job = start("--no-preflight", "--set", WAITS)
    ranks = job.ranks()
    damage(cluster, job, ranks)
    assert all_gone(ranks, seconds=30)
    status, screen = job.end()
    assert status != 0
    if damage is kill_a_rank:
        assert status == 137
        assert "rank 2 on node2 was ended by SIGKILL" in screen.splitlines()[-1]
    elif damage is not kill_deepy:
        assert "node2: the connection, or the process that starts the ranks there, was lost" in screen.splitlines()[-1]
    assert wait_until(lambda: not any(cluster.find(host, "megatron.launch") for host in HOSTS), seconds=10)


@pytest.mark.slow
def test_a_host_that_falls_silent_is_noticed(cluster: Cluster, start: Start) -> None:
    job = start("--no-preflight", "--set", WAITS)
    ranks = job.ranks()
    cluster.cable("node2", is_up=False)
    try:
        status, screen = job.end(seconds=90)
        assert status == 255
        assert "node2: the connection, or the process that starts the ranks there, was lost" in screen
        assert not is_running(int(ranks[0]["pid"]))
    finally:
        cluster.cable("node2", is_up=True)
        cluster.crash("node2")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_deepy_ends_its_own_job_and_no_other(number: signal.Signals, start: Start) -> None:
    other, job = start("--no-preflight", "--set", WAITS), start("--no-preflight", "--set", WAITS)
    others, ranks = other.ranks(), job.ranks()
    job.process.send_signal(number)
    assert sum("was asked" in line for line in job.lines_until("was asked", times=3)) == 3
    assert all(is_running(int(rank["pid"])) for rank in ranks)
    job.process.send_signal(number)
    status, screen = job.end()
    assert status != 0
    assert "Traceback" not in screen
    assert all_gone(ranks, seconds=1)
    assert all(is_running(int(rank["pid"])) for rank in others)


def test_training_runs_on_two_hosts_and_saves_when_interrupted(start: Start, folder: Path) -> None:
    keys = ("--set", f"data_path={folder}/text", "--set", "hostfile=equal", "--set", "train_iters=100000", "--set", "eval_interval=100000")
    job = start(*keys, script="train.py")
    seen = job.lines_until("       3/  100000")
    job.process.send_signal(signal.SIGINT)
    status, screen = job.end(seconds=90)
    assert status == 0, [*seen, screen]
    step = int((job.save / "latest").read_text().removeprefix("global_step"))
    assert step >= 3
    assert (job.save / f"global_step{step}").is_dir()


def refusal(start: Start, *words: str, script: str = "ranks.py") -> str:
    job = start(*words, script=script)
    status, screen = job.end()
    assert status == 2, screen
    assert "Traceback" not in screen
    return screen


def test_preflight_names_hosts_that_ssh_does_not_reach(start: Start, folder: Path) -> None:
    (folder / "wrong").write_text("node1 slots=1\nnode3 slots=1\n")
    told = refusal(start, "--set", "hostfile=wrong")
    assert "node3: no answer: ssh does not get there: make `ssh -o BatchMode=yes node3 true` work" in told
    assert not any(line.startswith("node1:") for line in told.splitlines())


def test_preflight_finds_a_taken_port(cluster: Cluster, start: Start) -> None:
    listener = "import socket, sys; s = socket.socket(); s.bind(('', 29612)); s.listen(); print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen(cluster.command("node1", sys.executable, "-c", listener), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert "node1: master_port 29612 is in use" in refusal(start, "--set", "master_port=29612")


def test_preflight_tells_which_host_lacks_the_data_and_the_shared_folder(cluster: Cluster, start: Start, folder: Path) -> None:
    own = cluster.folder / "own"
    for suffix in (".bin", ".idx"):
        (own / f"text{suffix}").write_bytes((folder / f"text{suffix}").read_bytes())
    keys = ("--set", "hostfile=equal", "--set", f"save={own}/save", "--set", f"data_path={own}/text")
    told = refusal(start, *keys, script="train.py")
    assert f"node2: data_path: {own}/text.bin and {own}/text.idx do not exist" in told
    assert f"node2: save ({own}/save) is not the folder that the first host sees" in told
    assert not any(line.startswith("node1:") for line in told.splitlines())
    assert not list(own.glob(".sepllm*"))


def test_without_a_shared_file_system_every_host_may_have_its_own_folder(cluster: Cluster, start: Start, folder: Path) -> None:
    own = cluster.folder / "own"
    keys = ("--set", "hostfile=equal", "--set", f"save={own}/save", "--set", f"data_path={folder}/text")
    assert "is not the folder that the first host sees" in refusal(start, *keys, script="train.py")
    job = start(*keys, "--set", "use_shared_fs=false", "--set", "train_iters=1", "--set", "eval_iters=0", script="train.py")
    status, screen = job.end(seconds=90)
    assert status == 0, screen
    assert (own / "save" / "latest").exists()

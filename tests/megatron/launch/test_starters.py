"""Whoever starts the ranks - deepy, torchrun, srun, mpirun through DeepSpeed's runner - the training is the same, and ends as asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import IndexedDatasetWriter
from megatron.launch.environment import REPOSITORY
from tests.megatron.launch.waiting import is_running, wait_until
from tests.megatron.training.running import free_port, launcher_variables

STEPS = 2
TINY = ("-d", str(REPOSITORY / "configs" / "local"), "tiny", "tiny-sepllm", "--set", "eval_iters=0", "--set", "eval_interval=100000")
TRAIN = str(REPOSITORY / "train.py")
DEEPY = str(REPOSITORY / "deepy.py")
MPIRUN = f"""#!{sys.executable}
import json, os, signal, subprocess, sys
words = sys.argv[1:]
open("mpirun.json", "w").write(json.dumps(words))
count = int(words[words.index("-n") + 1])
exported = dict(words[place + 1].split("=", 1) for place, word in enumerate(words) if word == "-x")
command = words[words.index(sys.executable):]
ranks = []
for rank in range(count):
    own = dict(OMPI_COMM_WORLD_RANK=str(rank), OMPI_COMM_WORLD_LOCAL_RANK=str(rank), OMPI_COMM_WORLD_SIZE=str(count))
    ranks.append(subprocess.Popen(command, env=os.environ | exported | own, start_new_session=True))
open("pids", "w").write(" ".join(str(rank.pid) for rank in ranks))
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: [rank.send_signal(number) for rank in ranks])
sys.exit(max(rank.wait() for rank in ranks))
"""
"""As Open MPI's, so far as deepy can see: it starts the ranks, passes USR1 on, and waits."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of a pair of token files."""
    prefix = tmp_path_factory.mktemp("data") / "text"
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(100):
            writer.add_document([*random.integers(32, 127, int(random.integers(100, 300))).tolist(), 0])
    return str(prefix)


@pytest.fixture(scope="module")
def environ() -> dict[str, str]:
    found = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return {name: value for name, value in found.items() if name not in launcher_variables()}


def keys(data: str, save: Path, **more: object) -> list[str]:
    """Trains for ever, unless ``more`` says otherwise."""
    changes = {"data_path": data, "save": save, "train_iters": 100000, "checkpoint_factor": 100000, **more}
    return [*TINY, *(word for key, value in changes.items() for word in ("--set", f"{key}={value}"))]


def losses(save: Path) -> list[float]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [line["train/lm_loss"] for line in lines if "train/lm_loss" in line]


def by_torchrun(words: list[str], environ: dict[str, str]) -> list[subprocess.Popen[str]]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", TRAIN, *words]
    return [subprocess.Popen(torchrun, env=environ, text=True)]


def by_srun(words: list[str], environ: dict[str, str]) -> list[subprocess.Popen[str]]:
    """What srun gives its two tasks."""
    shared = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    tasks = [environ | shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    return [subprocess.Popen([sys.executable, TRAIN, *words], env=task, text=True) for task in tasks]


@pytest.fixture(scope="module")
def interrupted(data: str, environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Exit status and folder of a run of two ranks that deepy has started, interrupted after its first steps."""
    folder = tmp_path_factory.mktemp("deepy")
    command = [sys.executable, DEEPY, "train.py", *keys(data, folder / "save", num_gpus=2)]
    return interrupt(command, folder, environ), folder / "save"


def interrupt(command: list[str], folder: Path, environ: dict[str, str]) -> int:
    """Status of a run that gets INT when it has logged ``STEPS`` steps below ``folder/save``."""
    process = subprocess.Popen(command, cwd=folder, env=environ)
    file = folder / "save" / "metrics.jsonl"
    try:
        assert wait_until(lambda: process.poll() is not None or (file.exists() and len(losses(folder / "save")) >= STEPS), seconds=120)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        return process.wait(timeout=60)
    finally:
        process.kill()


def saved_step(save: Path) -> int:
    return int((save / "latest").read_text().removeprefix("global_step"))


def test_interrupted_deepy_saves_and_leaves_with_status_0(interrupted: tuple[int, Path]) -> None:
    status, save = interrupted
    assert status == 0
    assert saved_step(save) == len(losses(save)) >= STEPS


@pytest.mark.parametrize("start", [by_torchrun, by_srun])
def test_training_started_directly_is_training_started_by_deepy(
    start: Callable[[list[str], dict[str, str]], list[subprocess.Popen[str]]],
    data: str,
    environ: dict[str, str],
    tmp_path: Path,
    interrupted: tuple[int, Path],
) -> None:
    processes = start(keys(data, tmp_path / "save", exit_interval=STEPS), environ)
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()
    assert losses(tmp_path / "save") == losses(interrupted[1])[:STEPS]


def fake_openmpi(folder: Path) -> None:
    for name, text in {"mpirun": MPIRUN, "ompi_info": "#!/bin/sh\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "hostfile").write_text("localhost slots=2\n")


def test_mpirun_gets_its_arguments_and_the_signal_that_it_passes_on(
    data: str, environ: dict[str, str], tmp_path: Path, interrupted: tuple[int, Path]
) -> None:
    fake_openmpi(tmp_path)
    starter = {"launcher": "openmpi", "launcher_args": "--bind-to none", "force_multi": "true", "hostfile": "hostfile", "no_ssh_check": "true"}
    command = [sys.executable, DEEPY, "train.py", *keys(data, tmp_path / "save", master_port=free_port(), **starter)]
    assert interrupt(command, tmp_path, environ | {"PATH": f"{tmp_path}:{environ['PATH']}"}) == 0
    assert saved_step(tmp_path / "save") >= STEPS
    assert losses(tmp_path / "save")[:STEPS] == losses(interrupted[1])[:STEPS]
    given = json.loads((tmp_path / "mpirun.json").read_text())
    assert given[:4] == ["-n", "2", "-hostfile", "hostfile"]
    assert "--bind-to none" in " ".join(given)
    assert TRAIN in given
    assert not any(is_running(int(pid)) for pid in (tmp_path / "pids").read_text().split())

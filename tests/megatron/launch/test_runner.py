"""The process that starts the workers, to the letter, and how its end is passed on."""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.config.loader import config_to_json
from megatron.config.schema import Config
from megatron.launch import runner
from megatron.launch.environment import KEEP_FREED_MEMORY, REPOSITORY
from megatron.launch.resources import Resources
from megatron.launch.worker import worker_config

TinyConfig = Callable[..., Config]
SCRIPT = Path("/somewhere/train.py")
QUIET = ("--no_local_rank", "--log_level=warning")
NODE_LAUNCHER = (sys.executable, "-u", "-m", "deepspeed.launcher.launch")
RUNNER = (sys.executable, "-u", "-m", "deepspeed.launcher.runner")


@pytest.fixture(autouse=True)
def port_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_bind", lambda port: port or 54321)


def two_hosts(tmp_path: Path) -> Resources:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("a slots=2\nb slots=2\n")
    return Resources(hosts={"a": (0, 1), "b": (0, 1)}, device="cpu", hostfile=hostfile)


def test_one_host_is_started_by_the_node_launcher(tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny(world_size=2)
    resources = Resources(hosts={"localhost": (0, 1)}, device="cpu")
    job = runner.make_job(config, resources, script=SCRIPT, folder=tmp_path, environ={})
    world = base64.urlsafe_b64encode(b'{"localhost": [0, 1]}').decode()
    places = (f"--world_info={world}", "--master_addr=127.0.0.1", "--master_port=54321")
    assert job.command == (*NODE_LAUNCHER, *places, *QUIET, str(SCRIPT), "--config", f"{tmp_path}/config.json")
    assert job.files == {tmp_path / "config.json": config_to_json(config)}
    assert job.variables.keys() == {"DS_ACCELERATOR", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "PYTHONPATH", *KEEP_FREED_MEMORY}


def test_slots_keep_the_names_cuda_gives_them(tiny: TinyConfig, tmp_path: Path) -> None:
    resources = Resources(hosts={"localhost": (2, "GPU-x")}, device="cuda")
    job = runner.make_job(tiny(world_size=2), resources, script=SCRIPT, folder=tmp_path, environ={})
    world = next(argument for argument in job.command if argument.startswith("--world_info="))
    assert json.loads(base64.urlsafe_b64decode(world.removeprefix("--world_info="))) == {"localhost": [2, "GPU-x"]}


def test_several_hosts_are_started_by_the_runner_with_the_configuration_on_its_command_line(tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny(world_size=4)
    resources = two_hosts(tmp_path)
    job = runner.make_job(config, resources, script=SCRIPT, folder=tmp_path, environ={})
    text = runner.encode_config(config)
    assert job.command == (*RUNNER, f"--hostfile={resources.hostfile}", *QUIET, str(SCRIPT), "--config-base64", text)
    assert job.files == {}
    assert job.variables == {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    assert len(text) < 100_000
    assert worker_config(["--config-base64", text], environ={"TORCH_EXTENSIONS_DIR": "/x"}) == config


def test_runner_flags_appear_where_they_differ_from_its_defaults(tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny(
        world_size=4,
        num_nodes=2,
        num_gpus=2,
        master_port=29501,
        master_addr="10.0.0.1",
        launcher="openmpi",
        launcher_args="--bind-to none",
        no_ssh_check=True,
    )
    job = runner.make_job(config, two_hosts(tmp_path), script=SCRIPT, folder=tmp_path, environ={})
    flags = [argument for argument in job.command[4:] if argument.startswith("--") and "hostfile" not in argument]
    assert flags == [
        *("--num_nodes=2", "--num_gpus=2", "--master_port=29501", "--master_addr=10.0.0.1", "--launcher=openmpi"),
        *("--launcher_args=--bind-to none", "--no_ssh_check", *QUIET, "--config-base64"),
    ]


def test_deepspeeds_runner_reads_its_flags_and_ours_apart(tiny: TinyConfig, tmp_path: Path) -> None:
    from deepspeed.launcher.runner import parse_args

    config = tiny(world_size=4, include="a@b", force_multi=True, launcher="slurm")
    job = runner.make_job(config, two_hosts(tmp_path), script=SCRIPT, folder=tmp_path, environ={})
    read = parse_args(list(job.command[4:]))
    assert (read.include, read.force_multi, read.launcher, read.no_local_rank) == ("a@b", True, "slurm", True)
    assert (read.user_script, read.user_args) == (str(SCRIPT), ["--config-base64", runner.encode_config(config)])


def test_force_multi_takes_the_runner_for_one_host(tiny: TinyConfig, tmp_path: Path) -> None:
    resources = Resources(hosts={"a": (0,)}, device="cpu", hostfile=tmp_path / "hostfile")
    job = runner.make_job(tiny(force_multi=True), resources, script=SCRIPT, folder=tmp_path, environ={})
    assert job.command[:4] == RUNNER
    assert "--force_multi" in job.command


def test_a_launcher_that_reaches_no_other_host_is_refused(tiny: TinyConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="launcher torchrun does not start workers on other hosts"):
        runner.make_job(tiny(world_size=4, launcher="torchrun"), two_hosts(tmp_path), script=SCRIPT, folder=tmp_path, environ={})


def test_the_default_port_is_any_free_one_and_a_chosen_one_in_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(port: int) -> int:
        if port != 0:
            raise OSError("in use")
        return 54321

    monkeypatch.setattr(runner, "_bind", bind)
    assert runner._free_port(runner.DEFAULT_PORT) == 54321
    with pytest.raises(ValueError, match="master_port 29512 is in use"):
        runner._free_port(29512)


def test_a_script_is_found_beside_deepy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert runner.find_script("deepy.py") == REPOSITORY / "deepy.py"
    (tmp_path / "deepy.py").touch()
    assert runner.find_script("deepy.py") == tmp_path / "deepy.py"
    with pytest.raises(ValueError, match=r"script nowhere\.py is neither"):
        runner.find_script("nowhere.py")


@pytest.mark.parametrize(("code", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137)])
def test_the_status_of_the_job_is_returned(code: str, status: int) -> None:
    job = runner.Job(command=("sh", "-c", code), variables={}, files={})
    assert runner.run(job, os.environ) == status


def test_an_interrupt_ends_the_job_by_term_and_comes_back_as_its_status(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = f"import pathlib, signal, sys; signal.signal(15, lambda *_: sys.exit(9)); pathlib.Path({str(ready)!r}).touch(); signal.pause()"
    job = runner.Job(command=(sys.executable, "-c", script), variables={}, files={})
    finished = threading.Event()

    def interrupt() -> None:
        while not ready.exists() and not finished.wait(0.01):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=interrupt)
    sender.start()
    assert runner.run(job, os.environ) == 9
    finished.set()
    sender.join()

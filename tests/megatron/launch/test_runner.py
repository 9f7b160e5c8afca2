"""What a job is started with, to the letter: on one host, through pdsh, through DeepSpeed's runner."""

from __future__ import annotations

import base64
import shlex
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import pytest

from megatron.config.schema import Config
from megatron.launch import pdsh, ports, runner
from megatron.launch.environment import REPOSITORY
from megatron.launch.node import Placement
from megatron.launch.pdsh import Connection, Said, exported, pdsh_command, remote_command
from megatron.launch.resources import Resources
from megatron.launch.worker import encode_config, worker_config

TinyConfig = Callable[..., Config]
SCRIPT = Path("/somewhere/train.py")
QUIET = ("--no_local_rank", "--log_level=warning")
RUNNER = (sys.executable, "-u", "-m", "deepspeed.launcher.runner")


def two_hosts(tmp_path: Path) -> Resources:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("a slots=2\nb slots=2\n")
    return Resources(hosts={"a": (0, 1), "b": (0, 1)}, device="cpu", hostfile=hostfile)


def test_what_a_node_is_told_says_where_its_ranks_run_and_what_they_do(tiny: TinyConfig) -> None:
    config = tiny(world_size=2)
    job = runner.make_job(config, Resources(hosts={"localhost": (0, 1)}, device="cpu"), script=SCRIPT)
    words = job.node_words(job.placement(port=54321), 0, is_remote=False)
    world = base64.urlsafe_b64encode(b'{"localhost": [0, 1]}').decode()
    places = (f"--world={world}", "--node=0", "--device=cpu", "--master-addr=127.0.0.1", "--master-port=54321")
    assert words == ("-m", "megatron.launch.node", *places, str(SCRIPT), "--config-base64", encode_config(config))
    assert worker_config(words[-2:], environ={"TORCH_EXTENSIONS_DIR": "/x"}) == config
    assert len(words[-1]) < 100_000


def test_ranks_count_over_hosts_of_unequal_size_and_local_ranks_within_them() -> None:
    placement = Placement(hosts={"a": (0,), "b": (1, 3), "c": ("GPU-x",)}, device="cuda", master_addr="a", master_port=1)
    told = [placement.variables(node, rank) for node in range(3) for rank in placement.ranks(node)]
    assert [(of["RANK"], of["LOCAL_RANK"], of["LOCAL_SIZE"], of["CROSS_RANK"]) for of in told] == [
        ("0", "0", "1", "0"),
        ("1", "0", "2", "1"),
        ("2", "1", "2", "1"),
        ("3", "0", "1", "2"),
    ]
    assert [of["CUDA_VISIBLE_DEVICES"] for of in told] == ["0", "1,3", "1,3", "GPU-x"]
    assert {(of["WORLD_SIZE"], of["MASTER_ADDR"], of["MASTER_PORT"], of["CROSS_SIZE"]) for of in told} == {("4", "a", "1", "3")}


def test_a_dry_run_prints_what_each_host_and_rank_is_given(tiny: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    job = runner.make_job(tiny(world_size=4, master_port=29501), two_hosts(tmp_path), script=SCRIPT)
    lines = runner.dry_run(job, {"NCCL_DEBUG": "INFO", "SECRET": "x"}).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("#")] == ["a:", "a:", "b:", "b:"]
    assert "RANK=3 LOCAL_RANK=1" in lines[4]
    command = lines[5]
    assert command.startswith(
        f"cd {tmp_path} && exec env NCCL_DEBUG=INFO PYTHONPATH={REPOSITORY} {sys.executable} -u -m megatron.launch.node --world="
    )
    assert "--node=1 --device=cpu --master-addr=a --master-port=29501 /somewhere/train.py" in command
    assert "SECRET" not in command


def test_the_environment_of_other_hosts_is_named_variables_and_deepspeed_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    (home / ".deepspeed_env").write_text("A=home\nB=home\n")
    (here / ".deepspeed_env").write_text('# a comment\n\nB=with spaces = and "quotes"\n')
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    given = exported({"NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "0", "PATH": "/bin"})
    assert given == {"NCCL_DEBUG": "INFO", "A": "home", "B": 'with spaces = and "quotes"', "PYTHONPATH": str(REPOSITORY)}
    (here / "other").write_text("no equals sign\n")
    with pytest.raises(ValueError, match="other, line 1: 'no equals sign' is not of the form NAME=VALUE"):
        exported({"DS_ENV_FILE": "other"})


def test_a_remote_shell_reads_every_value_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    command = remote_command(("-c", "print(1)"), {"A": 'it\'s $HOME "50%"', "B": ""})
    assert shlex.split(command.partition("exec ")[2]) == ["env", 'A=it\'s $HOME "50%"', "B=", sys.executable, "-u", "-c", "print(1)"]
    monkeypatch.setattr(pdsh.shutil, "which", lambda name: name)
    assert pdsh_command("a", "echo 50%", "-t 3") == ["pdsh", "-S", "-N", "-t", "3", "-w", "a", "echo 50%%"]


def test_a_command_longer_than_linux_passes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdsh.shutil, "which", lambda name: name)
    with pytest.raises(ValueError, match=r"The command for a has 140,000 characters, and Linux passes 130,000"):
        pdsh_command("a", "x" * 140_000, "")


def test_without_pdsh_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdsh.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"pdsh is not installed.*apt-get install pdsh"):
        pdsh_command("a", "x", "")


def test_what_a_host_tells_is_heard_behind_a_line_that_a_rank_has_not_ended_and_past_one_that_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """#!/bin/sh
printf 'loss 3.5 job7 failed {"rank": 0}\\n'
printf 'job7 failed {"rank": anot'
printf 'her rank speaks\\nplain\\njob7 ended {"status": 1}\\n'
"""
    (tmp_path / "pdsh").write_text(script)
    (tmp_path / "pdsh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    events: SimpleQueue[Said] = SimpleQueue()
    shown: list[str] = []
    connection = Connection("a", "x", job="job7", events=events, show=lambda text, stream: shown.append(text))
    heard = [events.get(timeout=20) for _ in range(3)]
    connection.close()
    assert [(said.event, said.content) for said in heard] == [("failed", {"rank": 0}), ("ended", {"status": 1}), ("closed", {})]
    assert shown == ["a: loss 3.5 \n", 'a: job7 failed {"rank": another rank speaks\n', "a: plain\n"]


def test_runner_flags_appear_where_they_differ_from_its_defaults(tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny(world_size=4, num_nodes=2, num_gpus=2, master_port=29501, launcher="openmpi", launcher_args="--bind-to none", no_ssh_check=True)
    job = runner.make_job(config, two_hosts(tmp_path), script=SCRIPT)
    command = runner.runner_command(job)
    assert command[:4] == RUNNER
    assert command[4:-3] == (
        *(f"--hostfile={tmp_path}/hostfile", "--num_nodes=2", "--num_gpus=2", "--master_port=29501", "--master_addr=a", "--launcher=openmpi"),
        *("--launcher_args=--bind-to none", "--no_ssh_check", *QUIET),
    )
    assert worker_config(command[-2:], environ={"TORCH_EXTENSIONS_DIR": "/x"}).launch.master_addr == "a"


def test_deepspeeds_runner_reads_its_flags_and_ours_apart(tiny: TinyConfig, tmp_path: Path) -> None:
    from deepspeed.launcher.runner import parse_args

    job = runner.make_job(tiny(world_size=4, include="a@b", force_multi=True, launcher="slurm"), two_hosts(tmp_path), script=SCRIPT)
    read = parse_args(list(runner.runner_command(job)[4:]))
    assert (read.include, read.force_multi, read.launcher, read.no_local_rank) == ("a@b", True, "slurm", True)
    assert (read.user_script, read.user_args) == (str(SCRIPT), ["--config-base64", encode_config(job.config)])


def test_force_multi_takes_pdsh_for_one_host(tiny: TinyConfig) -> None:
    resources = Resources(hosts={"localhost": (0,)}, device="cpu", hostfile=Path("hostfile"))
    assert runner.make_job(tiny(), resources, script=SCRIPT).is_local
    assert not runner.make_job(tiny(force_multi=True), resources, script=SCRIPT).is_local


def test_a_single_host_that_is_another_machine_is_not_taken_for_this_one(tiny: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {"here": "127.0.0.1", "there": "192.0.2.1"}  # the second is of the block for examples (RFC 5737), which no machine has

    def find(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if host not in addresses:
            raise socket.gaierror
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (addresses[host], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", find)
    hosts = {name: Resources(hosts={name: (0,)}, device="cpu", hostfile=Path("hostfile")) for name in ("here", "there", "user@there", "nowhere")}
    for name in ("here", "nowhere"):
        assert runner.make_job(tiny(), hosts[name], script=SCRIPT).is_local
    for name in ("there", "user@there"):
        with pytest.raises(ValueError, match=f"The only host is {name}, which is another machine than this: set force_multi to true"):
            runner.make_job(tiny(), hosts[name], script=SCRIPT)
    runner.make_job(tiny(force_multi=True), hosts["there"], script=SCRIPT)


def test_a_launcher_that_reaches_no_other_host_is_refused(tiny: TinyConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="launcher torchrun does not start workers on other hosts"):
        runner.make_job(tiny(world_size=4, launcher="torchrun"), two_hosts(tmp_path), script=SCRIPT)


def test_two_jobs_never_share_a_name(tiny: TinyConfig) -> None:
    resources = Resources(hosts={"localhost": (0,)}, device="cpu")
    assert len({runner.make_job(tiny(), resources, script=SCRIPT).name for _ in range(10)}) == 10


def test_the_default_port_is_any_free_one_and_a_chosen_one_in_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(port: int) -> int:
        if port != 0:
            raise OSError("in use")
        return 54321

    monkeypatch.setattr(ports, "_bind", bind)
    assert ports.free_port(ports.DEFAULT_PORT) == 54321
    with pytest.raises(ValueError, match="master_port 29512 is in use"):
        ports.free_port(29512)


def test_a_script_is_found_beside_deepy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert runner.find_script("deepy.py") == REPOSITORY / "deepy.py"
    (tmp_path / "deepy.py").touch()
    assert runner.find_script("deepy.py") == tmp_path / "deepy.py"
    with pytest.raises(ValueError, match=r"script nowhere\.py is neither"):
        runner.find_script("nowhere.py")

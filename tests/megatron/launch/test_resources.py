"""Hosts and devices: hostfiles, filters, this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron.config.schema import LaunchConfig
from megatron.launch import resources
from megatron.launch.resources import find_resources, read_hostfile, visible_gpus

CPU = {"DS_ACCELERATOR": "cpu"}


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hostfile"
    path.write_text("# two hosts\nworker-0 slots=4\n\nworker-1 slots=2  # smaller\n")
    return str(path)


def hosts_of(**keys: object) -> dict[str, tuple[int | str, ...]]:
    return find_resources(LaunchConfig.model_validate(keys), CPU).hosts


def test_hosts_come_in_the_order_of_the_file(hostfile: str) -> None:
    assert list(hosts_of(hostfile=hostfile).items()) == [("worker-0", (0, 1, 2, 3)), ("worker-1", (0, 1))]


def test_the_environment_may_name_the_hostfile(hostfile: str) -> None:
    found = find_resources(LaunchConfig(), CPU | {"DLTS_HOSTFILE": hostfile})
    assert found.world_size == 6
    assert found.hostfile == Path(hostfile)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("worker-0 slots=4\nworker-0 slots=2\n", "line 2: host worker-0 is listed twice"),
        ("worker-0 gpus=4\n", "line 1: 'worker-0 gpus=4' is not of the form"),
        ("worker-0 slots=0\n", "at least 1"),
        ("worker-0\n", "is not of the form"),
        ("# nothing\n", "names no host"),
        ("node[0-3] slots=4\n", r"line 1: .node\[0-3\]. is no name that pdsh takes as it is"),
        ("fe80::1 slots=4\n", "nor are IPv6 addresses"),
    ],
)
def test_a_wrong_hostfile_is_refused_with_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_hostfile(path)


def test_a_hostfile_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="hostfile nowhere does not exist"):
        hosts_of(hostfile="nowhere")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"include": "worker-1"}, {"worker-1": (0, 1)}),
        ({"include": "worker-1:1@worker-0:0,2"}, {"worker-0": (0, 2), "worker-1": (1,)}),
        ({"exclude": "worker-0"}, {"worker-1": (0, 1)}),
        ({"exclude": "worker-0:0,3"}, {"worker-0": (1, 2), "worker-1": (0, 1)}),
        ({"num_nodes": 1}, {"worker-0": (0, 1, 2, 3)}),
        ({"num_gpus": 2}, {"worker-0": (0, 1), "worker-1": (0, 1)}),
        ({"num_nodes": -1, "num_gpus": -1}, {"worker-0": (0, 1, 2, 3), "worker-1": (0, 1)}),
        ({"num_nodes": -1, "num_gpus": -1, "include": "worker-1"}, {"worker-1": (0, 1)}),
    ],
)
def test_filters_choose_hosts_and_slots(hostfile: str, keys: dict[str, object], expected: dict[str, tuple[int, ...]]) -> None:
    assert hosts_of(hostfile=hostfile, **keys) == expected


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"include": "worker-0", "exclude": "worker-1"}, "include and exclude are both given"),
        ({"include": "worker-0", "num_gpus": 1}, "cannot be combined"),
        ({"include": "worker-9"}, "names host 'worker-9', which is not among worker-0, worker-1"),
        ({"exclude": "worker-1:7"}, "names slot 7 of worker-1, which has 0, 1"),
        ({"include": "worker-1:a"}, "is not of the form host or host:0,2"),
        ({"exclude": "worker-0@worker-1"}, "leaves no device"),
        ({"num_nodes": 3}, "num_nodes is 3, but the hostfile names 2 hosts"),
        ({"num_gpus": 4}, "num_gpus is 4, but worker-1 has 2 devices"),
    ],
)
def test_filters_that_cannot_be_met_are_refused(hostfile: str, keys: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        hosts_of(hostfile=hostfile, **keys)


def test_without_a_gpu_num_gpus_is_the_number_of_processes() -> None:
    assert hosts_of() == {"localhost": (0,)}
    assert hosts_of(num_gpus=2) == {"localhost": (0, 1)}
    with pytest.raises(ValueError, match="num_gpus is 0"):
        hosts_of(num_gpus=0)
    with pytest.raises(ValueError, match="num_nodes is 2, but there is no hostfile"):
        hosts_of(num_nodes=2)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, (0, 1, 2, 3)), ("2,3", (2, 3)), ("", ()), ("-1", ()), ("1,9,2", (1,)), ("GPU-abc, 0", ("GPU-abc", 0))],
)
def test_visible_gpus_follow_cuda_visible_devices(monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: tuple[int | str, ...]) -> None:
    monkeypatch.setattr(resources, "count_gpus", lambda: 4)
    assert visible_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == expected


def test_gpus_of_this_machine_are_used_and_num_gpus_takes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "count_gpus", lambda: 4)
    environ = {"CUDA_VISIBLE_DEVICES": "2,3"}
    found = find_resources(LaunchConfig(), environ)
    assert (found.device, found.hosts) == ("cuda", {"localhost": (2, 3)})
    assert find_resources(LaunchConfig(num_gpus=1), environ).hosts == {"localhost": (2,)}
    with pytest.raises(ValueError, match="num_gpus is 3, but localhost has 2 devices"):
        find_resources(LaunchConfig(num_gpus=3), environ)


def test_gpus_are_counted_from_the_list_of_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\necho '  MIG 1g.18gb Device 0: (UUID: MIG-1)'\necho 'GPU 1: NVIDIA H200 (UUID: GPU-2)'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert resources.count_gpus() == 2


def test_asking_for_cuda_where_there_is_no_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "count_gpus", lambda: 0)
    with pytest.raises(ValueError, match="this machine shows no GPU"):
        find_resources(LaunchConfig(), {"DS_ACCELERATOR": "cuda"})
    with pytest.raises(ValueError, match="this project runs on cuda and cpu"):
        find_resources(LaunchConfig(), {"DS_ACCELERATOR": "xpu"})


@pytest.mark.parametrize(("flags", "has_fp16"), [("fpu avx512_fp16", True), ("fp asimdhp", True), ("fpu avx512f f16c", False)])
def test_a_processor_says_whether_it_computes_in_fp16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, has_fp16: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}")
    monkeypatch.setattr(resources, "_CPU_INFO", tmp_path / "cpuinfo")
    assert resources.computes_in_fp16("cpu") == has_fp16
    assert resources.computes_in_fp16("cuda")


def test_a_driver_that_hangs_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 60)

    monkeypatch.setattr(resources.shutil, "which", lambda name: name)
    monkeypatch.setattr(resources.subprocess, "run", hang)
    with pytest.raises(ValueError, match="nvidia-smi has not answered in a minute"):
        find_resources(LaunchConfig(), {})

"""Which hosts and devices a job runs on: hostfile, filters, or this machine. Counts GPUs without torch.

A *slot* names one device of a host: its number, or what CUDA_VISIBLE_DEVICES calls it.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron.config.schema import LaunchConfig
from megatron.launch.node import Slots

DEFAULT_HOSTFILE = Path("/job/hostfile")
LOCALHOST = "localhost"
_CPU_INFO = Path("/proc/cpuinfo")
_HOST = re.compile(r"(\w[\w.-]*@)?\w[\w.-]*")
"""A host as ssh calls it, with or without a user. pdsh reads brackets and commas as several, a colon as a way to get there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """The hosts of a job, in the order of their ranks."""

    hosts: dict[str, Slots]
    device: Literal["cuda", "cpu"]
    hostfile: Path | None = None
    """Where the hosts were read. None: this machine."""

    @property
    def world_size(self) -> int:
        return sum(len(slots) for slots in self.hosts.values())


def find_resources(launch: LaunchConfig, environ: Mapping[str, str]) -> Resources:
    """Hosts and devices that this configuration asks for. ValueError where it asks for what is not there."""
    if launch.include and launch.exclude:
        raise ValueError("include and exclude are both given: keep one of them.")
    if (launch.include or launch.exclude) and any(count is not None and count >= 0 for count in (launch.num_nodes, launch.num_gpus)):
        raise ValueError("num_nodes and num_gpus cannot be combined with include or exclude: name the devices, or their number.")
    device = device_kind(environ)
    hostfile = find_hostfile(launch, environ)
    if hostfile is None:
        if (launch.num_nodes or 1) > 1:
            raise ValueError(f"num_nodes is {launch.num_nodes}, but there is no hostfile: name the hosts in one (`host slots=N` lines).")
        return Resources(hosts=_select({LOCALHOST: _local_slots(launch, environ, device)}, launch), device=device)
    hosts: dict[str, Slots] = {host: tuple(range(slots)) for host, slots in read_hostfile(hostfile).items()}
    return Resources(hosts=_select(hosts, launch), device=device, hostfile=hostfile)


def find_hostfile(launch: LaunchConfig, environ: Mapping[str, str]) -> Path | None:
    """The hostfile of the configuration, else of DLTS_HOSTFILE, else /job/hostfile where it exists."""
    named = launch.hostfile or environ.get("DLTS_HOSTFILE")
    if named:
        if not Path(named).is_file():
            raise ValueError(f"hostfile {named} does not exist: correct its path, or leave it out to run on this machine.")
        return Path(named)
    return DEFAULT_HOSTFILE if DEFAULT_HOSTFILE.is_file() else None


def read_hostfile(path: Path) -> dict[str, int]:
    """Number of slots of each host, in the order of the file: lines of `host slots=N`, `#` comments."""
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", entry)
        if match is None or int(match[2]) == 0:
            raise ValueError(f"{path}, line {number}: {entry!r} is not of the form `host slots=N` with N of at least 1.")
        if not _HOST.fullmatch(match[1]):
            raise ValueError(f"{path}, line {number}: {match[1]!r} is no name that pdsh takes as it is (nor are IPv6 addresses): name the host.")
        if match[1] in hosts:
            raise ValueError(f"{path}, line {number}: host {match[1]} is listed twice: give it one line with all its slots.")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ValueError(f"{path} names no host: write lines of the form `host slots=N`.")
    return hosts


def is_elsewhere(host: str) -> bool:
    """Whether this is the name of another machine: none of its addresses is one of this machine's. A name without addresses may be this one's."""
    try:
        found = socket.getaddrinfo(host.rpartition("@")[2], None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return not any(_is_own(family, address) for family, _, _, _, address in found)


def _is_own(family: int, address: tuple[object, ...]) -> bool:
    with socket.socket(family) as listener:
        try:
            listener.bind(address)
        except OSError:
            return False
        return True


def _select(hosts: dict[str, Slots], launch: LaunchConfig) -> dict[str, Slots]:
    """What include or exclude, or num_nodes and num_gpus, leave of the hosts."""
    if launch.include or launch.exclude:
        return _filtered(hosts, launch)
    if launch.num_nodes is not None and launch.num_nodes >= 0:
        if not 1 <= launch.num_nodes <= len(hosts):
            raise ValueError(f"num_nodes is {launch.num_nodes}, but the hostfile names {len(hosts)} hosts: give 1 to {len(hosts)}.")
        hosts = dict(list(hosts.items())[: launch.num_nodes])
    if launch.num_gpus is not None and launch.num_gpus >= 0:
        fewest = min(hosts, key=lambda host: len(hosts[host]))
        if not 1 <= launch.num_gpus <= len(hosts[fewest]):
            raise ValueError(f"num_gpus is {launch.num_gpus}, but {fewest} has {len(hosts[fewest])} devices: give 1 to {len(hosts[fewest])}.")
        hosts = {host: slots[: launch.num_gpus] for host, slots in hosts.items()}
    return hosts


def _filtered(hosts: dict[str, Slots], launch: LaunchConfig) -> dict[str, Slots]:
    key = "include" if launch.include else "exclude"
    named = _parse_filter(launch.include or launch.exclude or "", key, hosts)
    if launch.include:
        kept = {host: tuple(slot for slot in hosts[host] if slot in named[host]) for host in hosts if host in named}
    else:
        kept = {host: tuple(slot for slot in slots if slot not in named.get(host, ())) for host, slots in hosts.items()}
    kept = {host: slots for host, slots in kept.items() if slots}
    if not kept:
        raise ValueError(f"{key} {launch.include or launch.exclude!r} leaves no device: the hosts are {', '.join(hosts)}.")
    return kept


def _parse_filter(text: str, key: str, hosts: dict[str, Slots]) -> dict[str, set[int | str]]:
    """Slots by host of `host1:0,2@host2`; a host alone means all its slots."""
    named: dict[str, set[int | str]] = {}
    for part in text.split("@"):
        host, colon, slots_text = part.strip().partition(":")
        if host not in hosts:
            raise ValueError(f"{key} names host {host!r}, which is not among {', '.join(hosts)}.")
        numbers = slots_text.split(",") if colon else []
        if not all(number.strip().isdigit() for number in numbers):
            raise ValueError(f"{key} {part!r} is not of the form host or host:0,2.")
        by_name = {str(slot): slot for slot in hosts[host]}
        for number in numbers:
            if number.strip() not in by_name:
                raise ValueError(f"{key} names slot {number.strip()} of {host}, which has {', '.join(by_name)}.")
        named.setdefault(host, set()).update(by_name[number.strip()] for number in numbers)
        if not colon:
            named[host].update(hosts[host])
    return named


def _local_slots(launch: LaunchConfig, environ: Mapping[str, str], device: str) -> Slots:
    """Devices of this machine: its visible GPUs, or as many CPU processes as `num_gpus` says (1 by default)."""
    if device == "cuda":
        visible = visible_gpus(environ)
        if not visible:
            raise ValueError("DS_ACCELERATOR is cuda, but this machine shows no GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES, or unset it.")
        return visible
    if launch.num_gpus is not None and launch.num_gpus == 0:
        raise ValueError("num_gpus is 0: without a GPU it is the number of processes on this machine and must be 1 or more.")
    return tuple(range(max(1, launch.num_gpus or 1)))


def device_kind(environ: Mapping[str, str]) -> Literal["cuda", "cpu"]:
    """What the workers compute on: DS_ACCELERATOR where it is set, else GPUs if this machine shows any."""
    named = environ.get("DS_ACCELERATOR")
    if named is not None and named not in ("cuda", "cpu"):
        raise ValueError(f"DS_ACCELERATOR is {named!r}: this project runs on cuda and cpu.")
    if named == "cpu":
        return "cpu"
    return "cuda" if named == "cuda" or visible_gpus(environ) else "cpu"


def computes_in_fp16(device: str) -> bool:
    """Whether the device has arithmetic of its own for fp16: every GPU, and processors that say so."""
    if device == "cuda":
        return True
    try:
        words = set(_CPU_INFO.read_text().split())
    except OSError:
        return False
    return not words.isdisjoint({"avx512_fp16", "amx_fp16", "avx_ne_convert", "asimdhp"})


def visible_gpus(environ: Mapping[str, str]) -> Slots:
    """GPUs that CUDA would show: all, or those of CUDA_VISIBLE_DEVICES up to the first that does not exist."""
    count = count_gpus()
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None or count == 0:
        return tuple(range(count))
    visible: list[int | str] = []
    for name in (part.strip() for part in listed.split(",")):
        if name.isdigit() and int(name) < count:
            visible.append(int(name))
        elif name.startswith(("GPU-", "MIG-")):
            visible.append(name)
        else:
            break
    return tuple(visible)


def count_gpus() -> int:
    """NVIDIA GPUs of this machine: asked of nvidia-smi, else of the driver's /proc folder."""
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        try:
            listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60, check=False)
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                "nvidia-smi has not answered in a minute, so a GPU or its driver hangs: repair it, or set DS_ACCELERATOR=cpu."
            ) from error
        if listing.returncode == 0:
            return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else 0

"""What a result must say about where it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from tools.bench.measure import clock_s, least_s, median_s

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    date: str
    device: str
    """Model of the processor or GPU that computed."""
    cores: int
    """Processors that this process may run on."""
    memory_gb: float
    """Of the device that computed."""
    threads: int
    instructions: str
    """The widest vector instructions that torch uses, or the GPU's compute capability."""
    system: str
    python: str
    torch: str
    triton: str | None
    commit: str
    """Git commit, with ``+`` where files differ from it."""
    load: float
    """Processes that were running or waiting, over the last minute, when the benchmark began."""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def title(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}, " if self.instructions.startswith("AVX") else ""
        return f"{self.device}, {threads}torch {self.torch}, {self.date}"


def describe(device: torch.device) -> Machine:
    is_cuda = device.type == "cuda"
    return Machine(
        date=datetime.now(tz=UTC).strftime("%Y-%m-%d"),
        device=torch.cuda.get_device_name(device) if is_cuda else cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=round(memory_bytes(device) / 2**30, 1),
        threads=torch.get_num_threads(),
        instructions="sm_{}{}".format(*torch.cuda.get_device_capability(device)) if is_cuda else torch.backends.cpu.get_cpu_capability(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        commit=git_commit(),
        load=round(os.getloadavg()[0], 2),
    )


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or "CPU")


def memory_bytes(device: torch.device) -> int:
    """Memory of the device, free or not."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def git_commit() -> str:
    """``unknown`` outside of a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def gemm_tflops(dtype: torch.dtype, device: torch.device) -> float:
    """Best rate of a large square matrix product here, with the threads that are set: what utilisation is measured against."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)
        clock_s(device)

    return 2 * side**3 / least_s(product) / 1e12


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Median of the seconds until what ``run`` starts is done."""

    def finished() -> None:
        run()
        clock_s(device)

    return median_s(finished)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far.

    From /proc, because `getrusage` also counts what the parent held when it started this process.
    """
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024

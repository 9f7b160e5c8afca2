"""What starting costs. Processor time and not elapsed time, so that a busy machine does not decide."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHIA = ("configs/size/160m.yml", "configs/method/sepllm-n64.yml", "configs/run/pile.yml")
CHECK = ("deepy.py", "--check", "--devices", "8", "train.py", *PYTHIA)
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
BEYOND_TORCH_S = 2.0
CHECK_S = 3.0


def processor_s(*words: str) -> float:
    """Seconds of a processor, user and system, that ``python WORDS...`` takes: the least of two, as the first may write bytecode."""
    return min(_run(*words) for _ in range(2))


def _run(*words: str) -> float:
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=ONE_THREAD, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_utime + used.ru_stime


def loaded_modules(statement: str) -> set[str]:
    """What is imported when the statement has run."""
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}; import sys; print(*sys.modules, file=sys.stderr)"],
        cwd=ROOT,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stderr.splitlines()[-1].split())


def test_import_of_sepllm_costs_little_beyond_torch() -> None:
    assert processor_s("-c", "import torch, sepllm") < processor_s("-c", "import torch") + BEYOND_TORCH_S


def test_import_of_sepllm_loads_nothing_until_it_is_used() -> None:
    assert not {"torch", "transformers"} & loaded_modules("import sepllm")


def test_check_of_a_pythia_configuration_is_quick() -> None:
    assert processor_s(*CHECK) < CHECK_S


@pytest.mark.parametrize("package", ["torch", "transformers", "deepspeed", "matplotlib"])
def test_check_that_needs_no_data_does_not_load(package: str) -> None:
    assert package not in loaded_modules(f"from megatron.launch.main import main; assert main({CHECK[1:]!r}) == 0")

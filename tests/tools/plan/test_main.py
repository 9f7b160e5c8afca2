from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tools.plan import hardware
from tools.plan.__main__ import main
from tools.plan.hardware import cpu_of

ROOT = Path(__file__).parents[3]
RUN = ["-d", str(ROOT / "configs"), "size/1.4b", "method/sepllm-n64", "run/pile", "--vocab-size", "50277"]
DOCUMENT = (ROOT / "docs" / "plan.md").read_text()
COMMANDS = re.findall(r"^ {4}python -m tools\.plan (.*)$", DOCUMENT, flags=re.MULTILINE)


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def test_a_plan_says_what_is_held_sent_and_waited_for_and_that_it_is_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    out = planned(capsys, *RUN, "--gpus", "8")
    assert "nothing of it was measured on these devices" in out
    for words in ("as configured", "memory of a device", "optimizer: ", "data x 8: 1 all_reduce of", "tokens/s", "MFU", "suggested of ", "  not "):
        assert words in out


def test_a_batch_that_does_not_divide_is_said_and_another_layout_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    out = planned(capsys, *RUN, "--gpus", "4096")
    assert "train_batch_size (1024) is not a multiple of train_micro_batch_size_per_gpu (16) x 4096" in out
    assert "--set model_parallel_size=" in out


def test_pieces_of_a_sequence_are_compared_with_sending_all_keys(capsys: pytest.CaptureFixture[str]) -> None:
    out = planned(capsys, *RUN, "--gpus", "8", "--set", "context_parallel_size=8", "--set", "train_micro_batch_size_per_gpu=1")
    assert re.search(r"would be sent for all keys and values instead, [\d.]+ times as much", out)


def test_flags_override_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    out = planned(capsys, *RUN, "--memory-gb", "20", "--peak-tflops", "100")
    assert "100 TFLOP/s, 20 GB" in out
    assert "DOES NOT FIT" in out


def test_this_machine_is_measured_only_when_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "measured_cpu", lambda: cpu_of(peak_tflops=0.1, memory_gb=24, memory_gb_s=20))
    assert "0.1 TFLOP/s, 24 GB at 20 GB/s" in planned(capsys, *RUN, "--hardware", "cpu", "--gpus", "1")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([*RUN, "--gpus", "0"], "--gpus 0: give 1 or more"),
        ([*RUN, "--separators", "2"], "give a share from 0 to 1"),
        (RUN[:-2], "add --vocab-size"),
        ([*RUN, "--set", "num_layrs=3"], "did you mean num_layers"),
    ],
)
def test_mistakes_are_sentences(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert sentence in capsys.readouterr().err


def test_it_is_quick_and_imports_no_torch() -> None:
    code = f"import sys; from tools.plan.__main__ import main; status = main({[*RUN, '--gpus', '64']!r}); sys.exit(status or 'torch' in sys.modules)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert used.ru_utime + used.ru_stime < 3


@pytest.mark.parametrize("command", [command for command in COMMANDS if "cpu" not in command and "--table" not in command])
def test_the_documents_commands_run(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert "suggested" in planned(capsys, *shlex.split(command))


def test_the_documents_table_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = (command for command in COMMANDS if "--table" in command)
    assert planned(capsys, *shlex.split(command)).strip() in DOCUMENT

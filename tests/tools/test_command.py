from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tools.command import exit_status, until_stopped

TOOLS = Path(__file__).parents[2] / "tools"


def raised(error: BaseException) -> None:
    raise error


def test_a_command_that_ends_has_its_status() -> None:
    assert exit_status(lambda: "something") == 0
    assert (until_stopped(lambda: 3), until_stopped(lambda: None)) == (3, 0)


@pytest.mark.parametrize("error", [ValueError("wrong"), FileNotFoundError("wrong")])
def test_what_the_user_got_wrong_is_a_sentence_and_status_2(capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    assert exit_status(lambda: raised(error)) == 2
    assert capsys.readouterr().err == "wrong\n"


@pytest.mark.parametrize("ending", [exit_status, until_stopped])
def test_ctrl_c_is_one_line_and_status_130(capsys: pytest.CaptureFixture[str], ending: type[exit_status]) -> None:
    assert ending(lambda: raised(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "stopped.\n"


def test_commands_end_so() -> None:
    """All that can be started, but for one that imports nothing of this project and another name of a command."""
    others = {"eval_tasks.py", "preprocess_data_with_mask.py"}
    commands = [path for path in TOOLS.rglob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8") and path.name not in others]
    assert len(commands) > 30
    for path in commands:
        assert re.search(r"\b(exit_status|until_stopped)\(", path.read_text(encoding="utf-8")), path


@pytest.mark.timeout(60)
def test_preparing_data_stops_at_ctrl_c_without_a_traceback(tmp_path: Path) -> None:
    """The text comes through a pipe that nobody writes to."""
    source = tmp_path / "text.jsonl"
    os.mkfifo(source)
    flags = ["--input", str(source), "--output-prefix", str(tmp_path / "out"), "--tokenizer-type", "CharLevelTokenizer"]
    command = [sys.executable, "-m", "tools.datasets.preprocess_data", *flags]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=TOOLS.parent)
    with source.open("w"):  # returns when the command reads
        started.send_signal(signal.SIGINT)
        _, said = started.communicate(timeout=60)
    assert (started.returncode, said.splitlines()[-1]) == (130, "stopped.")
    assert "Traceback" not in said

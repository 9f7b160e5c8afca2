"""What the hosts are asked, and what is said of the answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.config.schema import Config
from megatron.launch import probe
from megatron.launch.preflight import differences, no_answer
from megatron.launch.probe import Answer, Machine, machine
from megatron.launch.worker import encode_config

TinyConfig = Callable[..., Config]
HERE = Machine(versions={"python": "3.11.2", "torch": "2.13.0"}, code="a", config="b", inputs={"x.bin": "10 bytes, c", "y.bin": "3 bytes, d"})


def asked(config: Config, script: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> Answer:
    given = ["--job=me", "--node=0", "--gpus=1", f"--script={script}", f"--config-base64={encode_config(config)}", *words]
    assert probe.main(given) == 0
    name, event, content = capsys.readouterr().out.split(" ", 2)
    assert (name, event) == ("me", "answer")
    return Answer.model_validate(json.loads(content))


def test_this_machine_does_not_differ_from_itself(tiny: TinyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "mine.py"
    script.touch()
    answer = asked(tiny(), script, capsys=capsys)
    assert differences(answer.machine, machine(tiny(), script)) == []
    assert answer.obstacles == ()
    assert answer.port is not None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"versions": {"python": "3.11.2", "torch": "2.11.0"}}, "torch is 2.11.0, on this machine 2.13.0: install the same on all hosts"),
        ({"code": "z"}, "holds other code than on this machine: bring all hosts to the same commit"),
        ({"config": "z"}, "the configuration reads differently there"),
        ({"inputs": {"x.bin": "9 bytes, c"}}, "x.bin is another file (9 bytes, c) than on this machine (10 bytes, c): copy it again"),
    ],
)
def test_a_difference_is_named_with_its_remedy(change: dict[str, object], complaint: str) -> None:
    (said,) = differences(HERE.model_copy(update=change), HERE)
    assert complaint in said


def test_the_code_is_that_of_the_project_and_of_the_script(tiny: TinyConfig, tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text("1")
    before = machine(tiny(), script)
    script.write_text("2")
    assert machine(tiny(), script).code != before.code
    assert machine(tiny(seed=7), script).config != before.config


def test_a_script_that_is_not_there_is_an_obstacle(tiny: TinyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = asked(tiny(), tmp_path / "nowhere.py", capsys=capsys)
    assert answer.obstacles == (f"{tmp_path}/nowhere.py does not exist: every host needs the script at the same path.",)


@pytest.mark.parametrize(
    ("lines", "remedy"),
    [
        (["pdsh@a: b: ssh exited with exit code 255"], "ssh does not get there: make `ssh -o BatchMode=yes b true` work"),
        (["env: /x/python: No such file or directory", "pdsh@a: b: ssh exited with exit code 127"], "the same Python, "),
        ([], "It said nothing in 60 seconds"),
    ],
)
def test_silence_is_explained_by_what_was_said_instead(lines: list[str], remedy: str) -> None:
    assert remedy in no_answer(lines, "b")

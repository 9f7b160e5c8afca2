"""What docs/launching.md shows is understood, and its tables name what is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron.config.keys import KEYS
from megatron.launch.arguments import parse
from megatron.launch.pdsh import EXPORTED
from megatron.launch.probe import PACKAGES
from megatron.launch.worker import _parser

TEXT = (Path(__file__).parents[1] / "docs" / "launching.md").read_text()
COMMANDS = re.findall(r"^ {4}((?:python|torchrun|srun|mpirun) .*)$", TEXT, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(command: str) -> None:
    words = shlex.split(command)
    if words[:2] == ["python", "deepy.py"]:
        assert parse(words[2:]).script == "train.py"
    else:
        given = _parser().parse_intermixed_args(words[words.index("train.py") + 1 :])
        assert given.configs == ["your.yml"]


def test_tables_and_lists_name_what_is_there() -> None:
    keys = [name for row in re.findall(r"^\| (`.*?`) \| ", TEXT, flags=re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    assert "no_ssh_check" in keys
    assert set(keys) <= set(KEYS)
    assert all(name in TEXT for name in (*EXPORTED, *PACKAGES))

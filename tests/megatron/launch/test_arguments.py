"""The command line: which files, which keys, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.launch.arguments import parse


def test_yml_is_appended_where_no_suffix_is_given() -> None:
    arguments = parse(["train.py", "a", "b.yml", "c.json"])
    assert arguments.script == "train.py"
    assert arguments.configs == (Path("a.yml"), Path("b.yml"), Path("c.json"))


@pytest.mark.parametrize("flag", ["-d", "--conf_dir"])
def test_the_folder_is_joined_to_every_config_wherever_the_flag_stands(flag: str) -> None:
    expected = (Path("configs/size/160m.yml"), Path("configs/run/pile.yml"))
    assert parse(["train.py", flag, "configs", "size/160m", "run/pile"]).configs == expected
    assert parse(["train.py", "size/160m", flag, "configs", "run/pile"]).configs == expected


def test_a_flag_that_is_not_given_changes_no_key() -> None:
    assert parse(["train.py", "a"]).overrides == {}


def test_flags_change_the_keys_of_their_names() -> None:
    arguments = parse(
        ["eval.py", "a", "--eval_tasks", "piqa", "sciq", "--iteration", "512", "-H", "hosts", "-i", "in", "-o", "out", "--wandb_team", "t"]
    )
    assert arguments.overrides == {
        "eval_tasks": ["piqa", "sciq"],
        "iteration": 512,
        "hostfile": "hosts",
        "sample_input_file": "in",
        "sample_output_file": "out",
        "wandb_team": "t",
    }


def test_set_reads_its_value_as_yaml_and_may_be_repeated() -> None:
    overrides = parse(["train.py", "a", "--set", "train_iters=5", "--set", "fp16.enabled=false", "--set", "save=x/y"]).overrides
    assert overrides == {"train_iters": 5, "fp16.enabled": False, "save": "x/y"}


@pytest.mark.parametrize(
    "argv",
    [
        ["train.py"],
        [],
        ["train.py", "a", "--wandb_gr", "g"],
        ["train.py", "a", "--iteration", "last"],
        ["train.py", "a", "--set", "train_iters"],
        ["train.py", "a", "--devices", "8"],
        ["train.py", "a", "--autotuning", "run"],
    ],
)
def test_a_wrong_command_line_ends_with_status_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(argv)
    assert ended.value.code == 2

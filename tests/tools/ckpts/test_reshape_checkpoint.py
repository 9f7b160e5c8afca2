"""Weights of a checkpoint cut for other parallel sizes, and read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.training.weights import read_weights
from tests.tools.ckpts.conftest import VOCABULARY, SaveFolder, llama, neox
from tools.ckpts.convert_hf_to_neox import convert
from tools.ckpts.inspect_checkpoints import describe
from tools.ckpts.neox_files import ParallelSizes
from tools.ckpts.reshape_checkpoint import main, reshape
from tools.ckpts.saved_config import run_config


@pytest.mark.parametrize("before", [ParallelSizes(), ParallelSizes(tensor=2), ParallelSizes(tensor=2, pipeline=2)])
@pytest.mark.parametrize("after", [ParallelSizes(), ParallelSizes(tensor=2, pipeline=1)])
@pytest.mark.parametrize("family", [neox, llama])
def test_weights_are_the_same_in_every_layout(save_folder: SaveFolder, tmp_path: Path, before: ParallelSizes, after: ParallelSizes, family) -> None:  # type: ignore[no-untyped-def]
    source = convert(save_folder(family()), tmp_path / "before", sizes=before, iteration=7, verify=False).step
    reshaped = reshape(source, tmp_path / "after", after)
    assert reshaped.step == tmp_path / "after" / "global_step7"
    report = describe(reshaped.step)
    assert (report.iteration, report.tensor_parallel_size, report.is_finished) == (7, after.tensor, True)
    was, now = (read_weights(step, model=run_config(step).model).state for step in (source, reshaped.step))
    assert was.keys() == now.keys()
    assert all(torch.equal(now[name], value) for name, value in was.items())


def test_the_folder_says_for_which_sizes_it_is(save_folder: SaveFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(save_folder(neox()), tmp_path / "before", verify=False)
    assert main(["--input_dir", str(tmp_path / "before"), "--output_dir", str(tmp_path / "after"), "--tp", "2", "--pp", "2"]) == 0
    assert f"{VOCABULARY} rows of the vocabulary; every one comes back bit for bit" in capsys.readouterr().out
    overrides = (tmp_path / "after" / "global_step0" / "configs" / "overrides.json").read_text()
    assert '"model_parallel_size": 2' in overrides
    assert '"pipe_parallel_size": 2' in overrides


def test_sizes_that_do_not_divide_leave_nothing_behind(save_folder: SaveFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(save_folder(neox()), tmp_path / "before", verify=False)
    words = ["--input_dir", str(tmp_path / "before"), "--output_dir", str(tmp_path / "after"), "--tp", "3"]
    assert main(words) == 1
    assert "3 tensor-parallel ranks do not divide" in capsys.readouterr().err
    assert not (tmp_path / "after" / "global_step0").exists()


def test_an_existing_folder_is_not_overwritten(save_folder: SaveFolder, tmp_path: Path) -> None:
    step = convert(save_folder(neox()), tmp_path / "run", verify=False).step
    with pytest.raises(ValueError, match="is there already"):
        reshape(step, tmp_path / "run", ParallelSizes(tensor=2))

"""Checkpoints of every layout are described and compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.tools.ckpts.conftest import VOCABULARY, SaveFolder, llama, neox, sepllm_neox
from tools.ckpts.convert_hf_to_neox import Imported, convert
from tools.ckpts.inspect_checkpoints import compare, describe, main
from tools.ckpts.neox_files import ParallelSizes


@pytest.fixture
def imported(save_folder: SaveFolder, tmp_path: Path) -> Imported:
    return convert(save_folder(llama()), tmp_path / "run", verify=False)


def test_a_checkpoint_in_pieces_is_described_whole(save_folder: SaveFolder, tmp_path: Path) -> None:
    step = convert(save_folder(llama()), tmp_path / "run", sizes=ParallelSizes(tensor=2, pipeline=2), iteration=5, verify=False).step
    report = describe(tmp_path / "run")
    assert (report.folder, report.form, report.iteration, report.other_iterations) == (str(step), "a file a layer", 5, ())
    assert (report.tensor_parallel_size, report.engine_files, report.optimizer_files, report.is_finished) == (2, 4, 0, True)
    assert report.parameters["sequential.2.attention.query_key_value.weight"].shape == (64, 32)
    assert report.config_files == ("attention.yml", "model.yml", "run.yml")
    assert report.num_parameters == sum(torch.Size(found.shape).numel() for found in report.parameters.values())


def test_an_interrupted_and_a_foreign_checkpoint_say_so(imported: Imported, capsys: pytest.CaptureFixture[str]) -> None:
    assert describe(imported.step).written_by == "another program"
    engine = torch.load(imported.step / "mp_rank_00_model_states.pt", weights_only=True)
    del engine["iteration"]
    torch.save(engine | {"total_iters": 9, "ds_version": "0.3.15"}, imported.step / "mp_rank_00_model_states.pt")
    (imported.step / "saving").touch()
    report = describe(imported.step)
    assert (report.iteration, report.written_by, report.is_finished) == (9, "another program (DeepSpeed 0.3.15)", False)
    assert main([str(imported.step)]) == 0
    assert "NOT FINISHED" in capsys.readouterr().out


def test_a_checkpoint_without_its_configuration_shows_what_is_in_the_files(imported: Imported) -> None:
    shutil.rmtree(imported.step / "configs")
    report = describe(imported.step)
    assert report.config_files == ()
    assert report.parameters["sequential.0.word_embeddings.weight"].shape == (VOCABULARY, 32)


def test_the_report_is_json_too(imported: Imported, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(imported.step), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"]["sequential.2.input_layernorm.scale"] == {"shape": [32], "dtype": "float32"}


def test_a_transformers_folder_is_described(save_folder: SaveFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_folder(sepllm_neox(), dtype=torch.float16)
    report = describe(folder)
    assert report.form == "transformers model of type sepllm_gpt_neox"
    assert report.parameters["embed_out.weight"].dtype == "float16"
    assert main([str(folder)]) == 0
    assert "embed_out.weight" in capsys.readouterr().out


def test_two_checkpoints_are_compared_in_configuration_and_values(
    save_folder: SaveFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = convert(save_folder(neox(), name="a"), tmp_path / "first", verify=False).step
    second = convert(save_folder(sepllm_neox(hidden_act="gelu_pytorch_tanh"), name="b"), tmp_path / "second", verify=False).step
    state = torch.load(first / "mp_rank_00_model_states.pt", weights_only=True)
    state["module"]["sequential.2.mlp.linear1.bias"][3] += 0.5
    state["module"]["sequential.3.mlp.linear1.bias"] = torch.ones(7)
    state["module"]["sequential.9.extra.weight"] = state["module"].pop("sequential.2.mlp.linear2.bias")
    torch.save(state, second / "mp_rank_00_model_states.pt")
    found = compare(first, second)
    assert found.config["attention.mode"] == ("full", "sepllm")
    assert found.config["attention.prefill.separator_ids"] == ([], [7, 8])
    assert not [key for key in found.config if key.startswith(("files", "batch"))]
    assert found.values == {"sequential.2.mlp.linear1.bias": pytest.approx(0.5)}
    assert set(found.other_shape_or_dtype) == {"sequential.3.mlp.linear1.bias"}
    assert (found.only_first, found.only_second) == (("sequential.2.mlp.linear2.bias",), ("sequential.9.extra.weight",))
    assert found.num_equal == len(state["module"]) - 3
    assert main([f"{first},{second}"]) == 0
    said = capsys.readouterr().out
    assert "attention.mode: full | sepllm" in said
    assert "sequential.2.mlp.linear1.bias: values differ by up to 0.5" in said
    assert main([str(first), str(first)]) == 0
    assert "The configurations are the same." in capsys.readouterr().out


def test_a_configuration_is_compared_with_the_checkpoints_own(imported: Imported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = yaml.safe_load((imported.step / "configs" / "model.yml").read_text()) | {"seq_length": 32}
    (tmp_path / "model.yml").write_text(yaml.safe_dump(keys))
    assert main([str(imported.step), "--config_file", str(tmp_path / "model.yml"), *map(str, imported.config_files[1:])]) == 0
    assert capsys.readouterr().out.strip() == "model.seq_length: 64 | 32"


def test_mistakes_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "is not a directory" in capsys.readouterr().err
    assert main(["a", "b", "c"]) == 1
    assert "3 folders are given" in capsys.readouterr().err

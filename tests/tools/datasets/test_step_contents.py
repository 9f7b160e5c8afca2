from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megatron.config.schema import Config
from megatron.data.indexed import IndexedDataset
from megatron.data.tokenizer import CharLevelTokenizer
from megatron.parallel.mesh import Axis, Mesh
from megatron.training.batches import RunData
from megatron.training.manifest import MANIFEST, Manifest, SavedSchedule, Shape
from megatron.training.progress import Progress
from tests.tools.datasets.writing import write_pair
from tools.datasets.step_contents import StepSample, main, open_run, step_samples

TINY = Path(__file__).parents[3] / "configs" / "local" / "tiny.yml"
CASES: dict[str, dict[str, object]] = {
    "one file that is split": {"data_path": "x", "split": "80,10,10"},
    "two files with weights": {"train_data_paths": ["x", "y"], "train_data_weights": [1.0, 3.0]},
    "weights by documents": {"train_data_paths": ["x", "y"], "weight_by_num_documents": True},
    "epochs": {"train_data_paths": ["x"], "train_epochs": 3, "lr_decay_iters": 20},
    "whole documents with labels": {"train_data_paths": ["x"], "train_label_data_paths": ["x"], "pack_impl": "pack_until_overflow"},
    "a document a sample": {"train_data_paths": ["x"], "pack_impl": "unpacked"},
    "accumulation": {"data_path": "y", "split": "1", "train_micro_batch_size_per_gpu": 1},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two pairs of short documents of bytes."""
    folder = tmp_path_factory.mktemp("pairs")
    random = np.random.default_rng(0)
    for name, documents in (("x", 90), ("y", 40)):
        rows = [random.integers(97, 123, int(random.integers(1, 60))).tolist() for _ in range(documents)]
        write_pair(folder / name, rows)
    return folder


def write_config(folder: Path, pairs: Path, case: dict[str, object]) -> Path:
    """tiny.yml with the data of a case, short samples and 12 steps."""
    keys = yaml.safe_load(TINY.read_text())
    for key in ("data_path", "split", "train_iters"):
        keys.pop(key)
    placed = {
        key: str(pairs / value) if key == "data_path" else [str(pairs / name) for name in value] if key.endswith("_paths") else value  # type: ignore[operator, attr-defined]
        for key, value in case.items()
    }
    if "train_data_paths" in case:
        placed |= {"valid_data_paths": [str(pairs / "y")], "test_data_paths": [str(pairs / "y")]}
    if "train_label_data_paths" in case:
        placed |= {"valid_label_data_paths": [str(pairs / "y")], "test_label_data_paths": [str(pairs / "y")]}
    iters = {} if "train_epochs" in case else {"train_iters": 12}
    path = folder / "run.yml"
    path.write_text(yaml.safe_dump(keys | {"seq_length": 16, "max_position_embeddings": 16, "warmup": 0.01} | iters | placed))
    return path


def trained(config: Config, *, rank: int, step: int) -> list[list[list[int]]]:
    """The rows that the trainer's loader yields to a rank in a step, by micro-batch."""
    mesh = Mesh(
        world_size=1,
        rank=0,
        local_rank=0,
        device=torch.device("cpu"),
        data=Axis(size=config.batch.data_parallel_size, rank=rank),
    )
    batches = RunData.open(config, mesh, CharLevelTokenizer()).training(consumed_samples=0)
    accumulated = config.batch.gradient_accumulation_steps
    return [batch.ids.tolist() for batch in itertools.islice(batches, step * accumulated, (step + 1) * accumulated)]


def by_micro_batch(samples: list[StepSample]) -> list[list[list[int]]]:
    return [[sample.ids[:-1].tolist() for sample in batch] for _, batch in itertools.groupby(samples, lambda sample: sample.micro_batch)]


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_what_the_trainers_loader_yields_to_every_rank(case: str, devices: int, pairs: Path, tmp_path: Path) -> None:
    run = open_run([str(write_config(tmp_path, pairs, CASES[case]))], devices=devices)
    for rank, step in itertools.product(range(devices), (0, 5)):
        assert by_micro_batch(list(step_samples(run, step, rank=rank))) == trained(run.config, rank=rank, step=step)


@pytest.mark.parametrize("case", CASES)
def test_the_sources_of_a_sample_are_its_tokens(case: str, pairs: Path, tmp_path: Path) -> None:
    run = open_run([str(write_config(tmp_path, pairs, CASES[case]))])
    for sample in step_samples(run, 3):
        dataset = IndexedDataset(sample.pair)
        pieces = [dataset.get(source.sequence, source.first_token, source.num_tokens) for source in sample.sources]
        tokens = np.concatenate(pieces)
        assert all(source.document == source.sequence and source.num_tokens > 0 for source in sample.sources)
        assert sample.ids[: len(tokens)].tolist() == tokens.tolist()
        assert not sample.ids[len(tokens) :].any()


def test_a_whole_step_is_the_same_on_any_number_of_devices(pairs: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, pairs, CASES["two files with weights"]))
    steps = [list(step_samples(open_run([config], devices=devices), 7)) for devices in (1, 2, 8)]
    places = [[(sample.place, sample.pair, sample.ids.tolist()) for sample in step] for step in steps]
    assert places[0] == places[1] == places[2]
    assert [place for place, _, _ in places[0]] == list(range(56, 64))


@pytest.fixture
def checkpoint(pairs: Path, tmp_path: Path) -> Path:
    """A checkpoint folder of iteration 2, whose run went from another batch size to 8 samples on two devices, with another seed."""
    file = write_config(tmp_path, pairs, CASES["one file that is split"])
    config = open_run([str(file)], overrides={"seed": 7}, devices=2).config
    step = tmp_path / "save" / "global_step2"
    (step / "configs").mkdir(parents=True)
    (step / "configs" / "run.yml").write_text(file.read_text())
    (step / "configs" / "overrides.json").write_text('{"seed": 7}')
    manifest = Manifest(
        progress=Progress(iteration=2, applied_steps=2, consumed_samples=10),
        shape=Shape.of(config),
        schedule=SavedSchedule.of(config.schedule, applied_steps=2),
        world_size=2,
        data_parallel_size=2,
        pipe_parallel_size=0,
        zero_stage=1,
        precision="fp32",
    )
    (step / MANIFEST).write_text(manifest.model_dump_json())
    (tmp_path / "save" / "latest").write_text("global_step2")
    return tmp_path / "save"


def test_a_checkpoint_tells_its_run_its_devices_and_what_it_had_read(checkpoint: Path, tmp_path: Path) -> None:
    saved = open_run([str(checkpoint)])
    assert saved.config.batch.data_parallel_size == 2
    fresh = open_run([str(tmp_path / "run.yml")], overrides={"seed": 7}, devices=1)
    every = [sample.ids.tolist() for step in range(4) for sample in step_samples(fresh, step)]
    assert [sample.ids.tolist() for sample in step_samples(saved, 3)] == every[18:26]
    assert [sample.place for sample in step_samples(saved, 3, rank=1)] == [22, 23, 24, 25]
    with pytest.raises(ValueError, match="has read 10 samples, no multiple of its batch size 8"):
        step_samples(saved, 1)
    assert open_run([str(checkpoint / "global_step2")], overrides={"train_batch_size": 5}, devices=1).consumed_samples(1) == 5


def test_the_command_prints_documents_and_text(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, pairs, CASES["one file that is split"])
    assert main([str(config.with_suffix("")), "--step", "2", "--rank", "1", "--devices", "4", "--tokenizer"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("step 2 (iteration 3 of the log): samples 16 to 23 of the run\n")
    assert "sample 18 (rank 1, micro-batch 0) of" in text
    assert "sample 20" not in text
    assert main([str(config), "--step", "2", "--most", "1", "--json", "--tokenizer", "bytes"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert (found["step"], found["sample"], found["rank"], found["micro_batch"]) == (2, 16, 0, 0)
    assert bytes(found["ids"]).decode() == found["text"]
    assert sum(source["num_tokens"] for source in found["sources"]) == len(found["ids"]) == 17


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--step", "12"], "--step is 12, and the steps of the run count from 0 to 11"),
        (["--step", "-1"], "--step is -1"),
        (["--step", "1", "--rank", "2", "--devices", "2"], "--rank is 2, and the data-parallel ranks are 0 to 1"),
        (["--step", "1", "--devices", "3"], "is not a multiple of"),
        (["--step", "1", "--set", "nonsense"], "give KEY=VALUE"),
    ],
)
def test_a_step_that_is_not_there_is_a_sentence(
    flags: list[str], message: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, pairs, CASES["one file that is split"])
    assert main([str(config), *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_step_after_the_last_epoch_is_a_sentence(pairs: Path, tmp_path: Path) -> None:
    run = open_run([str(write_config(tmp_path, pairs, CASES["epochs"]))])
    with pytest.raises(ValueError, match="the data ends before it"):
        step_samples(run, 10_000)

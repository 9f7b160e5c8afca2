from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron.config.schema import CheckpointConfig, Config
from megatron.training.checkpoint import check_save_path
from megatron.training.manifest import find_checkpoint, finished_iterations
from megatron.training.resumption import resumption
from megatron.training.trainer import train
from tests.megatron.training.running import MakeConfig, losses_of, tiny_config, weights_of


@pytest.fixture(scope="module")
def trained(token_prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run with checkpoints after 3 and 6 steps."""
    config = tiny_config(token_prefix, tmp_path_factory.mktemp("trained") / "save")
    train(config)
    return config


@pytest.fixture
def saved(trained: Config, tmp_path: Path) -> Path:
    """A copy of its checkpoints that a test may spoil."""
    return Path(shutil.copytree(str(trained.checkpoint.save), tmp_path / "copy"))


def test_a_checkpoint_has_gpt_neoxs_files(saved: Path) -> None:
    assert (saved / "latest").read_text() == "global_step6"
    assert (saved / "global_step6" / "configs" / "tiny.yml").read_text() == "{}"
    state = torch.load(saved / "global_step6" / "mp_rank_00_model_states.pt", weights_only=True)
    assert "sequential.2.attention.query_key_value.weight" in state["module"]
    assert (state["iteration"], state["args"]["num_layers"], state["lr_scheduler"]["num_iters"]) == (6, 2, 6)


def test_latest_decides_and_an_iteration_overrules_it(saved: Path) -> None:
    (saved / "latest").write_text("global_step3\n")
    found = find_checkpoint(CheckpointConfig(load=str(saved)))
    chosen = find_checkpoint(CheckpointConfig(load=str(saved), iteration=6))
    assert found is not None
    assert chosen is not None
    assert (found.iteration, chosen.iteration) == (3, 6)


def test_an_unfinished_checkpoint_is_passed_over(saved: Path) -> None:
    (saved / "global_step6" / "saving").touch()
    (saved / "global_step6" / "complete.json").unlink()
    found = find_checkpoint(CheckpointConfig(load=str(saved)))
    assert found is not None
    assert found.iteration == 3


def test_a_missing_iteration_lists_those_there_are(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"no finished checkpoint of iteration 5; it has 3, 6"):
        find_checkpoint(CheckpointConfig(load=str(saved), iteration=5))


@pytest.mark.parametrize("exists", [True, False])
def test_nothing_to_load_is_an_error_unless_a_fresh_start_is_allowed(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path if exists else tmp_path / "absent"
    with pytest.raises(ValueError, match=r"holds no finished checkpoint.*allow_fresh_start"):
        find_checkpoint(CheckpointConfig(load=str(folder)))
    assert find_checkpoint(CheckpointConfig(load=str(folder), allow_fresh_start=True)) is None


@pytest.mark.parametrize(
    ("name", "remedy"), [("global_step3", r"set load to the folder .*copy\), and iteration to 3"), ("best", "rename it to global_stepN")]
)
def test_a_checkpoint_in_place_of_its_folder_is_never_a_fresh_start(saved: Path, name: str, remedy: str) -> None:
    (saved / "global_step3").rename(saved / name)
    with pytest.raises(ValueError, match=f"is a checkpoint itself: {remedy}"):
        find_checkpoint(CheckpointConfig(load=str(saved / name), allow_fresh_start=True))


def test_another_shape_names_both_values(saved: Path, make_config: MakeConfig) -> None:
    config = make_config(model={"hidden_size": 64, "num_layers": 3}, checkpoint={"load": str(saved)})
    with pytest.raises(ValueError, match=r"num_layers is 2 in the checkpoint and 3 in the configuration; hidden_size is 32 .* and 64"):
        resumption(find_checkpoint(config.checkpoint), config, data_parallel_size=1)


def test_optimizer_state_of_another_precision_is_refused(saved: Path, make_config: MakeConfig) -> None:
    config = make_config(precision="bfloat16", checkpoint={"load": str(saved)})
    with pytest.raises(ValueError, match="precision fp32 in the checkpoint and bfloat16 in the configuration"):
        resumption(find_checkpoint(config.checkpoint), config, data_parallel_size=1)


@pytest.mark.parametrize(("stage", "is_rearranged"), [(0, False), (1, True), (3, True)])
def test_optimizer_state_of_another_kind_is_rearranged(saved: Path, make_config: MakeConfig, stage: int, is_rearranged: bool) -> None:
    config = make_config(zero_stage=stage, checkpoint={"load": str(saved)})
    assert resumption(find_checkpoint(config.checkpoint), config, data_parallel_size=1).is_rearranged == is_rearranged


def test_another_schedule_is_refused_with_the_keys_that_settle_it(saved: Path, make_config: MakeConfig) -> None:
    config = make_config(schedule={"lr_decay_iters": 9}, checkpoint={"load": str(saved)})
    with pytest.raises(ValueError, match=r"lr_decay_iters was 6 and is now 9.*override_lr_scheduler: true.*use_checkpoint_lr_scheduler: true"):
        resumption(find_checkpoint(config.checkpoint), config, data_parallel_size=1)


@pytest.mark.parametrize(("key", "iterations"), [("override_lr_scheduler", 9), ("use_checkpoint_lr_scheduler", 6)])
def test_a_key_settles_which_schedule_goes_on(saved: Path, make_config: MakeConfig, key: str, iterations: int) -> None:
    config = make_config(schedule={"lr_decay_iters": 9, key: True}, checkpoint={"load": str(saved)})
    resumed = resumption(find_checkpoint(config.checkpoint), config, data_parallel_size=1)
    assert (resumed.schedule.lr_decay_iters, resumed.progress.applied_steps) == (iterations, 6)


def test_a_foreign_checkpoint_gives_its_weights_only(saved: Path, make_config: MakeConfig) -> None:
    (saved / "global_step6" / "complete.json").unlink()
    with pytest.raises(ValueError, match=r"written by another program.*finetune: true.*no_load_optim: true"):
        train(make_config(checkpoint={"load": str(saved)}))
    assert train(make_config(checkpoint={"load": str(saved), "finetune": True})).consumed_samples == 48
    kept = make_config(checkpoint={"load": str(saved), "no_load_optim": True})
    resumed = resumption(find_checkpoint(kept.checkpoint), kept, data_parallel_size=1)
    assert (resumed.progress.iteration, resumed.progress.consumed_samples) == (6, 48)


def test_weights_that_do_not_fit_are_named(saved: Path, make_config: MakeConfig) -> None:
    (saved / "global_step6" / "complete.json").unlink()
    config = make_config(model={"intermediate_size": 64}, checkpoint={"load": str(saved), "finetune": True})
    with pytest.raises(ValueError, match=r"sequential.2.mlp.linear1.weight is \(128, 32\) there and \(64, 32\) in the configuration"):
        train(config)


def test_only_the_last_checkpoints_are_kept_and_the_extra_ones(make_config: MakeConfig) -> None:
    checkpoint = {"checkpoint_factor": 1, "keep_last_n_checkpoints": 2, "extra_save_iters": (0, 2)}
    config = make_config(checkpoint=checkpoint)
    train(config)
    assert finished_iterations(Path(str(config.checkpoint.save))) == [0, 2, 5, 6]


def test_a_run_that_went_back_keeps_what_it_saves(make_config: MakeConfig) -> None:
    """Later checkpoints are of the run that it left; they count for nothing."""
    config = make_config(checkpoint={"checkpoint_factor": 1})
    train(config)
    save = str(config.checkpoint.save)
    back = {"save": save, "load": save, "iteration": 2, "checkpoint_factor": 1, "keep_last_n_checkpoints": 1}
    train(make_config(training={"train_iters": 6, "exit_interval": 4}, checkpoint=back))
    assert (Path(save) / "latest").read_text() == "global_step4"
    assert finished_iterations(Path(save)) == [4, 5, 6]


def test_a_folder_that_is_filled_again_holds_nothing_of_another_layout(make_config: MakeConfig) -> None:
    config = make_config(training={"train_iters": 1})
    left = Path(str(config.checkpoint.save)) / "global_step1"
    left.mkdir(parents=True)
    torch.save({"word_embeddings.weight": torch.zeros(512, 32)}, left / "layer_00-model_00-model_states.pt")
    (left / "hf").mkdir()
    train(config)
    assert "sequential.2.attention.dense.weight" in weights_of(config, 1)
    assert (left / "hf").is_dir(), "what somebody else put there stays"


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("fp32", 3), ("bfloat16", 0), ("bfloat16", 1)])
def test_settings_of_the_optimizer_are_the_configurations(make_config: MakeConfig, tmp_path: Path, precision: str, stage: int) -> None:
    """A changed weight decay takes effect with the first step of the resumed run."""
    first = make_config(precision=precision, zero_stage=stage, training={"train_iters": 3})
    train(first)
    losses = []
    for decay in (0.1, 20.0):
        checkpoint = {"save": str(tmp_path / f"{decay}"), "load": first.checkpoint.save}
        second = make_config(precision=precision, zero_stage=stage, optimizer={"weight_decay": decay}, checkpoint=checkpoint)
        train(second)
        losses.append(losses_of(second))
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bfloat16", 0), ("bfloat16", 1), ("bfloat16", 3)])
def test_gradients_are_clipped_as_the_configuration_says(make_config: MakeConfig, tmp_path: Path, precision: str, stage: int) -> None:
    """A changed bound holds from the first step of the resumed run."""
    plain = {"precision": precision, "zero_stage": stage}
    first = make_config(training={"train_iters": 3}, optimizer={"type": "sgd"}, **plain)
    train(first)
    losses = []
    for bound in (1.0, 0.01):
        checkpoint = {"save": str(tmp_path / f"{bound}"), "load": first.checkpoint.save}
        second = make_config(optimizer={"type": "sgd", "gradient_clipping": bound}, checkpoint=checkpoint, **plain)
        train(second)
        losses.append(losses_of(second))
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]


@pytest.mark.parametrize(("changes", "takes"), [({}, True), ({"model_parallel_size": 2}, False), ({"pipe_parallel_size": 2}, False)])
def test_random_states_are_those_of_as_many_shards_and_stages(saved: Path, make_config: MakeConfig, changes: dict[str, object], takes: bool) -> None:
    """Two replicas draw differently, two shards must draw alike."""
    config = make_config(parallel=changes, checkpoint={"load": str(saved)})
    assert resumption(find_checkpoint(config.checkpoint), config, data_parallel_size=1).takes_random_state == takes


def test_without_saved_random_states_the_generators_are_seeded_anew(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_config(checkpoint={"no_save_rng": True}, training={"train_iters": 1})
    train(first)
    assert not (Path(str(first.checkpoint.save)) / "global_step1" / "random_states.pt").exists()
    train(make_config(checkpoint={"load": first.checkpoint.save, "save": None}, training={"train_iters": 1}))
    assert "going on from iteration 1, random generators seeded anew" in capsys.readouterr().out


def test_a_save_path_that_cannot_be_written_is_found_before_anything_else(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = make_config(checkpoint={"save": str(tmp_path / "file" / "below")}, data={"data_path": "/nowhere"})
    with pytest.raises(ValueError, match=r"save \(.*below\) cannot be written: Not a directory"):
        train(config)
    check_save_path(str(tmp_path / "new" / "folder"))
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_damaged_manifest_is_reported(saved: Path) -> None:
    (saved / "global_step6" / "complete.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(ValueError, match=r"complete.json is damaged"):
        find_checkpoint(CheckpointConfig(load=str(saved)))


def test_a_forward_pass_proves_that_the_checkpoint_is_read_right(make_config: MakeConfig, tmp_path: Path) -> None:
    first = make_config(checkpoint={"checkpoint_validation_with_forward_pass": True}, training={"train_iters": 1})
    train(first)
    again = {"load": first.checkpoint.save, "save": None, "checkpoint_validation_with_forward_pass": True}
    train(make_config(checkpoint=again, training={"train_iters": 1}))
    train(make_config(model={"padded_vocab_size": 640}, checkpoint=again, training={"train_iters": 1}))
    logits = Path(str(first.checkpoint.save)) / "global_step1" / "validation_logits.pt"
    torch.save(torch.load(logits, weights_only=True) + 1, logits)
    with pytest.raises(ValueError, match=r"computes other logits than when it was saved"):
        train(make_config(checkpoint=again, training={"train_iters": 1}))

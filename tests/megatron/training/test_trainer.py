"""Whole runs of the tiny model, in this process and on two."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron.config.schema import Config
from megatron.training import trainer
from megatron.training.divergence import TrainingDiverged
from megatron.training.step import StepReport
from megatron.training.trainer import train
from tests.megatron.training.running import (
    REPOSITORY,
    MakeConfig,
    figures,
    losses_of,
    same_weights,
    tiny_config,
    train_on,
    weights_of,
)

LAYOUTS = [("fp32", 0), ("fp32", 1), ("bfloat16", 0), ("bfloat16", 1), ("bfloat16", 2), ("fp32", 3)]


def resumed(make_config: MakeConfig, config: Config, folder: Path, **changes: object) -> Config:
    """The same run, begun from the checkpoint after its third step, saving elsewhere."""
    precision, stage = config.precision.precision, config.parallel.zero_stage
    checkpoint = {"save": str(folder), "load": config.checkpoint.save, "iteration": 3, **changes}
    return make_config(world_size=config.runtime.world_size, precision=precision, zero_stage=stage, checkpoint=checkpoint)


@pytest.mark.parametrize(("precision", "zero_stage"), LAYOUTS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(make_config: MakeConfig, tmp_path: Path, precision: str, zero_stage: int) -> None:
    whole = make_config(precision=precision, zero_stage=zero_stage)
    train(whole)
    second_half = resumed(make_config, whole, tmp_path / "second")
    train(second_half)
    assert losses_of(second_half) == losses_of(whole)[3:]
    assert same_weights(weights_of(second_half, 6), weights_of(whole, 6))


@pytest.mark.parametrize(
    "optimizer",
    [{"type": "adam"}, {"type": "adam", "params": {"adam_w_mode": False}}, {"type": "sgd", "momentum": 0.9}, {"type": "adagrad"}, {"type": "lion"}],
    ids=str,
)
def test_without_zero_bfloat16_learns_as_with_it(make_config: MakeConfig, tmp_path: Path, optimizer: dict[str, object]) -> None:
    """DeepSpeed's wrapper for it takes a step of zeros when it begins, of which nothing may stay: no count, no decay among the averages."""
    changes = {"precision": "bfloat16", "optimizer": {"betas": (0.9, 0.95), "weight_decay": 1.0, **optimizer}}
    runs = [make_config(zero_stage=stage, checkpoint={"save": str(tmp_path / f"zero{stage}")}, **changes) for stage in (0, 1)]
    for run in runs:
        train(run)
    assert losses_of(runs[0]) == pytest.approx(losses_of(runs[1]), rel=2e-5)


@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_a_process_alone_reduces_no_gradients(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """DeepSpeed would copy all of them into one piece first."""
    from deepspeed import DeepSpeedEngine

    monkeypatch.setattr(DeepSpeedEngine, "buffered_allreduce_fallback", lambda *_, **__: pytest.fail("gradients were reduced"))
    config = make_config(precision=precision)
    assert train(config).iteration == 6
    assert len(losses_of(config)) == 6


def test_dropout_goes_another_way_without_the_saved_random_state(make_config: MakeConfig, tmp_path: Path) -> None:
    whole = make_config()
    train(whole)
    second_half = resumed(make_config, whole, tmp_path / "second", no_load_rng=True)
    train(second_half)
    assert losses_of(second_half) != losses_of(whole)[3:]


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoRanks:
    whole: dict[int, Config]
    """By ZeRO stage."""
    second_half: dict[int, Config]
    without_dropout: dict[int, Config]
    said: str


@pytest.fixture(scope="module")
def two_ranks(token_prefix: str, tmp_path_factory: pytest.TempPathFactory) -> TwoRanks:
    """Runs on two processes, all in one start of them."""
    folder = tmp_path_factory.mktemp("two")
    whole, second_half = {}, {}
    for stage in (0, 1):
        make = partial(tiny_config, token_prefix, folder / f"whole{stage}", world_size=2)
        whole[stage] = make(zero_stage=stage)
        second_half[stage] = resumed(make, whole[stage], folder / f"second{stage}")
    plain = partial(tiny_config, token_prefix, world_size=2, model={"hidden_dropout": 0.0})
    without_dropout = {stage: plain(folder / f"plain{stage}", zero_stage=stage) for stage in (0, 1)}
    said = train_on([*whole.values(), *second_half.values(), *without_dropout.values()], ranks=2, folder=folder)
    return TwoRanks(whole=whole, second_half=second_half, without_dropout=without_dropout, said=said)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_two_ranks_resume_bit_for_bit(two_ranks: TwoRanks, zero_stage: int) -> None:
    whole, second_half = two_ranks.whole[zero_stage], two_ranks.second_half[zero_stage]
    assert losses_of(second_half) == losses_of(whole)[3:]
    assert same_weights(weights_of(second_half, 6), weights_of(whole, 6))


def test_two_ranks_have_random_states_of_their_own(two_ranks: TwoRanks) -> None:
    states = torch.load(Path(str(two_ranks.whole[0].checkpoint.save)) / "global_step6" / "random_states.pt", weights_only=True)
    assert len(states) == 2
    assert not torch.equal(states[0]["torch"], states[1]["torch"])


def test_only_the_first_rank_speaks(two_ranks: TwoRanks) -> None:
    assert two_ranks.said.count("random generators restored") == 2, "two resumed runs on two ranks each"


def test_two_ranks_compute_what_one_does(two_ranks: TwoRanks, make_config: MakeConfig) -> None:
    alone = make_config(model={"hidden_dropout": 0.0})
    train(alone)
    for together in two_ranks.without_dropout.values():
        for name in ("train/lm_loss", "train/grad_norm", "validation/lm_loss", "test/lm_loss"):
            assert figures(together, name) == pytest.approx(figures(alone, name), rel=1e-4)


def test_without_zero_one_rank_goes_on_where_two_stopped(two_ranks: TwoRanks, make_config: MakeConfig) -> None:
    together = two_ranks.without_dropout[0]
    alone = make_config(model={"hidden_dropout": 0.0}, checkpoint={"load": together.checkpoint.save, "iteration": 3})
    train(alone)
    assert losses_of(alone) == pytest.approx(losses_of(together)[3:], rel=1e-4)


def test_train_py_trains_a_resolved_configuration(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(training={"train_iters": 1})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, str(REPOSITORY / "train.py"), "--config", str(tmp_path / "config.json")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert len(losses_of(config)) == 1


def test_a_run_goes_on_with_smaller_batches(make_config: MakeConfig, tmp_path: Path) -> None:
    """Of this little data its steps of 2 samples alone would want one pass, which the steps of 8 before have used up."""
    few = {"data": {"split": "4,46,50"}, "training": {"train_iters": 6, "eval_iters": 0, "exit_interval": 5}}
    first = make_config(checkpoint={"checkpoint_factor": 5}, **few)
    train(first)
    batch = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1}
    progress = train(make_config(batch=batch, checkpoint={"save": str(tmp_path / "second"), "load": first.checkpoint.save}, **few))
    assert (progress.iteration, progress.consumed_samples) == (6, 42)


def test_finetuning_takes_the_weights_and_starts_over(make_config: MakeConfig, tmp_path: Path) -> None:
    first = make_config()
    train(first)
    checkpoint = {"load": first.checkpoint.save, "finetune": True, "save": str(tmp_path / "tuned"), "extra_save_iters": (0,)}
    tuned = make_config(checkpoint=checkpoint)
    assert train(tuned).consumed_samples == 48
    assert same_weights(weights_of(tuned, 0), weights_of(first, 6))
    assert len(losses_of(tuned)) == 6


def test_finetuning_from_scattered_weights_gathers_them(make_config: MakeConfig, tmp_path: Path) -> None:
    first = make_config(zero_stage=3, training={"train_iters": 1})
    train(first)
    tuned = make_config(checkpoint={"load": first.checkpoint.save, "finetune": True, "save": str(tmp_path / "tuned"), "extra_save_iters": (0,)})
    train(tuned)
    assert same_weights(weights_of(tuned, 0), weights_of(first, 1))


def test_without_the_optimizer_the_iteration_is_kept_and_the_rate_starts_over(make_config: MakeConfig, tmp_path: Path) -> None:
    first = make_config(precision="bfloat16")
    train(first)
    second = resumed(make_config, first, tmp_path / "second", no_load_optim=True)
    progress = train(second)
    assert (progress.iteration, progress.applied_steps, progress.consumed_samples) == (6, 3, 48)
    assert figures(second, "train/learning_rate") == figures(first, "train/learning_rate")[:3]
    assert losses_of(second)[0] < losses_of(first)[0], "the master weights are the checkpoint's, not new ones"


def test_evaluation_leaves_no_trace_in_training(make_config: MakeConfig, tmp_path: Path) -> None:
    often, never = {"eval_interval": 1}, {"eval_interval": 100}
    losses = []
    for name, interval in (("often", often), ("never", never)):
        config = make_config(checkpoint={"save": str(tmp_path / name)}, training={"train_iters": 6, "eval_iters": 1, **interval})
        train(config)
        losses.append(losses_of(config))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_is_the_same_whatever_is_computed_again(stage: int, make_config: MakeConfig, tmp_path: Path) -> None:
    seen = []
    for changes in ({}, {"checkpoint_activations": True}, {"checkpoint_activations": True, "recompute_granularity": "selective"}):
        config = make_config(zero_stage=stage, training={"train_iters": 3, **changes}, checkpoint={"save": str(tmp_path / f"{len(seen)}")})
        train(config)
        seen.append((losses_of(config), figures(config, "train/grad_norm")))
    assert seen[0] == seen[1] == seen[2]


def test_a_run_of_epochs_ends_with_its_data(make_config: MakeConfig) -> None:
    epochs = {"train_iters": None, "train_epochs": 2, "eval_interval": 10_000}
    config = make_config(training=epochs, checkpoint={"save": None}, data={"split": "10,45,45"})
    progress = train(config)
    assert progress.iteration > 6
    assert progress.consumed_samples == progress.iteration * 8


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(precision="bfloat16")
    original, calls = trainer.train_step.__globals__["batch_loss"], iter(range(100))

    def poisoned(*given: object) -> torch.Tensor:
        return original(*given) * (math.nan if next(calls) == 3 else 1.0)  # the second micro-batch of the second step

    monkeypatch.setitem(trainer.train_step.__globals__, "batch_loss", poisoned)
    with pytest.raises(TrainingDiverged, match=r"Iteration 2: the loss is nan.* samples 12 to 15 of the training data"):
        train(config)


def test_a_termination_signal_saves_after_the_step_and_leaves(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(checkpoint={"checkpoint_factor": 100})
    original = trainer.train_step

    def interrupted(*given: object, **named: object) -> StepReport:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "train_step", interrupted)
    assert train(config).iteration == 1
    assert (Path(str(config.checkpoint.save)) / "latest").read_text() == "global_step1"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_exit_interval_leaves_without_saving(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(training={"exit_interval": 2}, checkpoint={"checkpoint_factor": 100})
    assert train(config).iteration == 2
    assert not list(Path(str(config.checkpoint.save)).glob("global_step*"))
    assert "exiting after iteration 2 (exit_interval), nothing saved" in capsys.readouterr().out


def test_exit_interval_does_not_deny_what_was_due_and_saved(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(make_config(training={"exit_interval": 2}, checkpoint={"checkpoint_factor": 2}))
    assert "exiting after iteration 2 (exit_interval), which was saved" in capsys.readouterr().out


def test_without_steps_a_checkpoint_is_evaluated_and_nothing_else(make_config: MakeConfig, tmp_path: Path) -> None:
    trained = make_config(model={"hidden_dropout": 0.0})
    train(trained)
    for name, policy in (("resumed", {}), ("tuned", {"finetune": True})):
        checkpoint = {"load": trained.checkpoint.save, "save": str(tmp_path / name), **policy}
        training = {"train_iters": 0, "eval_interval": 3, "eval_iters": 1}
        evaluated = make_config(model={"hidden_dropout": 0.0}, schedule={"lr_decay_iters": 1}, training=training, checkpoint=checkpoint)
        assert train(evaluated).iteration == (0 if policy else 6)
        assert figures(evaluated, "test/lm_loss") == figures(trained, "test/lm_loss")
        assert len(figures(evaluated, "validation/lm_loss")) == 1
        assert losses_of(evaluated) == []
        assert not list((tmp_path / name).glob("global_step*"))


def test_a_tokenizer_of_another_size_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"The tokenizer has 512 entries but the configuration was resolved with vocab_size 500"):
        train(make_config(model={"vocab_size": 500}))

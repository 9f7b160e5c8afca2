"""Whole runs in fp16. DeepSpeed says of CPUs that they do not compute in it; torch does, and that is enough for a tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.config.schema import Config
from megatron.training.trainer import train
from tests.megatron.training.running import MakeConfig, figures, losses_of, metrics_of, same_weights, weights_of

STAGES = (0, 1, 3)
PLAIN = {"hidden_dropout": 0.0}
MakeHalf = Callable[..., Config]


@pytest.fixture(autouse=True)
def fp16_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda _: True)


@pytest.fixture
def make_half(make_config: MakeConfig) -> MakeHalf:
    """`make_config` in fp16, whose loss scale may be given."""

    def make(*, loss_scale: dict[str, object], **changes: object) -> Config:
        config = make_config(precision="fp16", **changes)
        return config.model_copy(update={"precision": config.precision.model_copy(update=loss_scale)})

    return make


@pytest.mark.parametrize("stage", STAGES)
def test_it_learns_as_in_fp32_with_and_without_zero(make_config: MakeConfig, make_half: MakeHalf, tmp_path: Path, stage: int) -> None:
    """Gradients are clipped, and their sizes count: the optimizer is SGD."""
    changes = {"model": PLAIN, "optimizer": {"type": "sgd", "momentum": 0.9}, "training": {"train_iters": 4}}
    whole = make_config(**changes)
    half = make_half(zero_stage=stage, loss_scale={"loss_scale": 1024.0}, checkpoint={"save": str(tmp_path / "half")}, **changes)
    for config in (whole, half):
        train(config)
    for name in ("train/lm_loss", "train/grad_norm", "validation/lm_loss"):
        assert figures(half, name) == pytest.approx(figures(whole, name), rel=1e-3), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_scale_that_grows_changes_no_update(make_half: MakeHalf, tmp_path: Path, stage: int) -> None:
    changes = {"zero_stage": stage, "model": PLAIN, "optimizer": {"type": "sgd"}, "training": {"train_iters": 6, "eval_iters": 0}}
    fixed = make_half(loss_scale={"loss_scale": 64.0}, **changes)
    scales = {"loss_scale": 0.0, "initial_scale_power": 6, "loss_scale_window": 2, "hysteresis": 1}
    growing = make_half(loss_scale=scales, checkpoint={"save": str(tmp_path / "growing")}, **changes)
    for config in (fixed, growing):
        train(config)
    assert len(set(figures(growing, "train/loss_scale"))) > 2
    for name in ("train/lm_loss", "train/grad_norm"):
        assert figures(growing, name) == pytest.approx(figures(fixed, name), rel=1e-4), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_overflows_skips_steps_and_resumes_bit_for_bit(make_half: MakeHalf, tmp_path: Path, stage: int) -> None:
    """The rate waits for the steps that are applied. Adam's averages are those of applied steps, and dropout goes on."""
    scales = {"loss_scale": 0.0, "initial_scale_power": 19, "hysteresis": 1, "loss_scale_window": 2}
    whole = make_half(zero_stage=stage, loss_scale=scales)
    progress = train(whole)
    assert 0 < progress.applied_steps < progress.iteration == 6
    assert progress.consumed_samples == 48
    steps = [line for line in metrics_of(whole) if "train/lm_loss" in line]
    is_skipped = [math.isinf(line["train/grad_norm"]) for line in steps]
    rates = [line["train/learning_rate"] for line in steps]
    assert sum(is_skipped) == progress.iteration - progress.applied_steps
    assert is_skipped[0]
    assert rates[0] == rates[sum(is_skipped) - 1] < rates[sum(is_skipped) + 1]
    checkpoint = {"save": str(tmp_path / "second"), "load": whole.checkpoint.save, "iteration": 3}
    second = make_half(zero_stage=stage, loss_scale=scales, checkpoint=checkpoint)
    train(second)
    assert losses_of(second) == losses_of(whole)[3:]
    assert figures(second, "train/loss_scale") == figures(whole, "train/loss_scale")[3:]
    assert same_weights(weights_of(second, 6), weights_of(whole, 6))


@pytest.mark.parametrize("stage", STAGES)
def test_norms_of_parameters_are_free_of_the_loss_scale(make_half: MakeHalf, stage: int) -> None:
    logging = {"log_grad_norm": True, "log_interval": 1}
    config = make_half(zero_stage=stage, loss_scale={"loss_scale": 1024.0}, logging=logging, training={"train_iters": 2, "eval_iters": 0})
    train(config)
    for line in metrics_of(config):
        squares = [value**2 for name, value in line.items() if name.startswith("gradient_norms/")]
        assert math.sqrt(sum(squares)) == pytest.approx(line["train/grad_norm"], rel=1e-4)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 1), (3, 3), (0, 1), (3, 0)])
def test_a_resumed_run_scales_by_its_own_configuration(make_half: MakeHalf, tmp_path: Path, before: int, after: int) -> None:
    """A dynamic scale goes on from where it was (of a run that was spread otherwise, with its steps counted anew); when it grows, and whether
    it moves at all, is the new configuration's to say."""
    slow = {"loss_scale": 0.0, "initial_scale_power": 6, "loss_scale_window": 100, "hysteresis": 1}
    first = make_half(zero_stage=before, loss_scale=slow, training={"train_iters": 3, "eval_iters": 0})
    train(first)
    expected = {"window": [128.0, 256.0, 512.0] if before == after else [64.0, 128.0, 256.0], "floor": [1024.0] * 3, "fixed": [32.0] * 3}
    changes = {"window": {"loss_scale_window": 1, "initial_scale_power": 9}, "floor": {"min_loss_scale": 1024.0}, "fixed": {"loss_scale": 32.0}}
    for name, change in changes.items():
        checkpoint = {"save": str(tmp_path / name), "load": first.checkpoint.save}
        second = make_half(zero_stage=after, loss_scale=slow | change, checkpoint=checkpoint, training={"train_iters": 6, "eval_iters": 0})
        train(second)
        assert figures(second, "train/loss_scale") == expected[name], name

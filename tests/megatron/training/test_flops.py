from __future__ import annotations

import pytest

from megatron.training.flops import runtime_metrics, step_flops
from tests.megatron.training.running import MakeConfig


def test_the_dense_count_is_gpt_neoxs_formula(make_config: MakeConfig) -> None:
    model = make_config().model
    h, layers, length, vocabulary = model.hidden_size, model.num_layers, model.seq_length, 512
    dense = 24 * 3 * 8 * length * layers * h**2 * (1 + length / (6 * h) + vocabulary / (16 * layers * h))
    assert step_flops(model, samples=8, recomputes=False) == pytest.approx(dense)
    assert step_flops(model, samples=8, recomputes=True) == pytest.approx(dense * 4 / 3)


def test_the_executed_count_has_two_products_for_each_kept_pair(make_config: MakeConfig) -> None:
    model = make_config().model
    pairs = 0.5 * model.seq_length * (model.seq_length + 1) / 2
    executed = step_flops(model, samples=8, recomputes=False, kept_ratio=0.5)
    attention = executed - step_flops(model, samples=8, recomputes=False, kept_ratio=0.0)
    assert attention == pytest.approx(3 * 8 * model.num_layers * pairs * 4 * model.hidden_size)


def test_utilisation_is_of_one_device_and_needs_its_peak(make_config: MakeConfig) -> None:
    model = make_config().model
    metrics = runtime_metrics(model, samples=8, elapsed_s=2.0, world_size=4, recomputes=True, kept_ratio=0.5, peak_tflops=1e-9)
    hardware = step_flops(model, samples=8, recomputes=True) / 2 / 4
    assert metrics["runtime/flops_per_sec_per_gpu"] == pytest.approx(hardware)
    assert metrics["runtime/hardware_flops_utilization"] == pytest.approx(hardware / 1e3)
    assert metrics["runtime/model_flops_utilization"] == pytest.approx(hardware / 1e3 * 3 / 4)
    assert metrics["runtime/executed_model_flops_utilization"] < metrics["runtime/model_flops_utilization"]
    assert (metrics["runtime/samples_per_sec"], metrics["runtime/tokens_per_sec"]) == (4.0, 4.0 * model.seq_length)
    without = runtime_metrics(model, samples=8, elapsed_s=2.0, world_size=4, recomputes=True, kept_ratio=0.5, peak_tflops=None)
    assert not any("utilization" in name for name in without)

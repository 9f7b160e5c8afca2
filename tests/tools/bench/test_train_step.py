"""Arms of a small model: that they compute the same, that an update with rate 0 changes nothing, and the rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.config.schema import Config
from megatron.training.flops import step_flops
from tools.bench import train_step
from tools.bench.arms import ARMS, StepTime, Training, config_of, refusal
from tools.bench.measure import Ratio
from tools.bench.parity import compare
from tools.bench.step_rows import panels_of, row_of, table_of
from tools.bench.text import TokenStream

CPU = torch.device("cpu")
ARM = {arm.name: arm for arm in ARMS}


def small(dtype: str = "fp32", *, batch: int = 2) -> Config:
    return config_of("14m", length=96, window=16, batch=batch, dtype=dtype, separator_ids=(1, 2), vocab_size=200)


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(0, 12, (2, 97), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_arms_agree_and_a_step_without_a_rate_changes_nothing(dtype: str, text: torch.Tensor) -> None:
    training = Training(small(dtype), CPU)
    before = {name: weight.clone() for name, weight in training.model.state_dict().items()}
    assert max(training.disagreement(arm, text) for arm in ARMS) < (1e-5 if dtype == "fp32" else 2e-2)
    first = {arm.name: training.step(arm, text).loss for arm in ARMS}
    assert {arm.name: training.step(arm, text).loss for arm in ARMS} == first
    assert first["sepllm"] == pytest.approx(first["reference"], rel=1e-5 if dtype == "fp32" else 1e-3)
    assert first["sepllm"] != first["full"]
    assert all(torch.equal(before[name], weight) for name, weight in training.model.state_dict().items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_steps_with_a_rate_learn(dtype: str, text: torch.Tensor) -> None:
    training = Training(small(dtype), CPU)
    losses = [training.step(ARM["sepllm"], text, lr=1e-3).loss for _ in range(4)]
    assert losses[-1] < losses[0] - 0.1


def test_wrong_arm_disagrees(text: torch.Tensor) -> None:
    training = Training(small(), CPU)
    wrong = replace(ARM["reference"], pattern="full")
    right = training._gradient(ARM["reference"], text)
    assert (training._gradient(wrong, text) - right).norm() > 1e-2 * right.norm()


def test_masked_softmax_that_does_not_fit_is_left_out() -> None:
    config = small()
    assert refusal(ARM["reference"], config, batch=2, memory_bytes=2**30) is None
    assert "keeps about" in (refusal(ARM["reference"], config, batch=2, memory_bytes=2**20) or "")
    assert refusal(ARM["sepllm"], config, batch=2, memory_bytes=2**20) is None


def test_row_counts_executed_and_dense_equivalent_work_apart(text: torch.Tensor) -> None:
    training = Training(small(), CPU)
    times = {name: [StepTime(forward_s=s, backward_s=2 * s, update_s=s, loss=5.0)] * 2 for name, s in (("full", 0.3), ("sepllm", 0.1))}
    facts = {"size": "14m", "dtype": "fp32", "baseline": ARM["full"], "peak_bytes": 2**30, "gemm_tflops": 0.5, "density": 0.16}
    full, ours = (row_of(training, ARM[name], times, text, **facts) for name in ("full", "sepllm"))
    assert ours.ratio == pytest.approx(3)
    assert ours.tokens_per_s == pytest.approx(2 * 96 / 0.4)
    assert (full.kept_ratio, ours.kept_ratio < 0.7) == (1, True)
    model = training.config.model
    assert ours.mfu_dense_equivalent == pytest.approx(step_flops(model, samples=2, recomputes=False) / 0.4 / 0.5e12)
    assert ours.mfu_executed == pytest.approx(step_flops(model, samples=2, recomputes=False, kept_ratio=ours.kept_ratio) / 0.4 / 0.5e12)
    assert full.mfu_executed < full.mfu_dense_equivalent
    assert "3.00" in table_of([full, ours]).text()
    assert [panel.unit for panel in panels_of([full, ours])] == ["ms per token", "GiB"]


OWN_TEXT = ("--model", "14m", "--seq-lengths", "32", "--window", "8", "--threads", "1", "--separator-ids", "1", "2")


def test_run_times_the_arms_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "peak_bytes_apart", lambda arguments, arm, text, stream: 2**30)
    tokens, out, png = tmp_path / "tokens.npy", tmp_path / "out.json", tmp_path / "out.png"
    np.save(tokens, np.random.default_rng(0).integers(0, 12, 2000))
    flags = [*OWN_TEXT, "--tokens", str(tokens), "--steps", "2", "--arms", "full", "sepllm"]
    assert train_step.main([*flags, "--json", str(out), "--png", str(png)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["arm"] for row in rows] == ["full", "sepllm"]
    assert rows[0]["ratio"] == 1
    assert png.read_bytes().startswith(b"\x89PNG")


def test_memory_of_an_arm_is_that_of_a_process_of_its_own() -> None:
    stream = TokenStream(name="text", ids=np.arange(100), separator_ids=(1, 2))
    text = torch.randint(0, 12, (2, 33))
    peak_bytes = train_step.peak_bytes_apart(train_step.parse(OWN_TEXT), ARM["sepllm"], text, stream)
    weights_bytes = 4 * 4 * 14_067_712  # weights, gradients and two moments of AdamW
    assert weights_bytes < peak_bytes < 2**31


def test_losses_of_ours_are_as_close_to_dense_as_a_rerun_of_dense(tmp_path: Path) -> None:
    text = torch.randint(0, 12, (6, 2, 97), generator=torch.Generator().manual_seed(0))
    result, failures = compare(small(), text, CPU, model="14m", facts={})
    assert not failures
    result.picture(tmp_path / "parity.png")
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["run"]: row for row in json.loads(result.as_json())["rows"]}
    assert rows["dense"]["largest_difference"] == 0
    assert rows["ours (auto)"]["losses"][-1] == pytest.approx(rows["dense"]["losses"][-1], abs=1e-4)
    assert rows["dense"]["losses"][-1] < rows["dense"]["losses"][0]


def test_spread_of_an_arm_is_its_steps_against_the_next() -> None:
    assert Ratio.of([1.0, 2.0], [1.0, 2.0]).median == 1

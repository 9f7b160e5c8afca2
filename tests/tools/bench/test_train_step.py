"""Arms of a small model: that they compute the same, that an update with rate 0 changes nothing, that they take turns, and the rows."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.config.schema import Config
from megatron.training.flops import step_flops
from tools.bench import report, train_step, turns
from tools.bench.arms import ALL_ARMS, ARMS, Arm, StepTime, Trainee, config_of, refusal
from tools.bench.measure import Ratio
from tools.bench.parity import compare
from tools.bench.step_rows import Row, panels_of, reached, row_of, table_of
from tools.bench.turns import Assignment, Check, Worker

CPU = torch.device("cpu")
ARM = {arm.name: arm for arm in ARMS}


def small(dtype: str = "fp32", *, batch: int = 2) -> Config:
    return config_of("14m", length=96, window=16, batch=batch, dtype=dtype, separator_ids=(1, 2), vocab_size=200)


def trainee(arm: Arm, dtype: str = "fp32") -> Trainee:
    return Trainee(arm, small(dtype), CPU)


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(0, 12, (2, 97), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_arms_agree_and_a_step_without_a_rate_changes_nothing(dtype: str, text: torch.Tensor) -> None:
    losses = {}
    for arm in ARMS:
        ours = trainee(arm, dtype)
        before = {name: weight.clone() for name, weight in ours.contender.module.state_dict().items()}
        loss, gradient = ours.check(text)
        _, wanted = trainee(replace(arm, core="chunked"), dtype).check(text)
        assert (gradient - wanted).norm() < (1e-5 if dtype == "fp32" else 2e-2) * wanted.norm()
        losses[arm.name] = [loss, ours.step(text).loss, ours.step(text).loss]
        assert len(set(losses[arm.name])) == 1
        assert all(torch.equal(before[name], weight) for name, weight in ours.contender.module.state_dict().items())
    assert losses["sepllm"] == pytest.approx(losses["reference"], rel=1e-5 if dtype == "fp32" else 1e-3)
    assert losses["sepllm"] != losses["full"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_steps_with_a_rate_learn(dtype: str, text: torch.Tensor) -> None:
    ours = trainee(ARM["sepllm"], dtype)
    losses = [ours.step(text, lr=1e-3).loss for _ in range(4)]
    assert losses[-1] < losses[0] - 0.1


def test_wrong_arm_disagrees(text: torch.Tensor) -> None:
    _, wrong = trainee(replace(ARM["reference"], pattern="full")).check(text)
    _, right = trainee(ARM["reference"]).check(text)
    assert (wrong - right).norm() > 1e-2 * right.norm()


def test_masked_softmax_that_does_not_fit_is_left_out() -> None:
    config = small()
    assert refusal(ARM["reference"], config, batch=2, memory_bytes=2**30) is None
    assert "keeps about" in (refusal(ARM["reference"], config, batch=2, memory_bytes=2**20) or "")
    assert refusal(ARM["sepllm"], config, batch=2, memory_bytes=2**20) is None


def test_autocast_is_no_way_to_compute_in_fp32() -> None:
    assert "in fp32" in (refusal(ALL_ARMS["transformers_autocast"], small(), batch=2, memory_bytes=2**30) or "")


def rows_of(text: torch.Tensor, seconds: dict[str, float], *, size: str = "14m", peaks: dict[str, int] | None = None) -> dict[str, Row]:
    """Rows of arms whose steps take four times as many ``seconds``."""
    times = {name: [StepTime(forward_s=s, backward_s=2 * s, update_s=s, loss=5.0)] * 2 for name, s in seconds.items()}
    facts = {"size": size, "dtype": "fp32", "baseline": ARM["full"], "gemm_tflops": 0.5, "density": 0.16}
    return {name: row_of(small(), ALL_ARMS[name], times, text, peak_bytes=(peaks or {}).get(name, 2**30), **facts) for name in seconds}


def test_row_counts_executed_and_dense_equivalent_work_apart(text: torch.Tensor) -> None:
    rows = rows_of(text, {"full": 0.3, "sepllm": 0.1})
    full, ours = rows["full"], rows["sepllm"]
    assert ours.ratio == pytest.approx(3)
    assert ours.fastest_peer is None
    assert ours.tokens_per_s == pytest.approx(2 * 96 / 0.4)
    assert (full.kept_ratio, ours.kept_ratio < 0.7) == (1, True)
    model = small().model
    assert ours.mfu_dense_equivalent == pytest.approx(step_flops(model, samples=2, recomputes=False) / 0.4 / 0.5e12)
    assert ours.mfu_executed == pytest.approx(step_flops(model, samples=2, recomputes=False, kept_ratio=ours.kept_ratio) / 0.4 / 0.5e12)
    assert full.mfu_executed < full.mfu_dense_equivalent
    assert "3.00" in table_of([full, ours]).text()
    assert [panel.unit for panel in panels_of([full, ours])] == ["ms per token", "GiB"]


def test_rows_name_the_fastest_peer_and_the_ratio_to_it(text: torch.Tensor) -> None:
    rows = rows_of(text, {"full": 0.2, "transformers": 0.3, "litgpt": 0.25})
    assert {row.fastest_peer for row in rows.values()} == {"litgpt"}
    assert [rows[name].peer_ratio for name in ("full", "transformers", "litgpt")] == pytest.approx([1.25, 0.25 / 0.3, 1])
    assert "to the fastest peer, litgpt" in table_of(list(rows.values())).text()


def test_bars_are_answered_for_a_160m_model_only(text: torch.Tensor) -> None:
    seconds, peaks = {"full": 0.2, "transformers": 0.22}, {"full": 7 * 2**30, "transformers": 10 * 2**30}
    assert reached(list(rows_of(text, seconds, peaks=peaks).values())) == []
    speed, memory = reached(list(rows_of(text, seconds, size="160m", peaks=peaks).values()))
    assert speed == "full is 1.10x as fast as transformers, 1.15x is wanted: NOT reached"
    assert memory == "full takes 1.43x less memory than transformers, 1.25x is wanted: reached"


OWN_TEXT = ("--model", "14m", "--seq-lengths", "32", "--window", "8", "--threads", "1", "--separator-ids", "1", "2")


def test_run_times_the_arms_in_turn(tmp_path: Path) -> None:
    tokens, out, png = tmp_path / "tokens.npy", tmp_path / "out.json", tmp_path / "out.png"
    np.save(tokens, np.random.default_rng(0).integers(0, 12, 2000))
    flags = [*OWN_TEXT, "--tokens", str(tokens), "--steps", "2", "--arms", "full", "sepllm"]
    assert train_step.main([*flags, "--json", str(out), "--png", str(png)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["arm"] for row in rows] == ["full", "sepllm"]
    assert rows[0]["ratio"] == 1
    weights_bytes = 4 * 4 * 14_067_712  # weights, gradients and two moments of AdamW
    assert all(weights_bytes < row["peak_bytes"] < 2**31 for row in rows)
    assert png.read_bytes().startswith(b"\x89PNG")


def test_engine_computes_what_the_plain_step_computes(text: torch.Tensor) -> None:
    task = Assignment(arm=ARM["sepllm"], config=small(), device="cpu", engine="deepspeed", threads=1, text=text.numpy())
    with Worker(task) as worker:
        check = worker.check()
        time = worker.step()
    plain = trainee(ARM["sepllm"])
    assert check.loss == pytest.approx(plain.check(text)[0], rel=1e-6)
    assert time.loss == pytest.approx(plain.step(text).loss, rel=1e-6)
    assert min(time.forward_s, time.backward_s, time.update_s) > 0


def test_arm_that_fails_says_why_and_ends_its_process(text: torch.Tensor) -> None:
    config = small().model_copy(update={"attention": None})
    task = Assignment(arm=ARM["sepllm"], config=config, device="cpu", engine="plain", threads=1, text=text.numpy())
    with Worker(task) as worker, pytest.raises(ValueError, match=r"sepllm failed.[\s\S]*AttributeError"):
        worker.check()


class Stub:
    """A worker whose answers are given; an exception is raised."""

    def __init__(self, check: Check | ValueError, step: StepTime | ValueError) -> None:
        self._check, self._step = check, step

    def check(self) -> Check:
        return _raised_or_given(self._check)

    def step(self) -> StepTime:
        return _raised_or_given(self._step)


def _raised_or_given(answer):  # type: ignore[no-untyped-def]
    if isinstance(answer, ValueError):
        raise answer
    return answer


def test_arm_that_fails_leaves_the_others_in_the_run() -> None:
    check, step = Check(loss=5.0, gradient=np.ones(3)), StepTime(forward_s=1, backward_s=1, update_s=1, loss=5.0)
    workers = {
        "full": Stub(check, step),
        "reference": Stub(ValueError("reference failed: CUDA out of memory"), step),
        "sepllm": Stub(check, ValueError("sepllm failed: no kernel image")),
    }
    wanted = {"full": check, "sepllm": check}
    assert train_step.wrong_arms(ARMS, workers, wanted, Namespace(dtype="fp32")) == {"reference": "reference failed: CUDA out of memory"}
    assert train_step.failing_arms([ARM["full"], ARM["sepllm"]], workers) == {"sepllm": "sepllm failed: no kernel image"}


class Questions:
    """The worker's end of a pipe through which these questions come."""

    def __init__(self, *questions: str) -> None:
        self._questions = iter(questions)
        self.answers: list[object] = []

    def recv(self) -> str:
        return next(self._questions)

    def send(self, answer: object) -> None:
        self.answers.append(answer)


def test_worker_on_a_gpu_gives_memory_back_after_every_turn(monkeypatch: pytest.MonkeyPatch, text: torch.Tensor) -> None:
    """Or the arms that only wait hold what the next one needs: after the check, and after a failure too."""
    events: list[str] = []

    def turn(name: str) -> str:
        events.append(name)
        if name == "step":
            raise RuntimeError("out of memory")
        return name

    monkeypatch.setattr(turns, "_answers", lambda *_: {name: partial(turn, name) for name in ("check", "step")})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("given back"))
    monkeypatch.setattr(turns.os, "_exit", lambda status: None)
    task = Assignment(arm=ARM["full"], config=small(), device="cuda", engine="plain", threads=1, text=text.numpy())
    connection = Questions("check", "step", "end")
    turns.serve(connection, task)  # type: ignore[arg-type]
    assert events == ["check", "given back", "step", "given back"]
    assert "out of memory" in str(connection.answers[1])


@pytest.mark.parametrize(("arm", "operators"), [("full", None), ("reference", "reference"), ("fused_triton_native", "native")])
def test_arm_has_the_operators_that_its_name_says(arm: str, operators: str | None, monkeypatch: pytest.MonkeyPatch, text: torch.Tensor) -> None:
    monkeypatch.setattr(turns.os, "environ", {})
    monkeypatch.setattr(turns.os, "_exit", lambda status: None)
    monkeypatch.setattr(turns, "_answers", lambda *_: {"check": lambda: turns.os.environ.get("SEPLLM_OPS")})
    task = Assignment(arm=ALL_ARMS[arm], config=small(), device="cpu", engine="plain", threads=1, text=text.numpy())
    connection = Questions("check", "end")
    turns.serve(connection, task)  # type: ignore[arg-type]
    assert connection.answers == [operators]


def test_step_on_a_gpu_has_as_many_rows_as_fill_it() -> None:
    arguments = {device: train_step.parse(["--device", device]) for device in ("cpu", "cuda")}
    assert [train_step.batch_of(arguments["cuda"], length) for length in (2048, 8192, 32768)] == [8, 2, 1]
    assert train_step.batch_of(arguments["cpu"], 2048) == 1
    assert train_step.batch_of(train_step.parse(["--device", "cuda", "--batch", "3"]), 2048) == 3


def test_runs_of_other_lengths_are_saved_under_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    monkeypatch.setattr(train_step, "run", lambda _arguments: (None, "train-step", []))
    monkeypatch.setattr(report, "deliver", lambda _result, _arguments, *words: names.append("-".join(words)))
    for lengths in (["2048"], ["8192", "32768"]):
        assert train_step.main(["--seq-lengths", *lengths]) == 0
    assert names == ["train-step-160m-fp32-s2048", "train-step-160m-fp32-s8192-s32768"]


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

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron.training.metrics import JsonLines, MetricLogger, TensorBoard, metrics_path
from megatron.training.trainer import train
from tests.megatron.training.running import MakeConfig, metrics_of

EVERY_STEP = {
    "iteration",
    "train/lm_loss",
    "train/learning_rate",
    "train/grad_norm",
    "runtime/samples_per_sec",
    "runtime/iteration_time",
    "runtime/steps_per_sec",
    "runtime/tokens_per_sec",
    "runtime/kept_ratio",
    "runtime/kv_ratio",
    "runtime/flops_per_sec_per_gpu",
    "runtime/executed_flops_per_sec_per_gpu",
    "runtime/model_flops_utilization",
    "runtime/hardware_flops_utilization",
    "runtime/executed_model_flops_utilization",
    "runtime/executed_hardware_flops_utilization",
}


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_reports_under_the_dashboards_names_everywhere(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        training={"train_iters": 4, "eval_interval": 2},
        logging={"tensorboard_dir": str(tmp_path / "board"), "peak_theoretical_tflops": 1.0, "char_level_ppl": True},
    )
    train(config)
    steps = [line for line in metrics_of(config) if "train/lm_loss" in line]
    assert [line["iteration"] for line in steps] == [1, 2, 3, 4]
    assert all(line.keys() == EVERY_STEP for line in steps)
    evaluations = [line for line in metrics_of(config) if "validation/lm_loss" in line]
    assert [line["iteration"] for line in evaluations] == [2, 4]
    assert evaluations[0].keys() == {"iteration", *(f"validation/lm_loss{kind}" for kind in ("", "_ppl", "_char_lvl_ppl"))}
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert EVERY_STEP - {"iteration"} <= set(board.Tags()["scalars"])
    drawn = [(event.step, event.value) for event in board.Scalars("train/lm_loss")]
    assert drawn == [(line["iteration"], pytest.approx(line["train/lm_loss"])) for line in steps]


def test_norms_come_under_their_parameters_names(make_config: MakeConfig) -> None:
    norms = {"log_param_norm": True, "log_grad_norm": True, "log_grad_pct_zeros": True, "log_optimizer_states": True, "log_interval": 2}
    for stage in (0, 1, 3):
        config = make_config(zero_stage=stage, training={"train_iters": 2}, logging=norms)
        train(config)
        first, second = (line for line in metrics_of(config) if "train/lm_loss" in line)
        assert not any(name.startswith("parameter_norms") for name in first)
        weight = "sequential.2.attention.dense.weight"
        assert {f"parameter_norms/{weight}", f"gradient_norms/{weight}", f"pct_grad_zeros/{weight}", "optimizer_state_norms/0_exp_avg"} <= set(second)
        gradients = [value for name, value in second.items() if name.startswith("gradient_norms/")]
        assert sum(value**2 for value in gradients) ** 0.5 == pytest.approx(second["train/grad_norm"], rel=1e-4)


def test_the_wall_clock_breakdown_goes_to_the_dashboards_too(make_config: MakeConfig) -> None:
    config = make_config(training={"train_iters": 1}, logging={"wall_clock_breakdown": True})
    train(config)
    timers = {name: value for name, value in metrics_of(config)[0].items() if name.startswith("timers/")}
    parts = ("forward", "backward", "backward-backward", "backward-allreduce", "optimizer", "batch generator")
    assert timers.keys() == {f"timers/{part}" for part in parts}
    assert 0 < timers["timers/forward"] < metrics_of(config)[0]["runtime/iteration_time"]


def test_a_resumed_run_takes_the_place_of_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3}\n{"iterat')
    sink = JsonLines(path, iteration=2)
    sink.write(3, {"train/lm_loss": 5.0})
    sink.close()
    assert lines(path) == [{"iteration": 1}, {"iteration": 2}, {"iteration": 3, "train/lm_loss": 5.0}]
    assert (tmp_path / "metrics.jsonl.previous").read_text().count("\n") == 3


def test_a_metrics_file_is_whole_when_a_run_is_killed_as_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2}\n')

    opened = Path.open

    def killed(self: Path, mode: str = "r", *given: Any, **named: Any) -> IO[Any]:
        if mode == "w":
            raise KeyboardInterrupt
        return opened(self, mode, *given, **named)

    monkeypatch.setattr(Path, "open", killed)
    with pytest.raises(KeyboardInterrupt):
        JsonLines(path, iteration=1)
    assert lines(path) == [{"iteration": 1}, {"iteration": 2}]


def test_tensorboard_forgets_what_came_after_the_checkpoint_too(tmp_path: Path) -> None:
    for start in (0, 2):
        board = TensorBoard(tmp_path, iteration=start)
        for iteration in range(start + 1, 5):
            board.write(iteration, {"train/lm_loss": float(start)})
        board.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/lm_loss")] == [(1, 0.0), (2, 0.0), (3, 2.0), (4, 2.0)]


def test_the_metrics_file_is_beside_the_checkpoints_unless_it_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    assert metrics_path(make_config()) == tmp_path / "save" / "metrics.jsonl"
    assert metrics_path(make_config(logging={"metrics_file": "/elsewhere.jsonl"})) == Path("/elsewhere.jsonl")
    assert metrics_path(make_config(checkpoint={"save": None})) is None


def test_other_ranks_write_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(logging={"tensorboard_dir": str(tmp_path / "board"), "use_wandb": True})
    assert MetricLogger.open(config, is_first=False, iteration=0).sinks == ()


def test_wandb_offline_writes_a_run_whose_id_goes_into_the_checkpoint(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logging = {"use_wandb": True, "wandb_mode": "offline", "wandb_group": "group"}
    config = make_config(training={"train_iters": 1}, logging=logging)
    train(config)
    wandb.teardown()  # its service writes the file, and ends here
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    manifest = json.loads((Path(str(config.checkpoint.save)) / "global_step1" / "complete.json").read_text())
    assert file.stem == f"run-{manifest['wandb_run_id']}"
    assert wandb_history(file)["train/lm_loss"] == pytest.approx(metrics_of(config)[0]["train/lm_loss"])


def test_wandb_disabled_writes_nothing(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    train(make_config(training={"train_iters": 1}, logging={"use_wandb": True, "wandb_mode": "disabled"}))
    assert not list(tmp_path.glob("wandb/*run-*"))


def wandb_history(file: Path) -> dict[str, float]:
    """The metrics of the first history record of a run's file."""
    from wandb.proto.wandb_internal_pb2 import Record

    for data in log_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
    raise AssertionError(f"{file} has no history")


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log with wandb's 7 bytes before it: checksum, length and type, then that many bytes, in blocks of 32 KiB."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield parts
            parts = b""

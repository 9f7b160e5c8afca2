"""One run of the study, in a process of its own: `python -m tools.sepllm.study.train CONFIG.json RESULT.json`.

Model, data order, loss, optimizer, schedule and step are the trainer's (`megatron.training.trainer.prepare`, `train_step`). Only the
launcher, checkpoints and logs are left out, and held-out rows do not depend on the seed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from megatron.config.loader import config_from_json
from megatron.config.schema import Config
from megatron.data.batch import Batch
from megatron.model.gpt import GPTModel
from megatron.parallel.mesh import Mesh
from megatron.training.divergence import check_numbers
from megatron.training.flops import step_flops
from megatron.training.ratios import Ratios
from megatron.training.step import StepReport, train_step
from megatron.training.trainer import prepare
from sepllm.pattern import AttentionPattern
from tools.command import until_stopped
from tools.sepllm.rows import DatasetTokens, row_blocks
from tools.sepllm.study.results import Point, RunResult, fingerprint

POINTS = 16
"""Of a curve, the last step among them."""
CURVE_ROWS = 8
"""Validation rows of a point, spread evenly over the validation text."""
PLACES = 16
"""Into so many equal stretches a row is cut for the losses by place."""
ROWS_AT_ONCE = 4


def main(argv: Sequence[str] | None = None) -> int:
    config_path, result_path = map(Path, sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(1)
    config = config_from_json(config_path.read_text(encoding="utf-8"))
    measured_run(config, method=result_path.stem.rsplit("-seed", 1)[0]).save(result_path)
    return 0


def measured_run(config: Config, *, method: str) -> RunResult:
    """Trains as configured from nothing, and measures: the validation loss at `POINTS` places of the run, every test row at its end."""
    mesh = Mesh.start(config)
    run = prepare(config, mesh)
    model: GPTModel = run.engine.module
    pattern, steps = config.attention.prefill, run.data.train_iters
    validation, test = held_out_rows(config, "valid", most=CURVE_ROWS), held_out_rows(config, "test")
    record, places = Record(config), points_of(steps)
    batches, progress = run.data.training(consumed_samples=0), run.start
    while progress.iteration < steps:
        started = time.perf_counter(), time.process_time()
        report = train_step(run.engine, batches, mesh, lr=run.schedule.at(progress.applied_steps))
        record.step(report, elapsed_s=time.perf_counter() - started[0], cpu_s=time.process_time() - started[1])
        check_numbers(report, progress, config, mesh)
        progress = progress.after_step(samples=config.batch.train_batch_size, is_skipped=report.is_skipped)
        if progress.iteration in places:
            record.point(loss=float(token_losses(model, validation, pattern).mean()))
    return record.result(model, token_losses(model, test, pattern), method=method)


class Record:
    """What the steps of a run did and took, so far."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._losses: list[float] = []
        self._elapsed_s: list[float] = []
        self._cpu_s: list[float] = []
        self._flops = 0.0
        self._ratios = Ratios()
        self._curve: list[Point] = []

    def step(self, report: StepReport, *, elapsed_s: float, cpu_s: float) -> None:
        """One more training step."""
        samples, kept = self._config.batch.train_batch_size, report.ratios.attention_map
        self._losses.append(report.loss)
        self._elapsed_s.append(elapsed_s)
        self._cpu_s.append(cpu_s)
        self._flops += step_flops(self._config.model, samples=samples, recomputes=False, kept_ratio=kept)
        self._ratios += report.ratios

    def point(self, *, loss: float) -> None:
        """The validation loss after the steps so far."""
        self._curve.append(Point(step=len(self._losses), flops=self._flops, cpu_s=sum(self._cpu_s), loss=loss))

    def result(self, model: GPTModel, test_losses: Tensor, *, method: str) -> RunResult:
        """``test_losses [rows, S]``: of every token of the test rows."""
        config = self._config
        return RunResult(
            method=method,
            seed=config.training.seed,
            fingerprint=fingerprint(config),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            tokens=len(self._losses) * config.batch.train_batch_size * config.model.seq_length,
            kept_ratio=self._ratios.attention_map,
            kv_ratio=self._ratios.kv,
            cores=model.attention_cores,
            median_step_cpu_s=median(self._cpu_s),
            median_step_s=median(self._elapsed_s),
            train_losses=tuple(round(loss, 5) for loss in self._losses),
            curve=tuple(self._curve),
            row_losses=tuple(test_losses.mean(1).tolist()),
            place_losses=tuple(part.mean().item() for part in test_losses.tensor_split(PLACES, dim=1)),
        )


def points_of(steps: int) -> set[int]:
    """Steps after which the validation loss is taken: `POINTS` of them where there are so many, evenly spread, and the last."""
    return {round(steps * place / POINTS) for place in range(1, POINTS + 1)} - {0}


def held_out_rows(config: Config, split: str, *, most: int | None = None) -> Tensor:
    """``[rows, S + 1]`` int64 of the run's validation or test text, the same for every seed."""
    prefixes = config.data.valid_data_paths if split == "valid" else config.data.test_data_paths
    if not prefixes or len(prefixes) != 1:
        raise ValueError(f"{split}_data_paths is {prefixes}: the study measures on one text of held-out tokens, name it there.")
    return torch.cat(list(row_blocks(DatasetTokens(prefixes[0]), seq_length=config.model.seq_length + 1, most=most)))


@torch.no_grad()
def token_losses(model: GPTModel, rows: Tensor, pattern: AttentionPattern) -> Tensor:
    """Loss of every token after the first of each row ``[rows, S + 1]``, nats. ``[rows, S]`` float32."""
    model.eval()
    losses: list[Tensor] = []
    for block in rows.split(ROWS_AT_ONCE):
        batch = Batch.from_rows(block, pattern)
        logits = model(batch.ids, batch.layout).float()
        losses.append(functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none").view_as(batch.labels))
    model.train()
    return torch.cat(losses)


if __name__ == "__main__":
    sys.exit(until_stopped(main))

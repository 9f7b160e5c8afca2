"""A whole training run: what it needs, brought together, and the loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from megatron.config.checks import check_startable
from megatron.config.schema import Config
from megatron.data.gpt_dataset import SampleDataset
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.model.gpt import GPTModel, build_model
from megatron.optim.schedule import LearningRate
from megatron.parallel.collectives import broadcast_object, gather_stages, is_true_anywhere
from megatron.parallel.mesh import Mesh
from megatron.training.batches import RunData, Timed
from megatron.training.cadence import is_save_due
from megatron.training.checkpoint import (
    check_save_path,
    load_training_state,
    load_weights,
    rearrange_training_state,
    restore_random_state,
    save_checkpoint,
)
from megatron.training.divergence import check_numbers, check_skips
from megatron.training.engine import build_engine
from megatron.training.evaluate import evaluate
from megatron.training.logging import Console, copied_output, cores_line
from megatron.training.manifest import Found, find_checkpoint
from megatron.training.metrics import MetricLogger
from megatron.training.progress import Progress
from megatron.training.random_state import seed_replica
from megatron.training.report import Reporter
from megatron.training.resumption import Resumption, resumption
from megatron.training.statistics import parameter_statistics, timer_metrics
from megatron.training.step import StepReport, train_step
from megatron.training.stop import StopRequest
from megatron.training.validation import check_logits
from sepllm.attention.measured import is_measured

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from megatron.model.pipeline import GPTPipeline

T = TypeVar("T")


class CannotStart(ValueError):
    """What the user gave does not make a run; the text says what, and the remedy."""


def train(config: Config) -> Progress:
    """Trains as configured, from the checkpoint to load or from nothing, and returns how far it came.

    `CannotStart` where the input is wrong, before the first step.
    """
    mesh = Mesh.start(config)
    with copied_output(config.logging.log_dir, local_rank=mesh.local_rank):
        try:
            run = prepare(config, mesh)
        except ValueError as mistake:
            raise CannotStart(str(mistake)) from mistake
        return run.to_the_end()


def prepare(config: Config, mesh: Mesh) -> Run:
    """Everything a run needs, the cheap checks first. All processes call this together."""
    if reasons := check_startable(config, has_fp16=True):
        raise ValueError("\n".join(reasons))
    _decided_by_first(lambda: check_save_path(config.checkpoint.save), mesh)
    found = _decided_by_first(lambda: find_checkpoint(config.checkpoint), mesh)
    resumed = resumption(found, config, data_parallel_size=mesh.gradients.size)
    tokenizer = build_tokenizer(config.tokenizer)
    check_vocabulary(tokenizer, config)
    data = RunData.open(config, mesh, tokenizer, start=resumed.progress)
    engine = _engine(config, mesh, found, resumed, document_end_id=data.document_end_id)
    seed_replica(config.training.seed, replica=mesh.gradients.rank + mesh.gradients.size * mesh.pipe.rank)  # shards of one replica draw alike
    has_random_state = found is not None and resumed.takes_random_state and restore_random_state(found, mesh)
    progress = resumed.progress
    bar = data.train_iters if config.logging.progress_bar else None
    console = Console(is_first=mesh.is_first, bar_iterations=bar, iteration=progress.iteration)
    if found is not None:
        generators = "random generators restored" if has_random_state else "random generators seeded anew"
        console.say(f" loaded {found.folder}: going on from iteration {progress.iteration}, {generators}")
    metrics = MetricLogger.open(config, is_first=mesh.is_first, iteration=progress.iteration, wandb_run_id=resumed.wandb_run_id)
    reporter = Reporter(config, train_iters=data.train_iters, metrics=metrics, console=console)
    return Run(
        config=config,
        mesh=mesh,
        data=data,
        tokenizer=tokenizer,
        engine=engine,
        schedule=LearningRate(resumed.schedule),
        start=progress,
        reporter=reporter,
    )


def check_vocabulary(tokenizer: Tokenizer, config: Config) -> None:
    """Raises a sentence unless the tokenizer is the one that the configuration was resolved with."""
    if config.model.vocab_size is not None and tokenizer.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} entries but the configuration was resolved with vocab_size {config.model.vocab_size}: "
            "vocab_file has changed since, start again through deepy.py."
        )


def _engine(config: Config, mesh: Mesh, found: Found | None, resumed: Resumption, *, document_end_id: int | None) -> DeepSpeedEngine:
    """The engine with its weights: new, or those of the checkpoint, with or without what belongs to the optimizer."""
    model = _model(config, mesh, document_end_id=document_end_id)
    if found is not None and (resumed.is_rearranged or not resumed.takes_optimizer):
        load_weights(model, found, mesh, row_biases=config.checkpoint.row_biases)
    engine = build_engine(model, config, mesh)
    if found is not None and resumed.takes_optimizer:
        if resumed.is_rearranged:
            rearrange_training_state(engine, found, config.model, mesh)
        else:
            load_training_state(engine, found)
    if found is not None and config.checkpoint.checkpoint_validation_with_forward_pass:
        check_logits(engine, config, mesh, found.folder)
    return engine


def _model(config: Config, mesh: Mesh, *, document_end_id: int | None) -> GPTModel | GPTPipeline:
    """The whole model, or this process's stage of it."""
    if mesh.pipe.size == 1:
        return build_model(config, device=mesh.device, shards=mesh.tensor)
    from megatron.model.pipeline import GPTPipeline  # it imports DeepSpeed, which must come after `Mesh.start`

    return GPTPipeline(config, mesh, document_end_id=document_end_id)


def _decided_by_first(decide: Callable[[], T], mesh: Mesh) -> T:
    """What ``decide`` returns on the first process, everywhere; what it raises there is raised everywhere."""
    value: T | None = None
    mistake: ValueError | None = None
    if mesh.is_first:
        try:
            value = decide()
        except ValueError as raised:
            mistake = raised
    value, mistake = broadcast_object((value, mistake), mesh)
    if mistake is not None:
        raise mistake
    return value  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run that is ready to go."""

    config: Config
    mesh: Mesh
    data: RunData
    tokenizer: Tokenizer
    engine: DeepSpeedEngine
    schedule: LearningRate
    start: Progress
    reporter: Reporter

    def to_the_end(self) -> Progress:
        """Trains until the last iteration, a signal or `exit_interval`; returns where it stopped."""
        try:
            with StopRequest() as stop:
                return self._loop(stop)
        finally:
            self.reporter.close()

    def _loop(self, stop: StopRequest) -> Progress:
        """An iteration: step, count, log, save if due, evaluate if due, leave if due."""
        progress, saved, skipped_in_a_row = self.start, None, 0
        if progress.iteration == 0 and self._is_save_due(0):
            saved = self._save(progress)
        if progress.iteration >= self.data.train_iters:
            return self._finish(progress, saved=saved)
        batches = Timed(self.data.training(consumed_samples=progress.consumed_samples))
        while progress.iteration < self.data.train_iters:
            before = progress
            progress, report = self._step(batches, before)
            if before == self.start:
                self._say_cores()
            check_numbers(report, before, self.config, self.mesh)
            skipped_in_a_row = skipped_in_a_row + 1 if report.is_skipped else 0
            check_skips(skipped_in_a_row, progress)
            if self._is_save_due(progress.iteration):
                saved = self._save(progress)
            if progress.iteration % self.config.training.eval_interval == 0:
                self._evaluate(self.data.datasets.valid, progress, label="validation", place=self._place_of_evaluation(progress) - 1)
            stop.is_agreed = is_true_anywhere(stop.is_requested, self.mesh)
            if stop.is_agreed:
                return self._stop(progress, saved=saved)
            if self.config.training.exit_interval and progress.iteration % self.config.training.exit_interval == 0:
                kept = "which was saved" if saved == progress.iteration else "nothing saved"
                self.reporter.console.say(f" exiting after iteration {progress.iteration} (exit_interval), {kept}")
                return progress
        return self._finish(progress, saved=saved)

    def _step(self, batches: Timed, before: Progress) -> tuple[Progress, StepReport]:
        started = time.perf_counter()
        extra: dict[str, float] = {}
        lr = self.schedule.at(before.applied_steps)
        wants_norms = self._wants_statistics(before.iteration + 1)

        def note_norms(engine: DeepSpeedEngine) -> None:
            extra.update(parameter_statistics(engine, self.config.logging, self.mesh))

        report = train_step(self.engine, batches, self.mesh, lr=lr, before_update=note_norms if wants_norms else None)
        progress = before.after_step(samples=self.config.batch.train_batch_size, is_skipped=report.is_skipped)
        extra |= timer_metrics(self.engine, self.config.logging, waited_s=batches.take_waited_s())
        elapsed_s = time.perf_counter() - started
        self.reporter.step(report, progress, lr=self.schedule.at(progress.applied_steps), elapsed_s=elapsed_s, extra=extra)
        return progress, report

    def _say_cores(self) -> None:
        device = self.mesh.device.type
        hint = "" if is_measured(device) else f"; nobody has measured the cores on {device} yet: python -m tools.bench.cores --device {device}"
        cores = tuple(core for of_stage in gather_stages(self.engine.module.attention_cores, self.mesh) for core in of_stage)
        self.reporter.console.say(f" attention: {cores_line(cores)}{hint}")

    def _wants_statistics(self, iteration: int) -> bool:
        logging = self.config.logging
        is_on = logging.log_param_norm or logging.log_grad_norm or logging.log_grad_pct_zeros or logging.log_optimizer_states
        return is_on and iteration % logging.log_interval == 0

    def _is_save_due(self, iteration: int) -> bool:
        return self.config.checkpoint.save is not None and is_save_due(iteration, self.config.checkpoint)

    def _save(self, progress: Progress) -> int:
        folder = save_checkpoint(
            self.engine,
            self.config,
            self.mesh,
            progress=progress,
            schedule=self.schedule.config,
            wandb_run_id=self.reporter.metrics.wandb_run_id,
        )
        self.reporter.console.say(f" saved {folder}")
        return progress.iteration

    def _place_of_evaluation(self, progress: Progress) -> int:
        return progress.iteration // self.config.training.eval_interval

    def _evaluate(self, dataset: SampleDataset | None, progress: Progress, *, label: str, place: int) -> None:
        if dataset is None or self.config.training.eval_iters == 0:
            return
        batches, count = self.data.evaluation(dataset, place=place)
        if count == 0:
            self.reporter.console.say(f" no {label}: its data has fewer samples than one batch of {self.config.batch.train_batch_size}")
            return
        tokenizer = self.tokenizer if self.config.logging.char_level_ppl else None
        metrics = evaluate(self.engine, batches, self.mesh, count=count, label=label, tokenizer=tokenizer)
        self.reporter.evaluation(label, progress, metrics)

    def _stop(self, progress: Progress, *, saved: int | None) -> Progress:
        """Asked to end by a signal."""
        can_save = self.config.checkpoint.save is not None
        if can_save and saved != progress.iteration:
            self._save(progress)
        self.reporter.console.say(f" asked to stop after iteration {progress.iteration}{'' if can_save else '; there is no save path'}")
        return progress

    def _finish(self, progress: Progress, *, saved: int | None) -> Progress:
        """Validation, a last checkpoint, test; what the last iteration has done already is not done again."""
        if progress == self.start or progress.iteration % self.config.training.eval_interval != 0:
            self._evaluate(self.data.datasets.valid, progress, label="validation", place=self._place_of_evaluation(progress))
        if self.config.checkpoint.save is not None and progress.iteration not in (0, saved, self.start.iteration):
            self._save(progress)
        self._evaluate(self.data.datasets.test, progress, label="test", place=0)
        return progress

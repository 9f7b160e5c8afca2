"""When a run is no longer computing with numbers, and which samples brought it there."""

from __future__ import annotations

import math

from megatron.config.schema import Config
from megatron.parallel.collectives import gather_objects
from megatron.parallel.mesh import Mesh
from megatron.training.progress import Progress
from megatron.training.step import StepReport

MOST_SKIPPED_STEPS = 50
"""So many overflows one after another are no search for a loss scale any more."""


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is no number any more."""


def check_numbers(report: StepReport, before: Progress, config: Config, mesh: Mesh) -> None:
    """Stops a run whose loss or gradient is NaN or infinite, naming the samples. All processes call this together.

    ``before``: where the run stood before the step. In fp16 an overflow is the loss scale's business instead.
    """
    is_finite = math.isfinite(report.loss) and (report.grad_norm is None or math.isfinite(report.grad_norm))
    if is_finite or config.precision.precision == "fp16":
        return
    samples = ", ".join(f"{first} to {last}" for first, last in _bad_samples(report, before, config, mesh))
    raise TrainingDiverged(
        f"Iteration {before.iteration + 1}: the loss is {report.loss} and the gradient norm {report.grad_norm}. It comes from the samples {samples} "
        "of the training data. Nothing of this step was saved: go on from the last checkpoint with other data or a smaller lr."
    )


def check_skips(skipped_in_a_row: int, progress: Progress) -> None:
    """Stops a run whose loss scale finds no end."""
    if skipped_in_a_row >= MOST_SKIPPED_STEPS:
        raise TrainingDiverged(
            f"{skipped_in_a_row} steps in a row overflowed, up to iteration {progress.iteration}, and no loss scale is small enough: "
            "go on from the last checkpoint with a smaller lr, or in bfloat16."
        )


def _bad_samples(report: StepReport, before: Progress, config: Config, mesh: Mesh) -> list[tuple[int, int]]:
    """First and last sample of every micro-batch whose loss is no number; the whole batch where only the gradient is none."""
    micro = config.batch.train_micro_batch_size_per_gpu
    own = []
    for place, loss in enumerate(report.micro_losses):
        first = before.consumed_samples + (place * mesh.data.size + mesh.data.rank) * micro
        if not math.isfinite(loss):
            own.append((first, first + micro - 1))
    found = sorted({samples for replica in gather_objects(own, mesh) for samples in replica})
    return found or [(before.consumed_samples, before.consumed_samples + config.batch.train_batch_size - 1)]

"""When to save and which checkpoints to delete, as pure functions of iterations."""

from __future__ import annotations

from collections.abc import Iterable

from megatron.config.schema import CheckpointConfig


def is_save_due(iteration: int, config: CheckpointConfig) -> bool:
    """Whether a checkpoint belongs after ``iteration`` steps.

    Those of ``extra_save_iters`` always (0 is before the first step); else multiples of ``checkpoint_factor`` (linear), or its
    powers, truncated to integers (log: 1, f, f^2, ...).
    """
    if iteration in config.extra_save_iters:
        return True
    if config.checkpoint_factor is None or iteration <= 0:
        return False
    if config.checkpoint_scale == "linear":
        return iteration % max(int(config.checkpoint_factor), 1) == 0
    return _is_power(iteration, config.checkpoint_factor)


def _is_power(iteration: int, base: float) -> bool:
    if base <= 1:
        raise ValueError(f"checkpoint_factor is {base} with checkpoint_scale log: its powers never grow, give a number above 1.")
    exponent = 0
    while int(base**exponent) < iteration:
        exponent += 1
    return int(base**exponent) == iteration


def iterations_to_delete(saved: Iterable[int], config: CheckpointConfig) -> list[int]:
    """Which of the ``saved`` iterations to delete, oldest first, so that ``keep_last_n_checkpoints`` remain besides the extra ones."""
    if not config.keep_last_n_checkpoints:
        return []
    ordinary = sorted(set(saved) - set(config.extra_save_iters))
    return ordinary[: -config.keep_last_n_checkpoints]

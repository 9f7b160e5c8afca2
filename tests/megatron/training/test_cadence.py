from __future__ import annotations

import pytest

from megatron.config.schema import CheckpointConfig
from megatron.training.cadence import is_save_due, iterations_to_delete


def due(last: int, config: CheckpointConfig) -> list[int]:
    return [iteration for iteration in range(last + 1) if is_save_due(iteration, config)]


def test_linear_saves_are_multiples_of_the_factor() -> None:
    assert due(10, CheckpointConfig(checkpoint_factor=3)) == [3, 6, 9]


def test_log_saves_are_truncated_powers_of_the_factor() -> None:
    assert due(600, CheckpointConfig(checkpoint_factor=2, checkpoint_scale="log")) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert due(12, CheckpointConfig(checkpoint_factor=1.5, checkpoint_scale="log")) == [1, 2, 3, 5, 7, 11]


def test_pythia_saves_154_checkpoints() -> None:
    extra = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    assert len(due(143_000, CheckpointConfig(checkpoint_factor=1000, extra_save_iters=extra))) == 154


def test_extra_saves_need_no_factor_and_may_be_before_the_first_step() -> None:
    assert due(9, CheckpointConfig(extra_save_iters=(0, 7))) == [0, 7]


def test_powers_that_do_not_grow_are_refused() -> None:
    with pytest.raises(ValueError, match="checkpoint_factor is 1"):
        is_save_due(5, CheckpointConfig(checkpoint_factor=1, checkpoint_scale="log"))


def test_the_newest_stay_and_the_extra_ones_too() -> None:
    config = CheckpointConfig(keep_last_n_checkpoints=2, extra_save_iters=(0, 10))
    assert iterations_to_delete([0, 9, 10, 100, 20, 30], config) == [9, 20]
    assert iterations_to_delete([0, 10, 30], config) == []


def test_nothing_is_deleted_unless_asked_for() -> None:
    assert iterations_to_delete([1, 2, 3], CheckpointConfig()) == []

"""GPT-NeoX's table of batch sizes, with an absent accumulation as unset."""

from __future__ import annotations

import pytest

from megatron.config.batch_size import data_parallel_size, resolve_batch


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((48, 4, 3), (48, 4, 3)),
        ((48, 4, None), (48, 4, 3)),
        ((48, None, 3), (48, 4, 3)),
        ((None, 4, 3), (48, 4, 3)),
        ((48, None, None), (48, 12, 1)),
        ((None, 4, None), (16, 4, 1)),
    ],
)
def test_what_is_unset_is_worked_out(given: tuple[int | None, int | None, int | None], expected: tuple[int, int, int]) -> None:
    total, micro, steps = given
    batch = resolve_batch(train_batch_size=total, train_micro_batch_size_per_gpu=micro, gradient_accumulation_steps=steps, data_parallel_size=4)
    assert (batch.train_batch_size, batch.train_micro_batch_size_per_gpu, batch.gradient_accumulation_steps) == expected
    assert batch.data_parallel_size == 4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((None, None, 2), "both missing"),
        ((50, 4, 3), r"train_batch_size \(50\) is not .* \(4\) x .* \(3\) x 4 data-parallel devices = 48: use train_batch_size 48"),
        ((96, 4, 3), "use train_batch_size 48 or gradient_accumulation_steps 6 or train_micro_batch_size_per_gpu 8"),
        ((50, 4, None), "use train_batch_size 48 or 64"),
        ((50, None, 3), "use train_batch_size 48 or 60"),
        ((10, None, None), "not a multiple of 4 data-parallel devices = 4: use train_batch_size 8 or 12"),
        ((3, None, None), "use train_batch_size 4"),
    ],
)
def test_a_triple_that_does_not_multiply_out_names_values_that_would(given: tuple[int | None, int | None, int | None], words: str) -> None:
    total, micro, steps = given
    with pytest.raises(ValueError, match=words):
        resolve_batch(train_batch_size=total, train_micro_batch_size_per_gpu=micro, gradient_accumulation_steps=steps, data_parallel_size=4)


def test_copies_of_the_model_are_the_devices_over_its_pieces() -> None:
    assert data_parallel_size(world_size=8, pipe_parallel_size=0, model_parallel_size=1) == 8
    assert data_parallel_size(world_size=8, pipe_parallel_size=1, model_parallel_size=2) == 4
    assert data_parallel_size(world_size=8, pipe_parallel_size=2, model_parallel_size=2, context_parallel_size=2) == 1


def test_devices_that_hold_no_whole_number_of_models_are_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"model_parallel_size \(4\) needs a multiple of 4 devices and there are 6"):
        data_parallel_size(world_size=6, pipe_parallel_size=1, model_parallel_size=4)

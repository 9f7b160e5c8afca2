from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron.data.blend import BlendedDataset, normalised, samples_of_parts, split_bounds, weights_by_num_documents
from megatron.data.gpt_dataset import read_samples


@dataclass
class Numbers:
    """A data set whose sample i is the number ``start + i``."""

    start: int
    length: int
    is_labelled: bool = False
    seq_length: int = 0

    def __len__(self) -> int:
        return self.length - 1

    @property
    def num_readable(self) -> int:
        return self.length

    def read_into(self, place: int, *, text: NDArray[np.int64], label: NDArray[np.int64] | None) -> None:
        text[:] = self.start + place


def test_a_blend_reads_each_part_in_its_own_order() -> None:
    blend = BlendedDataset([Numbers(0, 11), Numbers(100, 21)], [1, 2])
    assert len(blend) == 30
    assert read_samples(blend, range(6)).text[:, 0].tolist() == [100, 0, 101, 1, 102, 103]


def test_a_part_that_runs_out_ends_the_blend_with_an_error_and_not_with_a_repeat() -> None:
    blend = BlendedDataset([Numbers(0, 3), Numbers(100, 50)], [1, 1])
    assert len(blend) == 51
    assert blend.num_readable == 6
    assert read_samples(blend, range(6)).text[:, 0].tolist() == [0, 100, 1, 101, 2, 102]
    with pytest.raises(IndexError, match="Draw 6 of the blend wants sample 3 of data set 0, which has 3"):
        read_samples(blend, [6])


def test_few_samples_of_many_parts_can_all_be_read() -> None:
    counts = samples_of_parts([1, 1, 1], 10)
    blend = BlendedDataset([Numbers(100 * part, count) for part, count in enumerate(counts)], [1, 1, 1], num_samples=10)
    assert len(blend) == 9
    assert blend.num_readable == 10
    assert read_samples(blend, [9]).text[0, 0] == 3


@pytest.mark.parametrize("place", [-1, 2])
def test_no_draw_outside_the_blend(place: int) -> None:
    with pytest.raises(IndexError, match=f"Draw {place} of the blend does not exist"):
        read_samples(BlendedDataset([Numbers(0, 3)], [1]), [place])


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [math.nan], [math.inf, 1.0]])
def test_weights_without_a_sum_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="cannot be normalised"):
        normalised(weights)


def test_as_many_weights_as_parts() -> None:
    with pytest.raises(ValueError, match="2 weights were given for 1 data sets"):
        BlendedDataset([Numbers(0, 3)], [1, 1])


def test_labels_for_some_parts_only_are_refused() -> None:
    with pytest.raises(ValueError, match="give label_data_paths for all of them"):
        BlendedDataset([Numbers(0, 3), Numbers(0, 3, is_labelled=True)], [1, 1])


def test_at_most_254_parts() -> None:
    with pytest.raises(ValueError, match="255 data sets cannot be blended"):
        BlendedDataset([Numbers(0, 3)] * 255, [1] * 255)


def test_weights_are_added_from_left_to_right() -> None:
    weights = [0.1] * 10
    assert normalised(weights)[0] == 0.1 / (0.1 + 0.1 + 0.1 + 0.1 + 0.1 + 0.1 + 0.1 + 0.1 + 0.1 + 0.1)


def test_alpha_0_forgets_the_sizes_but_for_the_share_taken_off() -> None:
    weights = weights_by_num_documents([10, 30], alpha=0.0)
    assert weights == [0.75, 0.25]


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan", "1,,2"])
def test_a_split_that_is_none_is_refused(split: str) -> None:
    with pytest.raises(ValueError, match="give one to three numbers"):
        split_bounds(split, 10)


@pytest.mark.parametrize("split", ["0,1,1", "1,0,0", "0,0,1", "1,1,1", "7/2/1"])
@pytest.mark.parametrize("documents", [0, 1, 2, 3, 10])
def test_borders_never_run_backwards(split: str, documents: int) -> None:
    bounds = split_bounds(split, documents)
    assert list(bounds) == sorted(bounds)
    assert (bounds[0], bounds[-1]) == (0, documents)

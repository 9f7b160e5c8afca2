"""Several data sets as one, each drawn in proportion to its weight, in GPT-NeoX's order; and the two rules that cut and weigh data."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron.data.gpt_dataset import SampleDataset
from megatron.data.index_builder import blend_index

MAX_PARTS = 254


class BlendedDataset:
    """Draws from ``parts``, always from the one furthest behind its share. `len` is that of all parts together, as in GPT-NeoX.

    A run of few samples from many parts can want more draws than `len`, since each part leaves its last sample out:
    ``num_samples`` draws can be read in any case, as far as the parts have them.
    """

    def __init__(self, parts: Sequence[SampleDataset], weights: Sequence[float], *, num_samples: int = 0) -> None:
        if len(parts) != len(weights):
            raise ValueError(f"{len(weights)} weights were given for {len(parts)} data sets: give one weight for each.")
        if not 1 <= len(parts) <= MAX_PARTS:
            raise ValueError(f"{len(parts)} data sets cannot be blended: give 1 to {MAX_PARTS}, and merge files if there are more.")
        if len({part.is_labelled for part in parts}) > 1:
            raise ValueError("Some data sets of the blend have label files and some have none: give label_data_paths for all of them.")
        assert len({part.seq_length for part in parts}) == 1
        self.parts = tuple(parts)
        self.seq_length, self.is_labelled = parts[0].seq_length, parts[0].is_labelled
        once = np.array(normalised(weights))
        self._length = sum(len(part) for part in parts)
        self.part_of, self.row_of = blend_index(once / np.sum(once), max(self._length, num_samples))
        self._num_readable = _before_overrun(self.part_of, self.row_of, [part.num_readable for part in parts])

    def __len__(self) -> int:
        return self._length

    @property
    def num_readable(self) -> int:
        """Draws before one falls on a part that has no sample left. (GPT-NeoX then repeats samples; here that is an error.)"""
        return self._num_readable

    def read_into(self, place: int, *, text: NDArray[np.int64], label: NDArray[np.int64] | None) -> None:
        if not 0 <= place < len(self.part_of):
            raise IndexError(f"Draw {place} of the blend does not exist: it has {len(self.part_of)}, counted from 0.")
        part, row = int(self.part_of[place]), int(self.row_of[place])
        if row >= self.parts[part].num_readable:
            raise IndexError(
                f"Draw {place} of the blend wants sample {row} of data set {part}, which has {self.parts[part].num_readable}: "
                "ask for more samples, or lower its weight."
            )
        self.parts[part].read_into(row, text=text, label=label)


def normalised(weights: Sequence[float]) -> list[float]:
    """The weights over their sum. Added from left to right in f64: the order of samples hangs on the last bit."""
    given = [float(weight) for weight in weights]
    total = functools.reduce(operator.add, given, 0.0)
    if not all(math.isfinite(weight) and weight >= 0 for weight in given) or not 0 < total < math.inf:
        raise ValueError(f"Weights {given} cannot be normalised: give finite numbers of at least 0, one of them above it.")
    return [weight / total for weight in given]


def samples_of_parts(weights: Sequence[float], num_samples: int) -> list[int]:
    """Samples to prepare of each part: its share and half a percent more, so that rounding never empties it."""
    return [math.ceil(num_samples * weight * 1.005) for weight in normalised(weights)]


def weights_by_num_documents(num_documents: Sequence[int], *, alpha: float) -> list[float]:
    """Weights that follow the numbers of documents (`weight_by_num_documents`), flattened by ``alpha`` below 1.

    With the shares ``p`` and ``q ~ p ** alpha``, part i weighs ``q_i * (1 - p_i)``, normalised. A single part weighs 1.
    """
    if len(num_documents) == 1:
        return [1.0]
    share = normalised(num_documents)
    flattened = normalised([p**alpha for p in share])
    return normalised([q * (1 - p) for p, q in zip(share, flattened, strict=True)])


def split_bounds(split: str, num_documents: int) -> tuple[int, int, int, int]:
    """Borders of the training, validation and test documents by a `split` such as ``"969, 30, 1"`` or ``"8/1/1"``."""
    bounds = [0]
    for share in _shares(split):
        bounds.append(bounds[-1] + round(share * float(num_documents)))
    surplus = bounds[-1] - num_documents
    train, valid, test = (max(bound - surplus, 0) for bound in bounds[1:])
    return 0, train, valid, test


def _shares(split: str) -> list[float]:
    try:
        numbers = [float(number) for number in split.split("," if "," in split else "/")]
        if len(numbers) > 3:
            raise ValueError(f"{len(numbers)} numbers")
        return normalised(numbers + [0.0] * (3 - len(numbers)))
    except ValueError as error:
        raise ValueError(f"split is {split!r} ({error}): give one to three numbers of at least 0, such as '969, 30, 1'.") from error


def _before_overrun(part_of: NDArray[np.uint8], row_of: NDArray[np.int64], lengths: list[int]) -> int:
    """The first draw that asks a part for more than it has, or the number of draws."""
    overruns = np.zeros(len(part_of), dtype=bool)
    for part, length in enumerate(lengths):
        overruns |= (part_of == part) & (row_of >= length)
    return int(overruns.argmax()) if overruns.any() else len(part_of)

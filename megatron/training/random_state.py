"""The random generators of a process: seeded per replica, saved, restored, and kept out of what must not disturb them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


class RandomState(TypedDict):
    """Every generator of one process, in types that `torch.load` reads without running code."""

    python: tuple[int, list[int], float | None]
    numpy: tuple[str, Tensor, int, int, float]
    torch: Tensor
    device: Tensor | None
    """Of the CUDA device, where there is one."""


def seed_replica(seed: int, *, replica: int) -> None:
    """Seeds dropout and everything else random: another stream for each data-parallel ``replica`` and each piece of its samples."""
    random.seed(seed + replica)
    np.random.seed((seed + replica) % 2**32)
    torch.manual_seed(seed + replica)


def random_state(device: torch.device) -> RandomState:
    """The state of every generator of this process now."""
    version, values, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    return RandomState(
        python=(version, list(values), gauss),
        numpy=(str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(place), int(has_gauss), float(cached)),
        torch=torch.get_rng_state(),
        device=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    )


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Puts every generator back to ``state``."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """What runs inside leaves the generators as they were (a torch DataLoader draws a number when it starts)."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)


def quietly_started(loader: Iterable[T], device: torch.device) -> Iterator[T]:
    """Everything ``loader`` yields; its start, which happens when the first item is asked for, leaves the generators alone."""
    items = iter(loader)
    with undisturbed(device):
        first = next(items)
    yield first
    yield from items

"""An object apart from its tensors: the form in which a batch leaves the process that made it.

A batch and its layout are some twenty tensors. Left to torch, each would cost a shared-memory file, and each would be pinned by itself;
taken out of the object they go through a pipe together and are pinned in one piece. Nothing but these two copies them.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
ALIGNMENT = 64
"""Bytes: where each tensor begins in a pinned piece is a multiple of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet(Generic[T]):
    tensors: Mapping[int, Tensor]
    """Contiguous, under names that mean nothing."""
    skeleton: bytes
    """The pickled object, in which each tensor is its name."""

    @classmethod
    def of(cls, value: T) -> Packet[T]:
        """``value`` taken apart. A tensor that occurs twice is there once, and copied only if it is not contiguous."""
        stream = io.BytesIO()
        pickler = _Pickler(stream)
        pickler.dump(value)
        return cls(tensors={name: tensor.contiguous() for name, tensor in pickler.tensors.items()}, skeleton=stream.getvalue())

    def open(self) -> T:
        """The object, with the packet's tensors in it."""
        return _Unpickler(io.BytesIO(self.skeleton), self.tensors).load()

    def __reduce__(self) -> tuple[object, tuple[dict[int, NDArray], bytes]]:
        """Through a pipe as plain bytes: a shared-memory file would cost a connection between the processes, which takes longer."""
        return _of_arrays, ({name: tensor.numpy() for name, tensor in self.tensors.items()}, self.skeleton)

    def pin_memory(self) -> Packet[T]:
        """The same in one piece of memory that a device can copy from while the process goes on. (So a torch DataLoader calls it.)"""
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in self.tensors.values()]
        rooms = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True).split(sizes)
        pinned = {
            name: room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            for room, (name, tensor) in zip(rooms, self.tensors.items(), strict=True)
        }
        return Packet(tensors=pinned, skeleton=self.skeleton)


def _of_arrays(arrays: dict[int, NDArray], skeleton: bytes) -> Packet[object]:
    return Packet(tensors={name: torch.from_numpy(array) for name, array in arrays.items()}, skeleton=skeleton)


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: dict[int, Tensor] = {}

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors[id(value)] = value
        return id(value)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, tensors: Mapping[int, Tensor]) -> None:
        super().__init__(stream)
        self._tensors = tensors

    def persistent_load(self, name: int) -> Tensor:
        return self._tensors[name]

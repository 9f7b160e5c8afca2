"""An object with all its tensors in one buffer: the form in which a batch leaves the process that made it.

A batch and its layout are some twenty tensors. Sent one by one, each would cost a shared-memory file, and each would be pinned by itself;
in one buffer they go through a pipe together and are pinned together, and what comes out are views of it.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
ALIGNMENT = 64
"""Bytes: where each tensor begins is a multiple of this."""
_Place = tuple[int, tuple[int, ...], torch.dtype]
"""First byte in the buffer, shape, dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet(Generic[T]):
    buffer: Tensor
    """``[bytes]`` uint8"""
    skeleton: bytes
    """The pickled object, in which each tensor is its place in the buffer."""

    @classmethod
    def of(cls, value: T) -> Packet[T]:
        """A copy of ``value``. A tensor that occurs twice is stored once."""
        stream = io.BytesIO()
        pickler = _Pickler(stream)
        pickler.dump(value)
        buffer = torch.empty(pickler.num_bytes, dtype=torch.uint8)
        for tensor, place in pickler.places.values():
            _view(buffer, place).copy_(tensor)
        return cls(buffer=buffer, skeleton=stream.getvalue())

    def open(self) -> T:
        """The object; its tensors are views of the buffer."""
        return _Unpickler(io.BytesIO(self.skeleton), self.buffer).load()

    def __reduce__(self) -> tuple[object, tuple[NDArray[np.uint8], bytes]]:
        """Through a pipe as plain bytes: a shared-memory file would cost a connection between the processes, which takes longer."""
        return _of_bytes, (self.buffer.numpy(), self.skeleton)

    def pin_memory(self) -> Packet[T]:
        """The same in memory that a device can copy from while the process goes on. (Under this name a torch DataLoader asks for it.)"""
        return Packet(buffer=self.buffer.pin_memory(), skeleton=self.skeleton)


def _of_bytes(content: NDArray[np.uint8], skeleton: bytes) -> Packet[object]:
    return Packet(buffer=torch.from_numpy(content), skeleton=skeleton)


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.places: dict[int, tuple[Tensor, _Place]] = {}
        """By `id` of the tensors, which are kept here so that none is reused."""
        self.num_bytes = 0

    def persistent_id(self, value: object) -> _Place | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self.places:
            self.places[id(value)] = value, (self.num_bytes, tuple(value.shape), value.dtype)
            self.num_bytes += -(-value.numel() * value.itemsize // ALIGNMENT) * ALIGNMENT
        return self.places[id(value)][1]


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, buffer: Tensor) -> None:
        super().__init__(stream)
        self._buffer = buffer

    def persistent_load(self, place: _Place) -> Tensor:
        return _view(self._buffer, place)


def _view(buffer: Tensor, place: _Place) -> Tensor:
    start, shape, dtype = place
    return buffer[start : start + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)

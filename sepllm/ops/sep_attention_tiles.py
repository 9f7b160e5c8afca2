"""How the Triton attention kernels divide their work: a table instead of tuning at run time, so that results repeat.

Chosen on cross-compiled code, without a GPU: the largest tiles whose registers do not spill (or by a few words outside the loops),
128 queries forward and 64 x 64 backward where they fit. `python -m tools.bench.attention` is where measured ones would come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """One kernel: queries and keys of a tile, warps of a program, buffers of its pipeline, and a limit on registers per thread."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """The four kernels: outputs, gradient of queries, gradients of far columns, gradients of keys."""

    forward: Tile
    queries: Tile
    far: Tile
    keys: Tile


INTERPRETER = (0, 0)
"""In the place of a compute capability: large tiles, as there the time goes by the number of operations."""


def tiles(head_size: int, dtype: torch.dtype, capability: tuple[int, int], *, adjusts: bool = False) -> Tiles:
    """The tiles of all kernels for a head size (up to 256), a dtype and a compute capability (8.0 or newer, or `INTERPRETER`).

    ``adjusts``: of the self-adjust softmax, which keeps one more sum of values per query.
    """
    if capability == INTERPRETER:
        return _same(Tile(128, 128, 1, 1))
    if adjusts:
        return _adjusting_float32(head_size) if dtype == torch.float32 else _adjusting(head_size)
    if dtype == torch.float32:
        return _float32(head_size)
    if head_size > 128 and capability not in ((8, 0), (8, 7)) and capability[0] not in (9, 10):  # 100 KiB of shared memory
        return _same(Tile(32, 32, 4, 2))
    return _hopper(head_size) if capability >= (9, 0) else _ampere(head_size)


def _hopper(head_size: int) -> Tiles:
    """``wgmma`` wants 64 rows a warp group; 128 and 168 registers let two and three programs share a multiprocessor."""
    if head_size <= 64:
        backward = Tile(64, 64, 4, 2)
        return Tiles(forward=Tile(128, 64, 8, 3, 128), queries=Tile(64, 64, 4, 2, 168), far=backward, keys=backward)
    if head_size <= 128:
        backward = Tile(64, 128, 8, 2)
        return Tiles(forward=Tile(128, 64, 8, 3), queries=Tile(64, 64, 4, 2), far=backward, keys=backward)
    backward = Tile(32, 64, 8, 2)
    return Tiles(forward=Tile(128, 32, 8, 2), queries=Tile(128, 32, 8, 2), far=backward, keys=backward)


def _ampere(head_size: int) -> Tiles:
    if head_size <= 64:
        backward = Tile(64, 64, 4, 2)
        return Tiles(forward=Tile(128, 64, 4, 3), queries=backward, far=backward, keys=backward)
    if head_size <= 128:
        backward = Tile(64, 64, 8, 2)
        return Tiles(forward=Tile(128, 64, 8, 2), queries=backward, far=backward, keys=backward)
    backward = Tile(32, 64, 8, 2)
    return Tiles(forward=Tile(64, 64, 8, 2), queries=Tile(64, 32, 8, 2), far=backward, keys=backward)


def _float32(head_size: int) -> Tiles:
    """Exact products run on the ordinary units with both operands in registers: small tiles."""
    if head_size <= 64:
        tile, backward = Tile(32, 32, 4, 2), Tile(32, 32, 8, 2)
        return Tiles(forward=tile, queries=tile, far=backward, keys=backward)
    if head_size <= 128:
        backward = Tile(32, 32, 8, 2)
        return Tiles(forward=Tile(32, 16, 4, 2), queries=backward, far=backward, keys=backward)
    backward = Tile(16, 16, 8, 2)
    return Tiles(forward=Tile(16, 16, 4, 1), queries=Tile(16, 32, 8, 2), far=backward, keys=backward)


def _adjusting(head_size: int) -> Tiles:
    """Half the keys of a tile, as two sums of values and the scores beside their weights fill the registers."""
    if head_size <= 64:
        backward = Tile(32, 64, 4, 2)
        return Tiles(forward=Tile(64, 32, 4, 2), queries=Tile(64, 64, 4, 2), far=backward, keys=backward)
    if head_size <= 128:
        tile, backward = Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)
        return Tiles(forward=tile, queries=tile, far=backward, keys=backward)
    return _same(Tile(32, 32, 8, 2))


def _adjusting_float32(head_size: int) -> Tiles:
    if head_size <= 64:
        backward = Tile(32, 32, 8, 2)
        return Tiles(forward=Tile(16, 32, 4, 2), queries=Tile(32, 32, 4, 2), far=backward, keys=backward)
    return _same(Tile(16, 16, 8, 2 if head_size <= 128 else 1))


def _same(tile: Tile) -> Tiles:
    return Tiles(forward=tile, queries=tile, far=tile, keys=tile)

"""Random numbers of sharded layers: alike on all shards where activations are, different where each shard has its own.

The generators of all shards of a replica are seeded alike and draw alike, so that dropout on replicated activations agrees. Where
activations are sharded, a generator is seeded for the moment with a number that the common stream yields and the shard's place. The common
stream is therefore all there is to save, and whatever repeats it, such as activation checkpointing, repeats both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from megatron.parallel.regions import TensorParallel


@contextmanager
def sharded_random(parallel: TensorParallel, device: torch.device) -> Iterator[None]:
    """What torch draws inside on ``device`` differs from shard to shard; afterwards their streams go on alike."""
    if parallel.size == 1:
        yield
        return
    seed = int(torch.randint(2**62, ()))  # of the CPU's generator: no device is waited for
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((seed + parallel.rank) % 2**62)
        yield


def dropout(x: Tensor, probability: float, *, is_training: bool, parallel: TensorParallel, is_sharded: bool) -> Tensor:
    """`torch.nn.functional.dropout`. ``is_sharded``: each shard has other tokens in ``x``."""
    if probability == 0 or not is_training:
        return x
    if not is_sharded:
        return functional.dropout(x, probability)
    with sharded_random(parallel, x.device):
        return functional.dropout(x, probability)

"""The vocabulary in shards: its embedding, and what the cross-entropy of sharded logits needs of the other shards."""

from __future__ import annotations

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn import functional

from megatron.parallel.collectives import sum_along
from megatron.parallel.mesh import Axis
from megatron.parallel.regions import TensorParallel


class VocabularyEmbedding(nn.Embedding):
    """Rows of the tokens that this shard holds. The result is whole; of a cut sequence it is this shard's piece."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, parallel: TensorParallel) -> None:
        super().__init__(parallel.local(num_embeddings), embedding_dim)
        self.parallel = parallel

    def forward(self, ids_BT: Tensor) -> Tensor:
        """``[B, T, D]``."""
        if self.parallel.size == 1:
            return super().forward(ids_BT)
        row = ids_BT - self.parallel.rank * self.num_embeddings
        is_here = (row >= 0) & (row < self.num_embeddings)
        rows_BTD = functional.embedding(torch.where(is_here, row, 0), self.weight)
        return self.parallel.left(rows_BTD * is_here[..., None])


def whole_statistics(maximum: Tensor, total: Tensor, target: Tensor, axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row, the statistics of the whole vocabulary from those of this shard (`sepllm.ops.cross_entropy.Statistics`).

    Two small all-reduces: the maxima, then both sums at once.
    """
    if axis.size == 1:
        return maximum, total, target
    largest = maximum.clone()
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=axis.group)
    scaled = torch.where(total == 0, 0, total * (maximum - largest).exp())
    whole_total, whole_target = sum_along(torch.stack([scaled, target]), axis)
    return largest, whole_total, whole_target


def whole_vocabulary(logits_BTV: Tensor, axis: Axis) -> Tensor:
    """The logits of all shards, ``[B, T, V]``, on each. Not differentiable."""
    if axis.size == 1:
        return logits_BTV
    shards = [torch.empty_like(logits_BTV) for _ in range(axis.size)]
    distributed.all_gather(shards, logits_BTV.contiguous(), group=axis.group)
    return torch.cat(shards, -1)

"""Activation checkpointing: which results of a layer are kept for the backward pass, and which are computed again.

full        one activation every few layers is kept                     memory of a group of layers, a third more computing
selective   products with matrices and attention keep their results,    memory of a layer about halved, a few per cent more computing
            as do sums over shards; norms and activations of a layer
            are computed again
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts, noop_context_fn

from megatron.config.schema import TrainingConfig

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]

MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear_pointwise", "add_")
"""And the bias that DeepSpeed's linear of ZeRO 3 adds over a kept product: computed again, it would be added twice."""
COLLECTIVES = ("all_reduce", "reduce_scatter_tensor")
"""Sums over the shards of a layer, which would be sent once more."""
ATTENTION = ("scaled_dot_product", "sep_attention", "flex_attention", "chunked", "rotate_packed", "exchange_keys")
"""Beginnings of names. The rotation is kept with the projection that it overwrites, fetched keys lest they be fetched again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompute:
    num_layers: int
    """That are computed again together."""
    is_selective: bool

    @classmethod
    def of(cls, training: TrainingConfig) -> Recompute | None:
        if not training.checkpoint_activations:
            return None
        return cls(num_layers=training.checkpoint_num_layers, is_selective=training.recompute_granularity == "selective")

    @property
    def contexts(self) -> Contexts:
        """For `torch.utils.checkpoint.checkpoint`."""
        return _selective if self.is_selective else noop_context_fn


def _selective() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return create_selective_checkpoint_contexts(_policy, allow_cache_entry_mutation=True)


def _policy(_context: object, operator: Any, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    name = operator.name().split("::")[-1].removeprefix("_").split(".")[0] if isinstance(operator, torch._ops.OpOverload) else str(operator)
    is_kept = name in MATRIX_PRODUCTS or name in COLLECTIVES or name.startswith(ATTENTION)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

"""Context parallelism: each process has two chunks of every row, and fetches the keys and values that its queries read elsewhere.

Per layer these are the far keys before its last query and the windows that reach into its chunks, sent once in one all-to-all; gradients
go back the same way. `sepllm.pieces` says which they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from megatron.parallel.mesh import Axis
from sepllm.layout import KeyRanges, TokenLayout
from sepllm.pattern import AttentionPattern, SelfAdjust, Softmax
from sepllm.pieces import Exchange, PieceRanges, zigzag_columns


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyExchange:
    """Fetches what the queries of this process read."""

    plan: Exchange
    group: str
    """torch's name of the group that shares the row."""

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Of the keys and values ``[B, T, K, H]`` of this process's tokens, and everybody else's, those read here: ``[B, S, K, H]``."""
        plan = self.plan
        places = (plan.kept_from, plan.kept_at, plan.sent, plan.received_at, plan.counts)
        keys, values = _exchange_keys(k, v, *places, plan.num_keys, self.group)
        return keys, values


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextLayout:
    """A `TokenLayout` as a process sees it that has some of its columns: these are the queries."""

    whole: TokenLayout
    columns: Tensor
    """``[T]`` int64: which of the whole layout's are here."""
    group: str
    layers: tuple[PieceRanges, ...]
    """One a layer; layers with the same window and grid share it."""

    @classmethod
    def of(cls, layout: TokenLayout, context: Axis) -> ContextLayout:
        """The part of this process, from the layout of whole rows on the CPU. Every process of the axis works out the same."""
        assert context.group is not None
        columns = zigzag_columns(layout.num_queries, context.size)
        needs_extremes = _looks_at_all(layout.pattern.softmax)
        ranges = [layout.ranges(layer) for layer in range(layout.pattern.num_layers)]
        made = {
            key: PieceRanges.of(of_layer, columns, piece=context.rank, needs_extremes=needs_extremes)
            for key, of_layer in {id(of_layer): of_layer for of_layer in ranges}.items()
        }
        layers = tuple(made[id(of_layer)] for of_layer in ranges)
        return cls(whole=layout, columns=columns[context.rank], group=context.group.group_name, layers=layers)

    @property
    def pattern(self) -> AttentionPattern:
        return self.whole.pattern

    @property
    def ids(self) -> Tensor:
        """``[B, T]``"""
        return self.whole.ids[:, self.columns]

    @property
    def num_queries(self) -> int:
        return len(self.columns)

    def ranges(self, layer: int) -> KeyRanges:
        """What the queries of this layer read, over the keys that its `exchange` gives."""
        return self.layers[layer].ranges

    def exchange(self, layer: int) -> KeyExchange:
        """How the keys and values of this layer come here."""
        return KeyExchange(plan=self.layers[layer].exchange, group=self.group)

    def key_columns(self, layer: int) -> Tensor:
        """The whole layout's column of each key. ``[B, S]`` int64."""
        return self.layers[layer].columns

    def to(self, device: torch.device | str) -> ContextLayout:
        """The same on another device (the copy does not wait for it)."""
        moved = {id(made): made.to(device) for made in {id(made): made for made in self.layers}.values()}
        return replace(
            self,
            whole=self.whole.to(device),
            columns=self.columns.to(device, non_blocking=True),
            layers=tuple(moved[id(made)] for made in self.layers),
        )


def _looks_at_all(softmax: Softmax) -> bool:
    return isinstance(softmax, SelfAdjust) and softmax.kind == "normalised" and softmax.extremes == "causal"


_PLACES = "Tensor kept_from, Tensor kept_at, Tensor sent, Tensor received_at, Tensor counts"


@torch.library.custom_op(
    "megatron::exchange_keys", mutates_args=(), schema=f"(Tensor k, Tensor v, {_PLACES}, int num_keys, str group) -> (Tensor, Tensor)"
)
def _exchange_keys(
    k: Tensor, v: Tensor, kept_from: Tensor, kept_at: Tensor, sent: Tensor, received_at: Tensor, counts: Tensor, num_keys: int, group: str
) -> tuple[Tensor, Tensor]:
    own = [x.flatten(0, 1) for x in (k, v)]
    received = _all_to_all(torch.stack([x[sent] for x in own], 1), counts, group)
    read = [x.new_zeros(len(k) * num_keys, *x.shape[1:]) for x in own]
    for place, (x, of_own) in enumerate(zip(read, own, strict=True)):
        x[kept_at] = of_own[kept_from]
        x[received_at] = received[:, place]
    keys, values = (x.unflatten(0, (len(k), num_keys)) for x in read)
    return keys, values


@torch.library.custom_op(
    "megatron::exchange_keys_backward",
    mutates_args=(),
    schema=f"(Tensor grad_k, Tensor grad_v, {_PLACES}, int num_queries, str group) -> (Tensor, Tensor)",
)
def _exchange_keys_backward(
    grad_k: Tensor,
    grad_v: Tensor,
    kept_from: Tensor,
    kept_at: Tensor,
    sent: Tensor,
    received_at: Tensor,
    counts: Tensor,
    num_queries: int,
    group: str,
) -> tuple[Tensor, Tensor]:
    """Each key's gradient is the sum of those of all pieces that read it, in their order, in fp32 or wider."""
    read = [x.flatten(0, 1) for x in (grad_k, grad_v)]
    returned = _all_to_all(torch.stack([x[received_at] for x in read], 1), counts.flip(0), group)
    by_piece = list(zip(sent.split(counts[0].tolist()), returned.split(counts[0].tolist()), strict=True))
    totals = []
    for place, x in enumerate(read):
        total = x.new_zeros(len(grad_k) * num_queries, *x.shape[1:], dtype=torch.promote_types(x.dtype, torch.float32))
        total[kept_from] = x[kept_at].to(total.dtype)
        for places, gradients in by_piece:
            total[places] += gradients[:, place]  # a piece asks for a key once, so the places differ
        totals.append(total.to(x.dtype).unflatten(0, (len(grad_k), num_queries)))
    return totals[0], totals[1]


def _all_to_all(rows: Tensor, counts: Tensor, group: str) -> Tensor:
    """``rows [keys sent, 2, K, H]`` to the others, for their ``[keys received, 2, K, H]``. ``counts [2, pieces]``: to and from each."""
    to_each, from_each = counts.tolist()
    received = rows.new_empty(sum(from_each), *rows.shape[1:])
    process_group = distributed.distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined,arg-type]
    distributed.all_to_all_single(received, rows, from_each, to_each, group=process_group)
    return received


@_exchange_keys.register_fake
def _(k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    num_keys = others[-2]
    return k.new_empty(k.shape[0], num_keys, *k.shape[2:]), v.new_empty(v.shape[0], num_keys, *v.shape[2:])


@_exchange_keys_backward.register_fake
def _(grad_k: Tensor, grad_v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    num_queries = others[-2]
    return grad_k.new_empty(grad_k.shape[0], num_queries, *grad_k.shape[2:]), grad_v.new_empty(grad_v.shape[0], num_queries, *grad_v.shape[2:])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    k, _, *places, _, ctx.group = inputs
    ctx.num_queries = k.shape[1]
    ctx.save_for_backward(*places)


def _gradients(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
    places = ctx.saved_tensors
    return *_exchange_keys_backward(grad_k, grad_v, *places, ctx.num_queries, ctx.group), *[None] * (len(places) + 2)


_exchange_keys.register_autograd(_gradients, setup_context=_remember)

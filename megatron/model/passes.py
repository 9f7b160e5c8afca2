"""What the layers of one forward pass work with: which keys each reads, with which core, and where its tokens stand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron.config.schema import ModelConfig
from megatron.model.cache import KeyValueCache
from megatron.parallel.context import ContextLayout, KeyExchange
from megatron.parallel.regions import TensorParallel
from sepllm.attention import PositionBias, prepare, spec_of
from sepllm.layout import KeyRanges, TokenLayout
from sepllm.pattern import Softmax
from sepllm.positions import Positions, alibi_slopes, rotary_table


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPass:
    """What one layer of a forward pass works with; layers with the same window and core may share it."""

    ranges: KeyRanges
    """What the queries read."""
    core: str
    """Which attention core computes."""
    softmax: Softmax
    rotary: tuple[Tensor, Tensor] | None
    """Cosines and sines, ``[B, T, R]``."""
    bias: PositionBias | None
    cache: KeyValueCache | None
    exchange: KeyExchange | None = None
    """Where other processes have some of the keys."""


def positions_of(layout: TokenLayout | ContextLayout, config: ModelConfig) -> Positions:
    """The positions of the layout's queries, and of all columns of the text."""
    segment_end_ids = config.bipe_separator_ids if config.use_bipe else None
    if not isinstance(layout, ContextLayout):
        return Positions.of(layout, segment_end_ids=segment_end_ids)
    whole = Positions.of(layout.whole, segment_end_ids=segment_end_ids)
    return replace(whole, embedded=whole.embedded[:, layout.columns], queries=whole.queries[:, layout.columns])


def layer_passes(
    layout: TokenLayout | ContextLayout,
    positions: Positions,
    config: ModelConfig,
    *,
    like: Tensor,
    core: str,
    is_training: bool,
    layers: range | None = None,
    cache: KeyValueCache | None = None,
    parallel: TensorParallel = TensorParallel(),
) -> list[LayerPass]:
    """One for each of ``layers`` (default: all of them), every core prepared, so that nothing is worked out inside a layer.

    ``like``: a tensor of the dtype and device that the layers compute with.
    """
    rotary = slopes = None
    if config.pos_emb == "rotary":
        rotary = rotary_table(
            positions.queries,
            rotary_dims=rotary_dims(config),
            base=config.rotary_emb_base,
            dtype=like.dtype,
            angle_dtype=torch.float16 if config.rotary_angles == "fp16" else torch.float32,
        )
    if config.pos_emb == "alibi":
        slopes = parallel.own(alibi_slopes(config.num_attention_heads), dim=0).to(like.device, non_blocking=True)
    softmax = layout.pattern.softmax
    dropout = config.attention_dropout if is_training else 0.0

    def of_layer(layer: int) -> LayerPass:
        ranges, exchange, keys = layout.ranges(layer), None, positions.keys
        if isinstance(layout, ContextLayout):
            exchange, keys = layout.exchange(layer), keys.gather(1, layout.key_columns(layer))
        bias = None if slopes is None else PositionBias(slopes=slopes, query_positions=positions.queries, key_positions=keys)
        spec = spec_of(like, ranges, softmax=softmax, bias=bias, dropout=dropout, needs_grad=torch.is_grad_enabled())
        chosen = prepare(ranges, spec, core)
        return LayerPass(ranges=ranges, core=chosen, softmax=softmax, rotary=rotary, bias=bias, cache=cache, exchange=exchange)

    return [of_layer(layer) for layer in (range(config.num_layers) if layers is None else layers)]


def rotary_dims(config: ModelConfig) -> int:
    """How many dimensions of each head are rotated."""
    return int(config.hidden_size // config.num_attention_heads * config.rotary_pct)

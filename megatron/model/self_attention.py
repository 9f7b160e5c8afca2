"""The attention half of a block: one projection to queries, keys and values, `sepllm.attention`, one projection back."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.model.norms import make_norm, make_sharded_norm
from megatron.model.passes import LayerPass, rotary_dims
from megatron.parallel.linear import ColumnLinear, RowLinear
from megatron.parallel.random import sharded_random
from megatron.parallel.regions import TensorParallel
from sepllm.attention import attend
from sepllm.ops.choice import Impl
from sepllm.ops.rotary import Heads, rotate_packed, split_packed
from sepllm.positions import apply_rotary, rotary_frequencies


class SelfAttention(nn.Module):
    """Attention of one layer over the keys that its pattern names.

    Rows of `query_key_value`, with H the head size:

        as many k/v heads as heads    head 0: q k v | head 1: q k v | ...     H rows each
        grouped heads                 q of all heads | k of all k/v heads | v of all k/v heads

    The second is GPT-NeoX's order since #1315; before that, and in the SepLLM fork, a group was ``q .. q k v``. Each shard has its share of
    the heads, in that order. Under the parallel residual the result is this shard's part, which the block sums with that of the MLP.
    """

    def __init__(self, config: ModelConfig, *, layer: int, parallel: TensorParallel = TensorParallel()) -> None:
        super().__init__()
        self.layer = layer
        self.parallel = parallel
        self.num_heads = parallel.local(config.num_attention_heads)
        self.num_kv_heads = parallel.local(config.num_kv_heads)
        self.head_size = config.hidden_size // config.num_attention_heads
        self.attention_dropout = config.attention_dropout
        self.rotary_impl: Impl = "auto" if config.rope_fusion else "reference"
        self.score_divisor = max(1, layer) if config.apply_query_key_layer_scaling else 1
        rows, has_bias = (config.num_attention_heads + 2 * config.num_kv_heads) * self.head_size, config.use_bias_in_attn_linear
        self.query_key_value = ColumnLinear(config.hidden_size, rows, bias=has_bias, parallel=parallel)
        self.qk_layernorm = _make_qk_layernorm(config, parallel) if config.use_qk_layernorm else None
        self.dense = RowLinear(config.hidden_size, config.hidden_size, bias=has_bias, parallel=parallel, is_part=config.gpt_j_residual)
        if config.pos_emb == "rotary" and config.rotary_save_freqs_buffer:
            self.rotary_emb = SavedFrequencies(config)

    def forward(self, hidden_BTD: Tensor, shared: LayerPass) -> Tensor:
        q_BTNH, k_BTKH, v_BTKH = self._heads(self.query_key_value(hidden_BTD), shared.rotary)
        if shared.cache is not None:
            k_BSKH, v_BSKH = shared.cache.append(self.layer, k_BTKH, v_BTKH)
        elif shared.exchange is not None:
            k_BSKH, v_BSKH = shared.exchange(k_BTKH, v_BTKH)
        else:
            k_BSKH, v_BSKH = k_BTKH, v_BTKH
        with self._own_random(q_BTNH.device):
            mixed_BTNH = self._attend(q_BTNH, k_BSKH, v_BSKH, shared)
        return self.dense(mixed_BTNH.flatten(2))

    def _own_random(self, device: torch.device) -> AbstractContextManager[None]:
        """Of these heads' dropout."""
        return sharded_random(self.parallel, device) if self.training and self.attention_dropout else nullcontext()

    def _attend(self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, shared: LayerPass) -> Tensor:
        """Query-key layer scaling divides the product of q and k by the layer's number, so that it fits fp16, and undoes it after."""
        scale = 1 / math.sqrt(self.head_size)
        if self.score_divisor > 1:
            q_BTNH, scale = q_BTNH * (scale / self.score_divisor), float(self.score_divisor)
        return attend(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            shared.ranges,
            scale=scale,
            core=shared.core,
            softmax=shared.softmax,
            bias=shared.bias,
            dropout=self.attention_dropout if self.training else 0.0,
        )

    def _heads(self, packed: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Heads:
        """Queries, keys and values, ``[B, T, heads, H]``, normed and rotated; ``packed`` is given up."""
        num_heads, num_kv_heads, head_size = self.num_heads, self.num_kv_heads, self.head_size
        if rotary is not None and self.qk_layernorm is None:
            return rotate_packed(packed, *rotary, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, impl=self.rotary_impl)
        q, k, v = split_packed(packed, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size)
        if self.qk_layernorm is not None:
            q, k = self.qk_layernorm(q), self.qk_layernorm(k)
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        return Heads(q, k, v)


class SavedFrequencies(nn.Module):
    """Puts `inv_freq` into checkpoints, as GPT-NeoX did until 2023 (`rotary_save_freqs_buffer`). Nothing is read back from it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rotary_dims, self.base = rotary_dims(config), config.rotary_emb_base

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "inv_freq"] = rotary_frequencies(self.rotary_dims, base=self.base, device="cpu")

    def _load_from_state_dict(self, *_: object) -> None:
        pass


def _make_qk_layernorm(config: ModelConfig, parallel: TensorParallel) -> nn.Module:
    """One norm for queries and keys, over all heads at once, as in GPT-NeoX."""
    if config.num_kv_heads != config.num_attention_heads:
        raise ValueError(
            f"use_qk_layernorm is one norm over all heads of q and of k, but there are {config.num_attention_heads} heads and num_kv_heads is "
            f"{config.num_kv_heads}: leave num_kv_heads out, or use_qk_layernorm off."
        )
    shape = (config.num_attention_heads, config.hidden_size // config.num_attention_heads)
    if parallel.size == 1:
        return make_norm(config.norm, shape, epsilon=config.norm_epsilon)
    return make_sharded_norm(config.norm, shape, epsilon=config.norm_epsilon, parallel=parallel)

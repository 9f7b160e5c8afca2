"""SepLLM GPT-NeoX for transformers: GPT-NeoX blocks whose attention reads the ranges of a `TokenLayout`.

The layout of a batch is worked out once per forward pass and shared by all layers. A token that follows cached keys reads under the
decode pattern, however many there are of it (one step, a chunk of a long prompt, a speculative guess); every other token under the
prefill pattern. With a SepCache, tokens that follow cached ones read whatever it stores. Attention weights are never formed, so they cannot be
returned.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from sepllm.attention.registry import attend
from sepllm.attention.spec import PositionBias
from sepllm.hf.configuration_sepllm_gpt_neox import SepLLMGPTNeoXConfig, decode_pattern, prefill_pattern
from sepllm.hf.layout_cache import TokenCache, layout_layer
from sepllm.layout import KeyRanges, TokenLayout
from sepllm.pattern import SelfAdjust, Softmax
from sepllm.positions import Positions, alibi_slopes, apply_rotary, apply_rotary_once_more, rotary_table

logger = logging.get_logger(__name__)


class StoredTexts:
    """What tokens read that follow the ones in a SepCache: everything that it stores. Worked out once for layers that store the same."""

    def __init__(self, cache: TokenCache, config: SepLLMGPTNeoXConfig) -> None:
        self.cache, self.config = cache, config
        self.pattern = decode_pattern(config)
        self._ranges: dict[int, KeyRanges] = {}
        self._tables: dict[int, tuple[Tensor, Tensor] | None] = {}

    def ranges(self, layer: int) -> KeyRanges:
        stored = self.cache.pass_group(layer)
        if stored not in self._ranges:
            self._ranges[stored] = self.cache.pass_ranges(layer, sliding_width=self.pattern.sliding_width)
        return self._ranges[stored]

    def turned(self, q_BTNH: Tensor, k_BSNH: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Queries and keys at their slots, where positions are shifted and no longer those that they were rotated to."""
        stored = self.cache.pass_group(layer)
        if stored not in self._tables:
            self._tables[stored] = self.cache.pass_turns(layer, lambda turns: _rotary(self.config, turns, k_BSNH.dtype))
        table = self._tables[stored]
        if table is None:
            return q_BTNH, k_BSNH
        (cos, sin), first = table, k_BSNH.shape[1] - q_BTNH.shape[1]
        return apply_rotary_once_more(q_BTNH, cos[:, first:], sin[:, first:]), apply_rotary_once_more(k_BSNH, cos, sin)


class SepLLMGPTNeoXAttention(nn.Module):
    def __init__(self, config: SepLLMGPTNeoXConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_BTD: Tensor,
        layout: TokenLayout | StoredTexts,
        rotary: tuple[Tensor, Tensor] | None,
        bias: PositionBias | None,
        cache: Cache | None,
    ) -> Tensor:
        heads = self.config.num_attention_heads
        head_size = self.config.hidden_size // heads
        q_BTNH, k_BSNH, v_BSNH = self.query_key_value(hidden_BTD).unflatten(-1, (heads, 3, head_size)).unbind(-2)
        if rotary is not None:
            q_BTNH, k_BSNH = apply_rotary(q_BTNH, *rotary), apply_rotary(k_BSNH, *rotary)
        if cache is not None:
            k_BNSH, v_BNSH = cache.update(k_BSNH.transpose(1, 2), v_BSNH.transpose(1, 2), self.layer)
            k_BSNH, v_BSNH = k_BNSH.transpose(1, 2), v_BNSH.transpose(1, 2)
        if isinstance(layout, StoredTexts):
            q_BTNH, k_BSNH = layout.turned(q_BTNH, k_BSNH, self.layer)
        read_BTNH = attend(
            q_BTNH,
            k_BSNH,
            v_BSNH,
            layout.ranges(self.layer),
            scale=head_size**-0.5,
            core="dense" if self.config._attn_implementation == "eager" else "auto",
            softmax=layout.pattern.softmax,
            bias=bias,
            dropout=self.config.attention_dropout if self.training else 0.0,
        )
        return self.dense(read_BTNH.flatten(-2))


class SepLLMGPTNeoXMLP(nn.Module):
    def __init__(self, config: SepLLMGPTNeoXConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(hidden_BTD)))


class SepLLMGPTNeoXLayer(GradientCheckpointingLayer):
    def __init__(self, config: SepLLMGPTNeoXConfig, layer: int) -> None:
        super().__init__()
        self.use_parallel_residual = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.attention = SepLLMGPTNeoXAttention(config, layer)
        self.mlp = SepLLMGPTNeoXMLP(config)

    def forward(
        self,
        hidden_BTD: Tensor,
        layout: TokenLayout | StoredTexts,
        rotary: tuple[Tensor, Tensor] | None = None,
        bias: PositionBias | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        read_BTD = self.dropout(self.attention(self.input_layernorm(hidden_BTD), layout, rotary, bias, past_key_values))
        if self.use_parallel_residual:
            return self.dropout(self.mlp(self.post_attention_layernorm(hidden_BTD))) + read_BTD + hidden_BTD
        read_BTD = read_BTD + hidden_BTD
        return self.dropout(self.mlp(self.post_attention_layernorm(read_BTD))) + read_BTD


class SepLLMGPTNeoXPreTrainedModel(PreTrainedModel):
    config_class = SepLLMGPTNeoXConfig
    base_model_prefix = "sepllm_gpt_neox"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["SepLLMGPTNeoXLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _can_record_outputs = {"hidden_states": SepLLMGPTNeoXLayer}
    _keys_to_ignore_on_load_unexpected = [r"attention\.bias$", r"attention\.masked_bias$", r"rotary_emb\.inv_freq$"]

    @classmethod
    def from_pretrained(cls, *args: object, key_mapping: dict[str, str] | None = None, **kwargs: object) -> SepLLMGPTNeoXPreTrainedModel:
        """As in transformers; an output matrix called ``lm_head`` is taken for ``embed_out``."""
        return super().from_pretrained(*args, key_mapping=key_mapping or {r"^lm_head\.": "embed_out."}, **kwargs)

    def save_pretrained(self, *args: object, save_original_format: bool = False, **kwargs: object) -> None:
        """As in transformers, under this model's own tensor names whatever the names it was loaded from."""
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


class SepLLMGPTNeoXModel(SepLLMGPTNeoXPreTrainedModel):
    """The blocks, from token ids to hidden states."""

    def __init__(self, config: SepLLMGPTNeoXConfig) -> None:
        super().__init__(config)
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self._has_position_table = config.pos_emb == "learned" or config.USE_BiPE
        if self._has_position_table:
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(SepLLMGPTNeoXLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.num_forwards = 0
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_in

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_in = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        """Hidden states ``[B, T, D]`` of the new tokens.

        ``input_ids [B, T]``, or ``inputs_embeds [B, T, D]`` where no pattern needs the ids. ``attention_mask [B, P + T]``, 0 on
        padding, speaks of the ``P`` cached tokens too. ``position_ids [B, T]`` are counted from each row's first text token if absent; ALiBi
        and BiPE always count for themselves. ``past_key_values``: a DynamicCache, or a SepCache (rotary positions only).
        """
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions is set, but this model never forms the attention weights: leave it out.")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        if isinstance(past_key_values, TokenCache):
            return self._with_sep_cache(past_key_values, input_ids, attention_mask, position_ids)
        store = None if past_key_values is None else layout_layer(past_key_values)
        cached = store.layout if store is not None and store.get_seq_length() else None
        layout = self._layout(self._known_ids(input_ids, inputs_embeds), cached, attention_mask)
        self._report_ratios(layout)

        positions = self._positions(layout, position_ids)
        hidden_BTD = self.embed_in(input_ids) if inputs_embeds is None else inputs_embeds
        if self._has_position_table:
            positions.check_embedded(self.config.max_position_embeddings)
            hidden_BTD = hidden_BTD + self.position_embeddings(positions.embedded) * self.config.mup_rp_embedding_mult
        rotary, bias = self._rotary(positions.queries, hidden_BTD.dtype), self._bias(positions)
        hidden_BTD = self._through_layers(hidden_BTD, layout, rotary, bias, past_key_values)
        if store is not None:
            store.layout = layout
        return BaseModelOutputWithPast(last_hidden_state=hidden_BTD, past_key_values=past_key_values)

    def _through_layers(
        self,
        hidden_BTD: Tensor,
        layout: TokenLayout | StoredTexts,
        rotary: tuple[Tensor, Tensor] | None,
        bias: PositionBias | None,
        cache: Cache | None,
    ) -> Tensor:
        hidden_BTD = self.dropout(hidden_BTD)
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, layout=layout, rotary=rotary, bias=bias, past_key_values=cache)
        return self.final_layer_norm(hidden_BTD)

    def _with_sep_cache(
        self, cache: TokenCache, input_ids: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> BaseModelOutputWithPast:
        """A forward pass over a SepCache, which is told of the tokens. A text that begins is read under the prefill pattern."""
        assert isinstance(cache, Cache)
        cache.check_fits(len(self.layers), has_sliding_window=self.config.sliding_window_width is not None)
        texts = StoredTexts(cache, self.config)
        self._check_sep_cache(input_ids, texts.pattern.softmax)
        assert input_ids is not None
        layout = TokenLayout.from_ids(input_ids, prefill_pattern(self.config), attention_mask=attention_mask) if not cache.get_seq_length() else None
        mask = layout.is_text if layout is not None and layout.has_padding else attention_mask
        try:
            positions = cache.begin_pass(input_ids, attention_mask=mask)
            if positions is None:
                positions = cache.pass_places() if position_ids is None else position_ids.expand(input_ids.shape)
            hidden_BTD = self.embed_in(input_ids)
            rotary = self._rotary(positions, hidden_BTD.dtype)
            hidden_BTD = self._through_layers(hidden_BTD, texts if layout is None else layout, rotary, None, cache)
        finally:
            cache.end_pass()
        self._report_ratios(layout, cache)
        return BaseModelOutputWithPast(last_hidden_state=hidden_BTD, past_key_values=cache)

    def _check_sep_cache(self, input_ids: Tensor | None, softmax: Softmax) -> None:
        """ValueError, by name, for what a SepCache does not remember enough for."""
        wrong = [
            reason
            for is_so, reason in (
                (input_ids is None, "inputs_embeds do not say which tokens are separators"),
                (self.config.USE_BiPE, "bilevel positions (USE_BiPE) count the separators of the whole text"),
                (self.config.pos_emb != "rotary", f"only rotary positions can leave keys out, and pos_emb is {self.config.pos_emb}"),
                (
                    isinstance(softmax, SelfAdjust) and softmax.extremes == "causal",
                    "SA_Extremes: causal looks at the scores of all keys, those that were dropped too",
                ),
            )
            if is_so
        ]
        if wrong:
            raise ValueError(f"This sepllm_gpt_neox model cannot use the SepCache: {'; '.join(wrong)}. Use a DynamicCache.")

    def _layout(self, ids_BT: Tensor, cached: TokenLayout | None, attention_mask: Tensor | None) -> TokenLayout:
        """Layout whose queries are ``ids``, after the cached tokens if there are any."""
        num_cached = 0 if cached is None else cached.ids.shape[1]
        if attention_mask is not None and attention_mask.shape != (ids_BT.shape[0], num_cached + ids_BT.shape[1]):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but there are {ids_BT.shape[0]} rows of {num_cached} cached and "
                f"{ids_BT.shape[1]} new tokens: give one entry for each of them."
            )
        if cached is None:
            return TokenLayout.from_ids(ids_BT, prefill_pattern(self.config), attention_mask=attention_mask)
        pattern = decode_pattern(self.config)
        if attention_mask is None or pattern.reference_padding:
            return cached.extend(ids_BT, pattern=pattern)
        if not torch.equal(attention_mask[:, :num_cached].bool(), cached.is_text):
            raise ValueError("attention_mask changed on tokens that are cached already: continue with the mask they were read under, or start anew.")
        return cached.extend(ids_BT, pattern=pattern, attention_mask=attention_mask[:, num_cached:])

    def _known_ids(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The ids, or stand-ins for them where the pattern does not look at ids."""
        if input_ids is not None:
            return input_ids
        assert inputs_embeds is not None
        if prefill_pattern(self.config).looks_at_ids or self.config.USE_BiPE:
            raise ValueError(
                "inputs_embeds do not say which tokens are separators or padding: give input_ids, or use streamingLLM or full attention."
            )
        return torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)

    def _positions(self, layout: TokenLayout, position_ids: Tensor | None) -> Positions:
        if self.config.USE_BiPE:
            return Positions.of(layout, segment_end_ids=self.config.BiPE_seps)
        positions = Positions.of(layout)
        if position_ids is None or self.config.pos_emb == "alibi":
            return positions
        given_BT = position_ids.expand(positions.queries.shape)
        return replace(positions, embedded=given_BT, queries=given_BT)

    def _rotary(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        return _rotary(self.config, positions_BT, dtype) if self.config.pos_emb == "rotary" else None

    def _bias(self, positions: Positions) -> PositionBias | None:
        if self.config.pos_emb != "alibi":
            return None
        slopes = alibi_slopes(self.config.num_attention_heads).to(positions.keys.device)
        return PositionBias(slopes=slopes, query_positions=positions.queries, key_positions=positions.keys)

    def _report_ratios(self, layout: TokenLayout | None, cache: TokenCache | None = None) -> None:
        self.num_forwards += 1
        if not self.config.PRINT_KV_RATIO or self.num_forwards % self.config.print_ratio_intervals:
            return
        if cache is not None:
            logger.warning(f"Forward pass {self.num_forwards}: {cache.kv_ratio():.2%} of the keys are stored, over all steps.")
        if layout is not None:
            logger.warning(
                f"Forward pass {self.num_forwards}: {layout.attention_map_ratio():.2%} of the attention map is computed, "
                f"{layout.kv_ratio():.2%} of the keys are read by the last token."
            )


class SepLLMGPTNeoXForCausalLM(SepLLMGPTNeoXPreTrainedModel, GenerationMixin):
    """The blocks and the output matrix, from token ids to logits."""

    _tied_weights_keys = {"embed_out.weight": "sepllm_gpt_neox.embed_in.weight"}

    def __init__(self, config: SepLLMGPTNeoXConfig) -> None:
        super().__init__(config)
        self.sepllm_gpt_neox = SepLLMGPTNeoXModel(config)
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.embed_out

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.embed_out = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, T, V]`` of the new tokens, or of the last ``logits_to_keep`` of them.

        ``labels [B, T]``: mean cross-entropy of each next token, -100 where it does not count. The rest as in `SepLLMGPTNeoXModel`.
        """
        outputs = self.sepllm_gpt_neox(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.embed_out(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states)


def _rotary(config: SepLLMGPTNeoXConfig, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[B, T, R]`` of the positions."""
    rope = config.rope_parameters
    assert rope is not None
    rotary_dims = int(config.hidden_size // config.num_attention_heads * rope["partial_rotary_factor"])
    return rotary_table(positions_BT, rotary_dims=rotary_dims, base=rope["rope_theta"], dtype=dtype)

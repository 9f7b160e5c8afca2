"""Falcon's attention on the attention interface of transformers, which its own class does not use."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb


class InterfaceFalconAttention(FalconAttention):
    """The same weights and names; the function that the configuration names reads the keys. No ALiBi."""

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        q_BNTH, k_BKTH, v_BKTH = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
        assert position_embeddings is not None
        q_BNTH, k_BKTH = apply_rotary_pos_emb(q_BNTH, k_BKTH, *position_embeddings)
        if layer_past is not None:
            k_BKTH, v_BKTH = layer_past.update(k_BKTH, v_BKTH, self.layer_idx)
        attention = AttentionInterface()[self.config._attn_implementation]
        read_BTNH, _ = attention(self, q_BNTH, k_BKTH, v_BKTH, attention_mask, scaling=self.inv_norm_factor)
        return self.dense(read_BTNH.flatten(2)), None


def use_interface(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a Falcon model that now use the interface; none in other models. Undone by `use_own_attention`."""
    modules = [module for module in model.modules() if isinstance(module, FalconAttention)]
    for module in modules:
        if module.config.alibi:
            raise ValueError("This Falcon model uses ALiBi (config.alibi): only Falcon with rotary positions can be attached to.")
        if type(module) is not FalconAttention:
            raise ValueError(f"This Falcon model was loaded with {type(module).__name__}: load it with attn_implementation 'sdpa' or 'eager'.")
    for module in modules:
        module.__class__ = InterfaceFalconAttention
    return modules


def use_own_attention(modules: list[nn.Module]) -> None:
    """Undoes `use_interface`."""
    for module in modules:
        module.__class__ = FalconAttention

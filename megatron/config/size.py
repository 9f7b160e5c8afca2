"""How many parameters a model has, from its shape alone: exact, and without torch. Tested against the model itself."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.keys import GATED_ACTIVATIONS
from megatron.config.schema import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Parameters of the parts of a model; shared ones count once."""

    word_embeddings: int | None
    """None: the vocabulary is not known yet."""
    output_matrix: int | None
    """0 where it is tied to the word embeddings."""
    position_embeddings: int
    attention_per_layer: int
    mlp_per_layer: int
    norms_per_layer: int
    unique_layers: int
    final_norm: int

    @property
    def per_layer(self) -> int:
        return self.attention_per_layer + self.mlp_per_layer + self.norms_per_layer

    @property
    def non_embedding(self) -> int:
        """Blocks and the final norm: what scaling laws count."""
        return self.unique_layers * self.per_layer + self.final_norm

    @property
    def total(self) -> int | None:
        """None: the vocabulary is not known yet."""
        if self.word_embeddings is None or self.output_matrix is None:
            return None
        return self.non_embedding + self.position_embeddings + self.word_embeddings + self.output_matrix


def model_size(model: ModelConfig) -> ModelSize:
    """The number of parameters of each part of this model."""
    vocabulary = None if model.padded_vocab_size is None else model.padded_vocab_size * model.hidden_size
    has_position_table = model.pos_emb == "learned" or model.use_bipe
    relative_biases = model.rpe_num_buckets * model.num_attention_heads if model.pos_emb == "rpe" else 0
    return ModelSize(
        word_embeddings=vocabulary,
        output_matrix=vocabulary if model.no_weight_tying else 0,
        position_embeddings=relative_biases + (model.max_position_embeddings * model.hidden_size if has_position_table else 0),
        attention_per_layer=_attention(model),
        mlp_per_layer=_mlp(model),
        norms_per_layer=_norm(model) * (1 if model.gpt_j_residual and model.gpt_j_tied else 2),
        unique_layers=model.num_unique_layers or model.num_layers,
        final_norm=_norm(model),
    )


def _attention(model: ModelConfig) -> int:
    width, bias = model.hidden_size, int(model.use_bias_in_attn_linear)
    qkv_rows = width + 2 * model.num_kv_heads * (width // model.num_attention_heads)
    qk_norm = _norm(model) if model.use_qk_layernorm else 0
    return qkv_rows * (width + bias) + width * (width + bias) + qk_norm


def _mlp(model: ModelConfig) -> int:
    width, inner, bias = model.hidden_size, model.intermediate_size, int(model.use_bias_in_mlp)
    linear1_rows = inner * (2 if model.activation in GATED_ACTIVATIONS else 1)
    return linear1_rows * (width + bias) + width * (inner + bias)


def _norm(model: ModelConfig) -> int:
    return {"layernorm": 2 * model.hidden_size, "rmsnorm": model.hidden_size, "scalenorm": 1, "non_parametric_layernorm": 0}[model.norm]

"""The YAML keys of a transformers model: what a training run must say to be that model, and what of it a run cannot say."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import JsonValue
from transformers import PreTrainedConfig

from sepllm.hf import SepLLMGPTNeoXConfig
from tools.ckpts.hf_config import FROM_MODEL_TYPE

ACTIVATIONS: dict[str, tuple[str, bool]] = {
    "gelu": ("gelu", False),
    "gelu_pytorch_tanh": ("gelu", True),
    "gelu_new": ("gelu", True),
    "gelu_fast": ("gelu", True),
    "relu": ("relu", False),
    "silu": ("silu", False),
    "swish": ("swish", False),
    "mish": ("mish", False),
}
"""`hidden_act` -> `activation` and `bias_gelu_fusion`, which is gelu in its tanh form."""
_MODES = ("streamingLLM", "USE_SA_SOFTMAX", "USE_SA_SOFTMAX_NO_DENO", "USE_FIXED_SEP_INTERVALs")


@dataclass(frozen=True, slots=True, kw_only=True)
class NeoxKeys:
    """Three groups of keys, divided as in configs/: they combine with other files of these kinds."""

    architecture: str
    model: dict[str, JsonValue]
    """Shape and initialisation: a size."""
    attention: dict[str, JsonValue]
    """Positions, and which keys a query reads: a method."""
    dropout: dict[str, JsonValue]
    """Of a run."""


def neox_keys(config: PreTrainedConfig) -> NeoxKeys:
    """The keys under which a run computes what this model computes. ValueError with every reason where none do."""
    architecture = FROM_MODEL_TYPE.get(config.model_type)
    if architecture is None:
        raise ValueError(f"model_type is {config.model_type}, and this converts {', '.join(FROM_MODEL_TYPE)}.")
    if reasons := _obstacles(config, architecture):
        raise ValueError(f"This {config.model_type} model cannot be trained here:\n" + "\n".join(f"- {reason}" for reason in reasons))
    is_llama = architecture in ("llama", "mistral")
    model: dict[str, JsonValue] = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        **(_llama_blocks(config) if is_llama else _neox_blocks(config)),
        "no_weight_tying": not config.tie_word_embeddings,
        "rotary_emb_base": (config.rope_parameters or {}).get("rope_theta", 10000),
        "init_method": "normal",
        "output_layer_init_method": "normal",
        "init_method_std": config.initializer_range,
    }
    dropout: dict[str, JsonValue] = {"hidden_dropout": getattr(config, "hidden_dropout", 0.0), "attention_dropout": config.attention_dropout or 0.0}
    return NeoxKeys(architecture=architecture, model=model, attention=_attention(config, architecture), dropout=dropout)


def _obstacles(config: PreTrainedConfig, architecture: str) -> list[str]:
    """Every reason why no run computes this model."""
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    head_size = config.hidden_size // config.num_attention_heads
    is_llama = architecture in ("llama", "mistral")
    has_table = architecture == "sepllm_gpt_neox" and (config.pos_emb == "learned" or config.USE_BiPE)
    checks = [
        (rope_type != "default", f"rope_type is {rope_type}; training has default"),
        (getattr(config, "head_dim", None) not in (None, head_size), f"head_dim is not hidden_size / num_attention_heads ({head_size})"),
        (getattr(config, "quantization_config", None) is not None, "its weights are quantised: convert the model it was made from"),
        (is_llama and config.hidden_act not in ("silu", "swish"), f"hidden_act is {config.hidden_act}; training has swiglu, which is silu"),
        (not is_llama and config.hidden_act not in ACTIVATIONS, f"hidden_act is {config.hidden_act}; training has {', '.join(ACTIVATIONS)}"),
        (not is_llama and config.intermediate_size % 2 == 1, f"intermediate_size ({config.intermediate_size}) is odd"),
        (has_table and config.mup_rp_embedding_mult != 1, "mup_rp_embedding_mult is not 1; it belongs to muP, which is not offered"),
    ]
    return [reason for stands, reason in checks if stands]


def _neox_blocks(config: PreTrainedConfig) -> dict[str, JsonValue]:
    activation, is_tanh = ACTIVATIONS[config.hidden_act]
    return {
        "intermediate_size": config.intermediate_size,
        "norm": "layernorm",
        "layernorm_epsilon": config.layer_norm_eps,
        "activation": activation,
        "bias_gelu_fusion": is_tanh,
        "gpt_j_residual": config.use_parallel_residual,
        "use_bias_in_attn_linear": getattr(config, "attention_bias", True),
        "use_bias_in_mlp": True,
    }


def _llama_blocks(config: PreTrainedConfig) -> dict[str, JsonValue]:
    return {
        "num_kv_heads": config.num_key_value_heads,
        "intermediate_size": 3 * config.intermediate_size,  # GPT-NeoX gives a gated MLP a third of it
        "norm": "rmsnorm",
        "rms_norm_epsilon": config.rms_norm_eps,
        "activation": "swiglu",
        "gpt_j_residual": False,
        "use_bias_in_attn_linear": getattr(config, "attention_bias", False),
        "use_bias_in_mlp": getattr(config, "mlp_bias", False),
    }


def _attention(config: PreTrainedConfig, architecture: str) -> dict[str, JsonValue]:
    if architecture == "sepllm_gpt_neox":
        return _sepllm_attention(config)
    keys: dict[str, JsonValue] = {"pos_emb": "rotary", "rotary_pct": (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)}
    window = config.sliding_window if architecture == "mistral" else None
    # The last key of transformers' window is window - 1 back, that of a sliding width is width back.
    return keys | {"USE_ORIGINAL_FULL_ATTEN": True} | ({} if window is None else {"sliding_window_width": window - 1})


def _sepllm_attention(config: SepLLMGPTNeoXConfig) -> dict[str, JsonValue]:
    """The model's own fields, which are the training keys, without those that its mode does not read."""
    keys: dict[str, JsonValue] = {"pos_emb": config.pos_emb, "rotary_pct": config.rotary_pct}
    if config.sliding_window_width is not None:
        keys["sliding_window_width"] = config.sliding_window_width
    if config.USE_ORIGINAL_FULL_ATTEN:
        return keys | {"USE_ORIGINAL_FULL_ATTEN": True}
    keys |= {mode: True for mode in _MODES if getattr(config, mode)}
    if config.USE_FIXED_SEP_INTERVALs:
        keys["fixed_sep_intervals_list"] = [*(config.fixed_sep_intervals_list or ())]
    elif not config.streamingLLM:
        keys["separator_token_ids"] = [*(config.separator_token_ids or ())]
    keys |= {"init_tok_max_idx": config.init_tok_max_idx, "EXCLUDE_DIAGONAL": config.EXCLUDE_DIAGONAL}
    keys |= _windows(config, "USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS", "prefill_loc_win_size_list", "prefill_local_window_size")
    keys |= _windows(config, "USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS", "generate_win_loc_size_list", "generate_local_window_size")
    if config.BATCH_ADAPTIVE_INIT_POS:
        keys |= {"BATCH_ADAPTIVE_INIT_POS": True, "PADDING_ID": config.PADDING_ID}
    if config.reference_padding:
        keys["reference_padding"] = True
    if config.USE_BiPE:
        keys |= {"USE_BiPE": True, "BiPE_seps": [*(config.BiPE_seps or ())]}
    if config.USE_SA_SOFTMAX or config.USE_SA_SOFTMAX_NO_DENO:
        keys |= {name: getattr(config, name) for name in ("SA_Numerator_Bias", "SA_Denominator_Bias", "SA_Extremes")}
    return keys


def _windows(config: SepLLMGPTNeoXConfig, flag: str, listed: str, scalar: str) -> dict[str, JsonValue]:
    if getattr(config, flag):
        return {flag: True, listed: getattr(config, listed)}
    return {} if getattr(config, scalar) is None else {scalar: getattr(config, scalar)}

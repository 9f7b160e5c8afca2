"""Configurations of transformers models for a training run, and what of a run an architecture cannot express."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GPTNeoXConfig, LlamaConfig, MistralConfig, PreTrainedConfig

from megatron.config.schema import Config
from sepllm.hf import SepLLMGPTNeoXConfig
from sepllm.hf.configuration_sepllm_gpt_neox import POSITIONS
from sepllm.pattern import UNBOUNDED, AttentionPattern, SelfAdjust

ARCHITECTURES = ("sepllm_gpt_neox", "neox", "llama", "mistral")
FROM_MODEL_TYPE = {"sepllm_gpt_neox": "sepllm_gpt_neox", "gpt_neox": "neox", "llama": "llama", "mistral": "mistral"}
"""`model_type` of a config.json -> the converters' name."""
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "swish": "silu", "silu": "silu", "mish": "mish"}
"""Of the training run, and as transformers calls them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Ids that the configuration names; None where there is none."""

    bos: int | None
    eos: int | None
    pad: int | None


def hf_config(config: Config, *, architecture: str, vocab_rows: int, tokens: SpecialTokens) -> PreTrainedConfig:
    """The configuration under which transformers computes what the run trained. ValueError with every reason where it cannot."""
    if reasons := obstacles(config, architecture):
        raise ValueError(f"The model cannot be written as --architecture {architecture}:\n{_listed(reasons)}\n{_remedy(config)}")
    model = config.model
    shared: dict[str, object] = {
        "vocab_size": vocab_rows,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_position_embeddings,
        "tie_word_embeddings": not model.no_weight_tying,
        "initializer_range": model.init_method_std,
        "attention_dropout": model.attention_dropout,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
    }
    if architecture in ("llama", "mistral"):
        shared |= {"num_key_value_heads": model.num_kv_heads, "rms_norm_eps": model.norm_epsilon, "hidden_act": "silu"}
        shared |= {"rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_emb_base}}
        width = config.attention.prefill.sliding_width
        # The last key of a sliding width is width back, that of transformers' window is window - 1 back.
        if architecture == "mistral":
            return MistralConfig(sliding_window=None if width is None else width + 1, **shared)
        return LlamaConfig(attention_bias=model.use_bias_in_attn_linear, mlp_bias=model.use_bias_in_mlp, **shared)
    shared |= {
        "hidden_act": ACTIVATIONS[model.activation],
        "hidden_dropout": model.hidden_dropout,
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": model.gpt_j_residual,
    }
    if architecture == "neox":
        rope = {"rope_type": "default", "rope_theta": model.rotary_emb_base, "partial_rotary_factor": model.rotary_pct}
        return GPTNeoXConfig(rope_parameters=rope, attention_bias=model.use_bias_in_attn_linear, **shared)
    return _sepllm_config(config, shared)


def fitting_architecture(config: Config, began: PreTrainedConfig | None) -> str:
    """The first architecture that can express the run's model, beginning with that of the model it began from. ValueError if none can."""
    wanted = [] if began is None or began.model_type not in FROM_MODEL_TYPE else [FROM_MODEL_TYPE[began.model_type]]
    reasons = {architecture: obstacles(config, architecture) for architecture in (*wanted, *ARCHITECTURES)}
    for architecture, found in reasons.items():
        if not found:
            return architecture
    lines = [f"{architecture}: {'; '.join(found)}" for architecture, found in reasons.items()]
    raise ValueError(f"The model cannot be written as a transformers model:\n{_listed(lines)}\n{_remedy(config)}")


def _remedy(config: Config) -> str:
    fitting = [architecture for architecture in ARCHITECTURES if not obstacles(config, architecture)]
    if fitting:
        return f"It can be written as --architecture {fitting[0]}."
    return "No architecture of transformers expresses it: score it with eval.py and let it write with generate.py, which run the checkpoint itself."


def _listed(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def obstacles(config: Config, architecture: str) -> list[str]:
    """Every reason why the architecture cannot express the run's model."""
    model, pattern = config.model, config.attention.prefill
    is_full = all(p.is_full(model.seq_length + 1) for p in (_unlimited(pattern), _unlimited(config.attention.decode)))
    checks = [
        (model.use_mup, "use_mup: true has multipliers that transformers does not know"),
        (model.num_unique_layers is not None, "num_unique_layers shares parameters between layers, which transformers models do not"),
        (model.use_qk_layernorm, "use_qk_layernorm: true has norms that the architecture lacks"),
        (model.opt_pos_emb_offset != 0, f"opt_pos_emb_offset is {model.opt_pos_emb_offset}; transformers starts at 0"),
        (architecture != "sepllm_gpt_neox" and not is_full, f"its attention is {config.attention.mode}, not full"),
        (architecture != "sepllm_gpt_neox" and model.use_bipe, "USE_BiPE: it has one kind of positions"),
        (architecture != "sepllm_gpt_neox" and isinstance(pattern.softmax, SelfAdjust), "its softmax is self-adjusting"),
        (architecture in ("neox", "llama") and pattern.sliding_width is not None, "sliding_window_width: it has no sliding window"),
    ]
    checks += _llama_checks(config, architecture) if architecture in ("llama", "mistral") else _neox_checks(config, architecture)
    return [reason for stands, reason in checks if stands]


def _neox_checks(config: Config, architecture: str) -> list[tuple[bool, str]]:
    model = config.model
    positions = POSITIONS if architecture == "sepllm_gpt_neox" else ("rotary",)
    lacks_bias = not model.use_bias_in_mlp or (architecture == "sepllm_gpt_neox" and not model.use_bias_in_attn_linear)
    return [
        (model.norm != "layernorm", f"norm is {model.norm}; it has layernorm"),
        (model.activation not in ACTIVATIONS, f"activation is {model.activation}; it has {', '.join(ACTIVATIONS)}"),
        (model.pos_emb not in positions, f"pos_emb is {model.pos_emb}; it has {', '.join(positions)}"),
        (model.num_kv_heads != model.num_attention_heads, "num_kv_heads groups the heads; it has a key and value for each head"),
        (lacks_bias, "use_bias_in_attn_linear or use_bias_in_mlp is false; it has both biases"),
        (model.gpt_j_tied and model.gpt_j_residual, "gpt_j_tied: true has one norm a block; it has two"),
    ]


def _llama_checks(config: Config, architecture: str) -> list[tuple[bool, str]]:
    model = config.model
    has_bias = model.use_bias_in_attn_linear or model.use_bias_in_mlp
    return [
        (model.norm != "rmsnorm", f"norm is {model.norm}; it has rmsnorm"),
        (model.activation != "swiglu", f"activation is {model.activation}; it has swiglu"),
        (model.pos_emb != "rotary" or model.rotary_pct != 1, f"pos_emb is {model.pos_emb}, rotary_pct {model.rotary_pct}; it has rotary and 1"),
        (model.gpt_j_residual, "gpt_j_residual: true adds both branches at once; it adds them in turn"),
        (architecture == "mistral" and has_bias, "use_bias_in_attn_linear or use_bias_in_mlp is true; it has no biases"),
        (model.hidden_dropout != 0, f"hidden_dropout is {model.hidden_dropout}; it has none"),
    ]


def _unlimited(pattern: AttentionPattern) -> AttentionPattern:
    """The pattern without its sliding width, which has a check of its own."""
    return AttentionPattern(windows=pattern.windows)


def _sepllm_config(config: Config, shared: dict[str, object]) -> SepLLMGPTNeoXConfig:
    model, attention = config.model, config.attention
    prefill, softmax = attention.prefill, attention.prefill.softmax
    keys: dict[str, object] = {
        "pos_emb": model.pos_emb,
        "rotary_pct": model.rotary_pct,
        "rotary_emb_base": model.rotary_emb_base,
        "mup_rp_embedding_mult": model.mup_rp_embedding_mult,
        "model_parallel_size": config.parallel.model_parallel_size,
        "PRINT_KV_RATIO": attention.print_kv_ratio,
        "USE_ORIGINAL_FULL_ATTEN": attention.mode == "full",
        "streamingLLM": attention.mode == "streaming",
        "USE_FIXED_SEP_INTERVALs": attention.mode == "fixllm",
        "fixed_sep_intervals_list": None if prefill.intervals is None else list(prefill.intervals),
        "USE_BiPE": model.use_bipe,
        "sliding_window_width": prefill.sliding_width,
        "reference_padding": prefill.reference_padding,
        "BATCH_ADAPTIVE_INIT_POS": prefill.padding_id is not None,
        "PADDING_ID": prefill.padding_id or 0,
        "init_tok_max_idx": prefill.initial_tokens - 1,
        "separator_token_ids": sorted(prefill.separator_ids) or [-1],
    }
    if model.use_bipe:
        keys["BiPE_seps"] = list(model.bipe_separator_ids)
    if isinstance(softmax, SelfAdjust):
        keys |= {"USE_SA_SOFTMAX": softmax.kind == "normalised", "USE_SA_SOFTMAX_NO_DENO": softmax.kind == "raw"}
        keys |= {"SA_Numerator_Bias": softmax.numerator_bias, "SA_Denominator_Bias": softmax.denominator_bias, "SA_Extremes": softmax.extremes}
    if attention.mode != "full":
        prefill_names = ("prefill_local_window_size", "USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS", "prefill_loc_win_size_list")
        generate_names = ("generate_local_window_size", "USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS", "generate_win_loc_size_list")
        keys |= _windows(prefill.windows, *prefill_names) | _windows(attention.decode.windows, *generate_names)
    written = SepLLMGPTNeoXConfig(**shared, **keys)
    for name, meant, read in (("prefill", prefill, written.prefill_pattern()), ("decode", attention.decode, written.decode_pattern())):
        assert meant == read, f"the {name} pattern {meant} was written as {read}"
    return written


def _windows(windows: tuple[int, ...], scalar: str, flag: str, listed: str) -> dict[str, object]:
    """One window for all layers under its key, or the list under the other."""
    if len(set(windows)) == 1 and windows[0] < UNBOUNDED:
        return {scalar: windows[0], flag: False}
    return {flag: True, listed: list(windows)}

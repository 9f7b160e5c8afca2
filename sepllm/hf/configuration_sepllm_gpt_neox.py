"""Configuration of a SepLLM GPT-NeoX model for transformers, and the two attention patterns that it stands for.

Field names are those of published SepLLM folders, which are the keys of the training YAML. The functions that make patterns stand
beside the class, not in it: transformers loads a checkpoint's own configuration and model code as two separate sets of modules.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from sepllm.pattern import UNBOUNDED, AttentionPattern, SelfAdjust, Softmax, Standard

PYTHIA_SEPARATORS = (15, 13, 32, 2, 28, 27, 209, 186, 187)
"""``. , ? ! ; :`` space, tab and newline in the GPT-NeoX tokenizer."""

KERNEL_FLAGS = ("USE_SEP_ATTN_KERNEL_ACCELERATOR",)
"""Flags of the training code that choose how attention is computed, never what."""

POSITIONS = ("rotary", "learned", "alibi", "none")
"""Position embeddings that the model computes."""


@strict
class SepLLMGPTNeoXConfig(PreTrainedConfig):
    """A GPT-NeoX model whose queries read initial tokens, separators and their neighbours.

    Contradictory settings raise ValueError here.
    """

    model_type: ClassVar[str] = "sepllm_gpt_neox"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 50304
    """Rows of the embedding, padding rows included."""
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_layers: int | None = None
    """The training key for the same number; always equal to `num_hidden_layers`."""
    num_attention_heads: int = 12
    intermediate_size: int = 0
    """0: four times the hidden size."""
    hidden_act: str = "gelu"
    """`gelu_pytorch_tanh` for models trained with `bias_gelu_fusion: true`. Published folders lack it and mean `gelu`."""
    max_position_embeddings: int = 2048
    model_parallel_size: int = 1
    """Of the training run; changes nothing here."""
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = False
    tie_word_embeddings: bool = False
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None

    pos_emb: str = "rotary"
    """One of `POSITIONS`."""
    mup_rp_embedding_mult: float | int = 1.0
    """Factor of learned position embeddings."""
    rotary_pct: float | int | None = None
    """Fraction of each head's dimensions that is rotated; 1 if neither this nor `rope_parameters` says otherwise."""
    rotary_emb_base: float | int | None = None
    """10000 if neither this nor `rope_parameters` says otherwise."""
    rope_parameters: dict | None = None
    """The same two numbers as transformers 5 names them."""

    separator_token_ids: list[int] | None = None
    """None: the separators of the Pythia models. ``[-1]``: no separators."""
    PADDING_ID: int = 0
    """Used with `BATCH_ADAPTIVE_INIT_POS` only."""
    BATCH_ADAPTIVE_INIT_POS: bool = False
    """Without an attention mask, a leading run of `PADDING_ID` is padding."""
    reference_padding: bool = False
    """Read padding as the reference implementation does; see `AttentionPattern.reference_padding`."""
    init_tok_max_idx: int = 2
    """Index of the last initial token; -1 for none."""
    prefill_local_window_size: int = 256
    generate_local_window_size: int | None = None
    """None: generated tokens have the windows of the prompt."""
    USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS: bool = False
    USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS: bool = False
    prefill_loc_win_size_list: list[int] | None = None
    generate_win_loc_size_list: list[int] | None = None
    EXCLUDE_DIAGONAL: bool = True
    """False: windows of prompts are one key longer."""
    USE_ORIGINAL_FULL_ATTEN: bool = False
    streamingLLM: bool = False
    USE_FIXED_SEP_INTERVALs: bool = False
    """FixLLM: a grid instead of separators."""
    fixed_sep_intervals_list: list[int] | None = None
    """Grid interval of each layer."""
    USE_BiPE: bool = False
    """Bilevel positions: the place in a segment is embedded, the segment's number is rotated (or ALiBi's)."""
    BiPE_seps: list[int] | None = None
    """Ids that end a segment. None: the separators of the Pythia models."""
    USE_SA_SOFTMAX: bool = False
    USE_SA_SOFTMAX_NO_DENO: bool = False
    SA_Numerator_Bias: float | int = 0.0
    SA_Denominator_Bias: float | int = 1e-10
    SA_Extremes: Literal["read", "causal"] = "read"
    """Over which keys the minimum and the maximum of self-adjust softmax run."""
    sliding_window_width: int | None = None
    """Hard limit in every mode: no key further back than this is read."""
    PRINT_KV_RATIO: bool = False
    """Log which part of the attention map and of the keys is read."""
    print_ratio_intervals: int = 100
    """Forward passes between two such lines."""

    def __post_init__(self, **kwargs: object) -> None:
        _check_known_modes(kwargs)
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.num_layers = self.num_hidden_layers if self.num_layers is None else self.num_layers
        self.separator_token_ids = list(PYTHIA_SEPARATORS) if self.separator_token_ids is None else self.separator_token_ids
        self.BiPE_seps = list(PYTHIA_SEPARATORS) if self.BiPE_seps is None else self.BiPE_seps
        super().__post_init__(**kwargs)
        _check_shape(self)
        for pattern in (prefill_pattern, decode_pattern):
            pattern(self)  # raises what is wrong with the modes and windows

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """transformers' hook: `rope_parameters` and the two training keys are made to say the same."""
        rope = dict(kwargs.pop("rope_scaling", None) or self.rope_parameters or {})
        self.rotary_pct = _agreed(self.rotary_pct, rope.get("partial_rotary_factor"), "rotary_pct", "partial_rotary_factor", 1.0)
        self.rotary_emb_base = _agreed(self.rotary_emb_base, rope.get("rope_theta"), "rotary_emb_base", "rope_theta", 10000)
        self.rope_parameters = rope | {"partial_rotary_factor": self.rotary_pct, "rope_theta": self.rotary_emb_base}
        self.standardize_rope_params()
        return kwargs

    def to_dict(self) -> dict[str, Any]:
        """As transformers does, without a pointer to model code where this class does not save that code with it."""
        values = super().to_dict()
        if self._auto_class is None:
            values.pop("auto_map", None)
        return values

    def prefill_pattern(self) -> AttentionPattern:
        """What new texts read: in training, in scoring, in prompts."""
        return prefill_pattern(self)

    def decode_pattern(self) -> AttentionPattern:
        """What tokens read that follow cached ones."""
        return decode_pattern(self)


def prefill_pattern(config: SepLLMGPTNeoXConfig) -> AttentionPattern:
    """What new texts read: in training, in scoring, in prompts."""
    return _pattern(config, _prefill_windows(config)).widened(0 if config.EXCLUDE_DIAGONAL else 1)


def decode_pattern(config: SepLLMGPTNeoXConfig) -> AttentionPattern:
    """What tokens read that follow cached ones."""
    if config.USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS:
        return _pattern(config, _per_layer(config, "generate_win_loc_size_list"))
    if config.generate_local_window_size is None:
        return _pattern(config, _prefill_windows(config))
    return _pattern(config, (config.generate_local_window_size,) * config.num_hidden_layers)


def _pattern(config: SepLLMGPTNeoXConfig, windows: tuple[int, ...]) -> AttentionPattern:
    _check_modes(config)
    if config.USE_ORIGINAL_FULL_ATTEN:
        return replace(AttentionPattern.full(config.num_hidden_layers), sliding_width=config.sliding_window_width)
    has_separators = not (config.streamingLLM or config.USE_FIXED_SEP_INTERVALs)
    return AttentionPattern(
        initial_tokens=config.init_tok_max_idx + 1,
        separator_ids=frozenset(config.separator_token_ids or ()) - {-1} if has_separators else frozenset(),
        windows=windows,
        intervals=_per_layer(config, "fixed_sep_intervals_list") if config.USE_FIXED_SEP_INTERVALs else None,
        sliding_width=config.sliding_window_width,
        softmax=_softmax(config),
        padding_id=config.PADDING_ID if config.BATCH_ADAPTIVE_INIT_POS else None,
        reference_padding=config.reference_padding,
    )


def _prefill_windows(config: SepLLMGPTNeoXConfig) -> tuple[int, ...]:
    if config.USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS:
        return _per_layer(config, "prefill_loc_win_size_list")
    return (config.prefill_local_window_size,) * config.num_hidden_layers


def _per_layer(config: SepLLMGPTNeoXConfig, name: str) -> tuple[int, ...]:
    values = getattr(config, name) or ()
    if len(values) != config.num_hidden_layers:
        raise ValueError(f"{name} has {len(values)} entries but num_hidden_layers is {config.num_hidden_layers}: give one entry per layer.")
    return tuple(min(value, UNBOUNDED) for value in values)


def _softmax(config: SepLLMGPTNeoXConfig) -> Softmax:
    if not (config.USE_SA_SOFTMAX or config.USE_SA_SOFTMAX_NO_DENO):
        return Standard()
    return SelfAdjust(
        kind="normalised" if config.USE_SA_SOFTMAX else "raw",
        numerator_bias=config.SA_Numerator_Bias,
        denominator_bias=config.SA_Denominator_Bias,
        extremes=config.SA_Extremes,
    )


def _check_known_modes(others: dict[str, object]) -> None:
    """A folder of later code may ask for what this model does not compute."""
    unknown = [name for name, value in others.items() if name.startswith("USE_") and value is True and name not in KERNEL_FLAGS]
    if unknown:
        raise ValueError(f"{' and '.join(unknown)} is true and this model does not know that mode: load the folder with the code it came with.")


def _check_modes(config: SepLLMGPTNeoXConfig) -> None:
    exclusive = ("USE_ORIGINAL_FULL_ATTEN", "streamingLLM", "USE_FIXED_SEP_INTERVALs", "USE_SA_SOFTMAX", "USE_SA_SOFTMAX_NO_DENO")
    chosen = [name for name in exclusive if getattr(config, name)]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} are set: these modes exclude one another, leave one of them true.")
    if config.init_tok_max_idx < -1:
        raise ValueError(f"init_tok_max_idx is {config.init_tok_max_idx}: it is the index of the last initial token, or -1 for none.")
    if config.streamingLLM and config.init_tok_max_idx < 0:
        raise ValueError("streamingLLM reads initial tokens and a window, but init_tok_max_idx is -1: give it an index of at least 0.")
    if not chosen and not set(config.separator_token_ids or ()) - {-1}:
        raise ValueError(f"separator_token_ids is {config.separator_token_ids}: name the separators, or set streamingLLM for none.")


def _check_shape(config: SepLLMGPTNeoXConfig) -> None:
    if config.num_layers != config.num_hidden_layers:
        raise ValueError(f"num_layers ({config.num_layers}) must equal num_hidden_layers ({config.num_hidden_layers}): leave one of them out.")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(f"num_attention_heads ({config.num_attention_heads}) must divide hidden_size ({config.hidden_size}).")
    if config.pos_emb not in POSITIONS:
        raise ValueError(f"pos_emb {config.pos_emb!r} is not computed by this model: use one of {', '.join(POSITIONS)}.")
    if config.USE_BiPE:
        _check_bipe(config)
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"rope_type {kind!r} is not computed by this model: use default.")


def _check_bipe(config: SepLLMGPTNeoXConfig) -> None:
    if config.pos_emb not in ("rotary", "alibi"):
        raise ValueError(f"USE_BiPE is set and pos_emb is {config.pos_emb}: bilevel positions need pos_emb rotary or alibi.")
    if min(config.BiPE_seps or (-1,)) < 0:
        raise ValueError(f"USE_BiPE is set and BiPE_seps is {config.BiPE_seps}: list the ids that end a segment, each 0 or more.")
    for flag in ("USE_ORIGINAL_FULL_ATTEN", "streamingLLM"):
        if getattr(config, flag):
            raise ValueError(f"USE_BiPE and {flag} are both set, and SepLLM trains that without BiPE: set USE_BiPE to false.")


def _agreed(value: float | None, other: float | None, name: str, other_name: str, default: float) -> float:
    """The value that either of two names gives, or the default."""
    if value is not None and other is not None and value != other:
        raise ValueError(f"{name} is {value} but rope_parameters[{other_name!r}] is {other}: they mean the same number, leave one of them out.")
    return next(number for number in (value, other, default) if number is not None)

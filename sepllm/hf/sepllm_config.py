"""The YAML files with which the reference turns a model into SepLLM, StreamingLLM or FixLLM without training, as patterns for `attach`.

    separator_token_ids: [13, 11, 30]      Layer_num: 32
    init_tok_max_idx: 2                    prefill_local_window_size: 256

Keys are those of `SepLLMGPTNeoXConfig`, and mean the same.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import NamedTuple

import yaml

from sepllm.hf.configuration_sepllm_gpt_neox import SepLLMGPTNeoXConfig, decode_pattern, prefill_pattern
from sepllm.pattern import AttentionPattern

USED = (
    "Layer_num",
    "separator_token_ids",
    "PADDING_ID",
    "BATCH_ADAPTIVE_INIT_POS",
    "reference_padding",
    "init_tok_max_idx",
    "prefill_local_window_size",
    "generate_local_window_size",
    "USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS",
    "USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS",
    "prefill_loc_win_size_list",
    "generate_win_loc_size_list",
    "EXCLUDE_DIAGONAL",
    "USE_ORIGINAL_FULL_ATTEN",
    "streamingLLM",
    "USE_FIXED_SEP_INTERVALs",
    "fixed_sep_intervals_list",
)
CHANGES_NOTHING = (
    "prefill_k",
    "generate_k",
    "PRINT_KV_RATIO",
    "print_ratio_intervals",
    "USE_SEP_ATTN_KERNEL_ACCELERATOR",
    "RECOMPILE_SEP_ATTN_KERNEL",
    "_DEFAULT_SPARSE_BLOCK_SIZE",
    "BiPE_seps",
    "SA_Numerator_Bias",
    "SA_Denominator_Bias",
)
"""Ratios are asked of the attachment, its ``core`` chooses the kernel."""
WITHOUT_SEPARATORS = ("USE_ORIGINAL_FULL_ATTEN", "streamingLLM", "USE_FIXED_SEP_INTERVALs")
NEEDS_TRAINING = ("USE_BiPE", "USE_SA_SOFTMAX", "USE_SA_SOFTMAX_NO_DENO")


class Patterns(NamedTuple):
    """What a text reads that begins, and what tokens read that follow cached ones: the two patterns of `attach`."""

    prefill: AttentionPattern
    decode: AttentionPattern


def read_sepllm_config(path: str | Path, *, num_layers: int | None = None) -> Patterns:
    """The patterns of a YAML file. ``num_layers``: of the model; the file's ``Layer_num`` must agree with it, or be absent."""
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no mapping of keys to values: write one 'key: value' a line.")
    _check_keys(path, values)
    given = values.pop("Layer_num", num_layers)
    if given is None:
        raise ValueError(f"{path} has no Layer_num: add it, the number of layers of the model.")
    if num_layers is not None and given != num_layers:
        raise ValueError(f"Layer_num is {given} in {path}, but the model has {num_layers} layers: change Layer_num.")
    if values.get("separator_token_ids") is None and not any(values.get(name) for name in WITHOUT_SEPARATORS):
        raise ValueError(f"{path} has no separator_token_ids, and no token separates in every tokenizer: add the ids of this model's.")
    config = SepLLMGPTNeoXConfig(num_hidden_layers=given, **{name: value for name, value in values.items() if name in USED})
    return Patterns(prefill_pattern(config), decode_pattern(config))


def _check_keys(path: str | Path, values: dict[str, object]) -> None:
    trained = [name for name in NEEDS_TRAINING if values.get(name)]
    if trained:
        raise ValueError(f"{' and '.join(trained)} in {path}: only a model that was trained so computes that, set it to false.")
    known = (*USED, *CHANGES_NOTHING, *NEEDS_TRAINING)
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f"{name} in {path} is not known{f': did you mean {nearest[0]}?' if nearest else ', leave it out.'}")

"""SepLLM's keys as two patterns: what training and prompts read (`prefill`) and what generated tokens read (`decode`).

Each mode flag and window key is translated once, here; afterwards there is only the pattern.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from megatron.config.schema import AttentionConfig
from megatron.config.settings import Mistake, Settings, Unreadable
from sepllm.pattern import UNBOUNDED, AttentionPattern, SelfAdjust, Softmax, Standard

Mode = Literal["full", "streaming", "sepllm", "self_adjust", "fixllm"]

MODE_FLAGS: dict[str, Mode] = {
    "USE_ORIGINAL_FULL_ATTEN": "full",
    "streamingLLM": "streaming",
    "USE_SEP_ATTN_KERNEL_ACCELERATOR": "sepllm",
    "USE_SA_SOFTMAX": "self_adjust",
    "USE_SA_SOFTMAX_NO_DENO": "self_adjust",
    "USE_FIXED_SEP_INTERVALs": "fixllm",
}
"""At most one of these is true. The accelerator flag stands for plain SepLLM; which core computes it is `core`'s business."""

_ASKS_FOR_SEPLLM = (
    "separator_token_ids",
    "init_tok_max_idx",
    "prefill_local_window_size",
    "prefill_loc_win_size_list",
    "generate_local_window_size",
    "generate_win_loc_size_list",
)
_DEFAULT_WINDOW = 256
_DEFAULT_INIT_TOK_MAX_IDX = 2


def resolve_attention(settings: Settings) -> AttentionConfig:
    """Both patterns and the rest of the group. Reports what contradicts; raises Unreadable when no pattern can be made."""
    num_layers = settings.need("num_layers", int)
    mode = attention_mode(settings)
    prefill = _pattern(settings, mode=mode, num_layers=num_layers)
    if mode == "self_adjust":
        settings.notes.append(_softmax_note(prefill, settings.need("seq_length", int)))
    return AttentionConfig(
        prefill=prefill if settings.get_or("EXCLUDE_DIAGONAL", True) or mode == "full" else prefill.widened(1),
        decode=_decode(settings, prefill, mode=mode),
        core=settings.get_or("core", "auto"),
        mode=mode,
        print_kv_ratio=settings.get_or("PRINT_KV_RATIO", False),
        print_ratio_intervals=settings.get_or("print_ratio_intervals", 8000),
        reset_at_document_end=settings.get_or("reset_attention_mask", False),
    )


def attention_mode(settings: Settings) -> Mode:
    """The one mode that is on. A configuration without any of SepLLM's keys is GPT-NeoX's: full attention."""
    on = [flag for flag in MODE_FLAGS if settings.get_or(flag, False)]
    if len(on) > 1:
        raise _reported(settings, on, f"{' and '.join(on)} are both true and exclude one another: set all but one to false.")
    if on:
        return MODE_FLAGS[on[0]]
    return "sepllm" if any(settings.has(key) for key in _ASKS_FOR_SEPLLM) else "full"


def _pattern(settings: Settings, *, mode: Mode, num_layers: int) -> AttentionPattern:
    """The pattern of the prefill windows, before `EXCLUDE_DIAGONAL`."""
    full = AttentionPattern.full(num_layers)
    sliding_width = settings.get("sliding_window_width", int)
    if mode == "full":
        return replace(full, sliding_width=sliding_width)
    separators = _separators(settings, mode=mode)
    windows = _prefill_windows(settings, num_layers=num_layers)
    if windows is None:
        windows = full.windows if mode == "self_adjust" and not separators else (_DEFAULT_WINDOW,) * num_layers
    is_adaptive = settings.get_or("BATCH_ADAPTIVE_INIT_POS", False)
    return AttentionPattern(
        initial_tokens=settings.get_or("init_tok_max_idx", _DEFAULT_INIT_TOK_MAX_IDX) + 1,
        separator_ids=frozenset(separators),
        windows=windows,
        intervals=_intervals(settings, num_layers=num_layers) if mode == "fixllm" else None,
        sliding_width=sliding_width,
        softmax=_softmax(settings),
        padding_id=settings.get_or("PADDING_ID", 0) if is_adaptive else None,
        reference_padding=settings.get_or("reference_padding", False),
    )


def _softmax_note(pattern: AttentionPattern, length: int) -> str:
    """The self-adjust flags name a softmax; which keys it runs over, the separators and windows say."""
    if pattern.is_full(length):
        return "the self-adjust softmax runs over all causal keys: full attention."
    far = f"{pattern.initial_tokens} initial tokens and {len(pattern.separator_ids)} separator ids"
    return f"the self-adjust softmax runs over a sparse pattern: {far}, windows of {_short(pattern.windows)}."


def _separators(settings: Settings, *, mode: Mode) -> tuple[int, ...]:
    """The separator ids; ``[-1]`` is none. StreamingLLM and FixLLM have none whatever is listed."""
    ids = settings.wholes("separator_token_ids") or ()
    if mode in ("streaming", "fixllm") or ids == (-1,):
        ids = ()
    if any(token < 0 for token in ids):
        raise _reported(settings, ["separator_token_ids"], f"separator_token_ids holds {min(ids)}: ids are 0 or more, and [-1] alone means none.")
    if mode == "sepllm" and not ids:
        remedy = "list the ids of your tokenizer's separators, or set streamingLLM or USE_ORIGINAL_FULL_ATTEN to true"
        text = f"separator_token_ids is missing or empty, and SepLLM reads separators: {remedy}."
        raise _reported(settings, ["separator_token_ids", "USE_SEP_ATTN_KERNEL_ACCELERATOR"], text)
    return ids


def _prefill_windows(settings: Settings, *, num_layers: int) -> tuple[int, ...] | None:
    return _windows(
        settings,
        flag="USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS",
        list_key="prefill_loc_win_size_list",
        scalar_key="prefill_local_window_size",
        num_layers=num_layers,
    )


def _windows(settings: Settings, *, flag: str, list_key: str, scalar_key: str, num_layers: int) -> tuple[int, ...] | None:
    """One window per layer, or None where no key gives any."""
    if settings.get_or(flag, False):
        windows = settings.wholes(list_key)
        if windows is None:
            raise _reported(
                settings, [flag], f"{flag} is true and {list_key} is missing: give one window per layer ({num_layers}), or set it to false."
            )
        _check_per_layer(settings, list_key, windows, what="window", num_layers=num_layers)
        return windows
    if settings.has(list_key):
        settings.notes.append(f"{settings.place(list_key)}: {list_key} is not used, because {flag} is not true.")
    window = settings.get(scalar_key, int)
    return None if window is None else (window,) * num_layers


def _intervals(settings: Settings, *, num_layers: int) -> tuple[int, ...]:
    intervals = settings.wholes("fixed_sep_intervals_list")
    if intervals is None:
        text = f"USE_FIXED_SEP_INTERVALs is true and fixed_sep_intervals_list is missing: give one interval per layer ({num_layers})."
        raise _reported(settings, ["USE_FIXED_SEP_INTERVALs"], text)
    _check_per_layer(settings, "fixed_sep_intervals_list", intervals, what="interval", num_layers=num_layers)
    return intervals


def _check_per_layer(settings: Settings, key: str, values: tuple[int, ...], *, what: str, num_layers: int) -> None:
    if len(values) != num_layers:
        raise _reported(settings, [key, "num_layers"], f"{key} has {len(values)} {what}s but num_layers is {num_layers}: give one {what} per layer.")
    if min(values) < 1:
        raise _reported(settings, [key], f"{key} holds {min(values)}: every {what} is at least 1 token.")


def _softmax(settings: Settings) -> Softmax:
    is_normalised, is_raw = settings.get_or("USE_SA_SOFTMAX", False), settings.get_or("USE_SA_SOFTMAX_NO_DENO", False)
    if not (is_normalised or is_raw):
        return Standard()
    return SelfAdjust(
        kind="normalised" if is_normalised else "raw",
        numerator_bias=settings.get_or("SA_Numerator_Bias", 0.0),
        denominator_bias=settings.get_or("SA_Denominator_Bias", 1e-10),
        extremes="causal" if settings.get_or("SA_Extremes", "read") == "causal" else "read",
    )


def _decode(settings: Settings, prefill: AttentionPattern, *, mode: Mode) -> AttentionPattern:
    """The same pattern with the `generate_*` windows, where there are any."""
    if mode == "full":
        return prefill
    windows = _windows(
        settings,
        flag="USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS",
        list_key="generate_win_loc_size_list",
        scalar_key="generate_local_window_size",
        num_layers=prefill.num_layers,
    )
    if windows is None:
        if min(prefill.windows) != UNBOUNDED:
            settings.notes.append("generate_local_window_size is not given: generated tokens read the prefill windows (SepLLM's own default is 256).")
        return prefill
    if windows != prefill.windows:
        settings.notes.append(f"generated tokens read other windows ({_short(windows)}) than training and prompts ({_short(prefill.windows)}).")
    return replace(prefill, windows=windows)


def _short(windows: tuple[int, ...]) -> str:
    return str(windows[0]) if len(set(windows)) == 1 else str(list(windows))


def _reported(settings: Settings, keys: list[str], text: str) -> Unreadable:
    settings.report(Mistake(keys=tuple(keys), text=text))
    return Unreadable(keys[0])

"""SepLLM's keys as patterns."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron.config.loader import LoadedConfig
from megatron.config.pattern import MODE_FLAGS
from sepllm.pattern import UNBOUNDED, AttentionPattern, SelfAdjust

Resolve = Callable[..., LoadedConfig]
Mistakes = Callable[..., tuple[str, ...]]
SEPLLM: dict[str, object] = {"separator_token_ids": [5, 6], "prefill_local_window_size": 8, "generate_local_window_size": 8}
LAYERS = 4


def test_without_sepllm_keys_it_is_full_attention(resolve: Resolve) -> None:
    attention = resolve().config.attention
    assert attention.mode == "full"
    assert attention.prefill == attention.decode == AttentionPattern.full(LAYERS)


def test_sepllm_keeps_initial_tokens_separators_and_windows(resolve: Resolve) -> None:
    attention = resolve(SEPLLM).config.attention
    assert attention.mode == "sepllm"
    assert attention.prefill == attention.decode == AttentionPattern(initial_tokens=3, separator_ids=(5, 6), windows=(8,) * LAYERS)


@pytest.mark.parametrize("accelerator", [None, True, False])
def test_the_accelerator_flag_never_changes_the_pattern(accelerator: bool | None, resolve: Resolve) -> None:
    assert resolve({**SEPLLM, "USE_SEP_ATTN_KERNEL_ACCELERATOR": accelerator}).config.attention == resolve(SEPLLM).config.attention


@pytest.mark.parametrize("flag", [flag for flag in MODE_FLAGS if flag not in ("USE_SEP_ATTN_KERNEL_ACCELERATOR", "USE_FIXED_SEP_INTERVALs")])
def test_an_unset_accelerator_flag_conflicts_with_nothing_and_a_set_one_with_every_mode(flag: str, resolve: Resolve, mistakes: Mistakes) -> None:
    assert resolve({**SEPLLM, flag: True}).config.attention.mode == MODE_FLAGS[flag]
    (mistake,) = mistakes({**SEPLLM, flag: True, "USE_SEP_ATTN_KERNEL_ACCELERATOR": True})
    assert flag in mistake
    assert "USE_SEP_ATTN_KERNEL_ACCELERATOR" in mistake
    assert mistake.count("run.yml:") == 2


def test_keys_that_a_mode_does_not_use_do_no_harm(resolve: Resolve) -> None:
    keys = {**SEPLLM, "USE_ORIGINAL_FULL_ATTEN": True, "BATCH_ADAPTIVE_INIT_POS": True, "EXCLUDE_DIAGONAL": False}
    assert resolve(keys).config.attention.prefill == AttentionPattern.full(LAYERS)


def test_streaming_has_no_separators(resolve: Resolve) -> None:
    attention = resolve({**SEPLLM, "streamingLLM": True, "init_tok_max_idx": 0}).config.attention
    assert attention.prefill == AttentionPattern(initial_tokens=1, windows=(8,) * LAYERS)


def test_excluding_no_diagonal_widens_the_prefill_windows_by_one(resolve: Resolve) -> None:
    attention = resolve({**SEPLLM, "EXCLUDE_DIAGONAL": False}).config.attention
    assert (attention.prefill.windows, attention.decode.windows) == ((9,) * LAYERS, (8,) * LAYERS)


def test_generate_windows_are_the_decode_patterns_and_a_difference_is_noted(resolve: Resolve) -> None:
    loaded = resolve({**SEPLLM, "generate_local_window_size": 16})
    assert loaded.config.attention.decode.windows == (16,) * LAYERS
    assert loaded.config.attention.prefill.windows == (8,) * LAYERS
    assert any("other windows (16)" in note for note in loaded.notes)


def test_without_generate_windows_decoding_follows_prefill_and_says_so(resolve: Resolve) -> None:
    loaded = resolve({**SEPLLM, "generate_local_window_size": None})
    assert loaded.config.attention.decode == loaded.config.attention.prefill
    assert any("generate_local_window_size is not given" in note for note in loaded.notes)


def test_windows_per_layer(resolve: Resolve) -> None:
    keys = {**SEPLLM, "USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS": True, "prefill_loc_win_size_list": [128, 8, 8, 128]}
    attention = resolve(keys).config.attention
    assert (attention.prefill.windows, attention.decode.windows) == ((128, 8, 8, 128), (8,) * LAYERS)


def test_a_list_that_its_flag_does_not_turn_on_is_noted(resolve: Resolve) -> None:
    loaded = resolve({**SEPLLM, "prefill_loc_win_size_list": [1, 2]})
    assert loaded.config.attention.prefill.windows == (8,) * LAYERS
    assert any("prefill_loc_win_size_list is not used" in note for note in loaded.notes)


def test_the_default_window_is_256(resolve: Resolve) -> None:
    assert resolve({"separator_token_ids": [5]}).config.attention.prefill.windows == (256,) * LAYERS


def test_adaptive_initial_tokens_take_the_padding_id(resolve: Resolve) -> None:
    loaded = resolve({**SEPLLM, "BATCH_ADAPTIVE_INIT_POS": True, "PADDING_ID": 7})
    assert loaded.config.attention.prefill.padding_id == loaded.config.attention.decode.padding_id == 7
    assert any("BATCH_ADAPTIVE_INIT_POS" in note for note in loaded.notes)
    assert resolve({**SEPLLM, "PADDING_ID": 7}).config.attention.prefill.padding_id is None


def test_sliding_width_limits_every_mode(resolve: Resolve) -> None:
    assert resolve({"sliding_window_width": 16}).config.attention.prefill.sliding_width == 16
    assert resolve({**SEPLLM, "sliding_window_width": 16}).config.attention.decode.sliding_width == 16


def test_self_adjust_without_separators_and_windows_is_full_causal_attention(resolve: Resolve) -> None:
    pattern = resolve({"USE_SA_SOFTMAX": True, "SA_Numerator_Bias": "1e-10", "SA_Denominator_Bias": 1.0e-7}).config.attention.prefill
    assert pattern.windows == (UNBOUNDED,) * LAYERS
    assert pattern.softmax == SelfAdjust(kind="normalised", numerator_bias=1e-10, denominator_bias=1e-7)


def test_self_adjust_with_separators_reads_their_pattern(resolve: Resolve) -> None:
    pattern = resolve({**SEPLLM, "USE_SA_SOFTMAX_NO_DENO": True}).config.attention.prefill
    assert (pattern.separator_ids, pattern.windows, pattern.softmax) == (frozenset({5, 6}), (8,) * LAYERS, SelfAdjust(kind="raw"))
    released = resolve({"USE_SA_SOFTMAX": True, "separator_token_ids": [-1], "prefill_local_window_size": 128}).config.attention.prefill
    assert released.is_full(128)


@pytest.mark.parametrize(
    ("keys", "note"),
    [
        ({"USE_SA_SOFTMAX": True}, "runs over all causal keys: full attention"),
        (
            {"USE_SA_SOFTMAX_NO_DENO": True, "separator_token_ids": [-1], "prefill_local_window_size": 128},
            "runs over all causal keys: full attention",
        ),
        ({**SEPLLM, "USE_SA_SOFTMAX": True}, "runs over a sparse pattern: 3 initial tokens and 2 separator ids, windows of 8"),
        ({"USE_SA_SOFTMAX": True, "prefill_local_window_size": 8}, "runs over a sparse pattern: 3 initial tokens and 0 separator ids, windows of 8"),
    ],
    ids=str,
)
def test_what_self_adjust_runs_over_is_said(keys: dict[str, object], note: str, resolve: Resolve) -> None:
    (said,) = [said for said in resolve(keys).notes if "self-adjust" in said]
    assert note in said


def test_the_extremes_of_self_adjust_are_those_of_the_keys_read_unless_asked_otherwise(resolve: Resolve) -> None:
    for given, expected in ((None, "read"), ("read", "read"), ("causal", "causal")):
        assert resolve({"USE_SA_SOFTMAX": True, "SA_Extremes": given}).config.attention.prefill.softmax == SelfAdjust(
            kind="normalised", extremes=expected
        )


def test_fixllm_reads_a_grid_instead_of_separators(resolve: Resolve) -> None:
    keys = {**SEPLLM, "USE_FIXED_SEP_INTERVALs": True, "fixed_sep_intervals_list": [5] * LAYERS}
    attention = resolve(keys).config.attention
    assert attention.mode == "fixllm"
    assert attention.prefill == AttentionPattern(initial_tokens=3, windows=(8,) * LAYERS, intervals=(5,) * LAYERS)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"separator_token_ids": [-1]}, "separator_token_ids is missing or empty"),
        ({"separator_token_ids": []}, "separator_token_ids is missing or empty"),
        ({"prefill_local_window_size": 8}, "separator_token_ids is missing or empty"),
        ({"USE_SEP_ATTN_KERNEL_ACCELERATOR": True}, "separator_token_ids is missing or empty"),
        ({**SEPLLM, "separator_token_ids": [5, -1]}, "separator_token_ids holds -1"),
        ({**SEPLLM, "separator_token_ids": 5}, "give a list of whole numbers"),
        ({**SEPLLM, "prefill_local_window_size": 0}, "at least 1"),
        ({**SEPLLM, "init_tok_max_idx": -2}, "at least -1"),
        (
            {**SEPLLM, "USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS": True, "prefill_loc_win_size_list": [8, 8, 8]},
            "prefill_loc_win_size_list has 3 windows but num_layers is 4: give one window per layer",
        ),
        (
            {**SEPLLM, "USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS": True, "generate_win_loc_size_list": [8, 8, 8, 0]},
            "generate_win_loc_size_list holds 0: every window is at least 1",
        ),
        ({**SEPLLM, "USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS": True}, "prefill_loc_win_size_list is missing"),
        ({"USE_FIXED_SEP_INTERVALs": True}, "fixed_sep_intervals_list is missing"),
        ({"USE_FIXED_SEP_INTERVALs": True, "fixed_sep_intervals_list": [5]}, "has 1 intervals but num_layers is 4"),
        ({"streamingLLM": True, "USE_ORIGINAL_FULL_ATTEN": True}, "exclude one another"),
        ({**SEPLLM, "core": "fast"}, "one of auto, dense"),
    ],
)
def test_windows_separators_and_modes_that_cannot_be_are_refused(keys: dict[str, object], words: str, mistakes: Mistakes) -> None:
    assert words in "\n".join(mistakes(keys))

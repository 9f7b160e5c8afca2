"""Field names, defaults, and the two patterns of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig

from sepllm.hf import SepLLMGPTNeoXConfig
from sepllm.pattern import UNBOUNDED, AttentionPattern, SelfAdjust
from tests.sepllm.hf.published import PUBLISHED

Make = Callable[..., SepLLMGPTNeoXConfig]


def test_a_published_folder_keeps_every_field_through_a_round_trip(tmp_path: Path) -> None:
    SepLLMGPTNeoXConfig(**PUBLISHED).save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, SepLLMGPTNeoXConfig)
    values = again.to_dict()
    assert {name: values[name] for name in PUBLISHED} == PUBLISHED
    assert again.hidden_act == "gelu"
    assert again.rope_parameters == {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.25}
    pattern = AttentionPattern(initial_tokens=3, separator_ids=frozenset(PUBLISHED["separator_token_ids"]), windows=(64,) * 12)
    assert again.prefill_pattern() == again.decode_pattern() == pattern


def test_the_names_of_transformers_give_the_same_rotary_numbers() -> None:
    config = SepLLMGPTNeoXConfig(rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5})
    assert (config.rotary_pct, config.rotary_emb_base) == (0.5, 500.0)
    assert SepLLMGPTNeoXConfig().rope_parameters == {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 1.0}
    with pytest.raises(ValueError, match=r"rotary_pct is 0\.25 but"):
        SepLLMGPTNeoXConfig(rotary_pct=0.25, rope_parameters={"partial_rotary_factor": 0.5})


def test_generated_tokens_have_the_windows_of_the_prompt_unless_given_others(tiny_config: Make) -> None:
    assert tiny_config(prefill_local_window_size=7).decode_pattern().windows == (7, 7, 7)
    assert tiny_config(prefill_local_window_size=7, generate_local_window_size=2).decode_pattern().windows == (2, 2, 2)
    lists = {"USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS": True, "prefill_loc_win_size_list": [1, 2, 3]}
    assert tiny_config(**lists).decode_pattern().windows == (1, 2, 3)
    both = lists | {"USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS": True, "generate_win_loc_size_list": [4, 5, 6]}
    assert tiny_config(**both).prefill_pattern().windows == (1, 2, 3)
    assert tiny_config(**both).decode_pattern().windows == (4, 5, 6)


def test_exclude_diagonal_false_widens_prompts_only(tiny_config: Make) -> None:
    config = tiny_config(EXCLUDE_DIAGONAL=False)
    assert (config.prefill_pattern().windows, config.decode_pattern().windows) == ((4, 4, 4), (3, 3, 3))


def test_modes_are_patterns(tiny_config: Make) -> None:
    assert tiny_config(USE_ORIGINAL_FULL_ATTEN=True).prefill_pattern() == AttentionPattern.full(3)
    streaming = tiny_config(streamingLLM=True).prefill_pattern()
    assert (streaming.separator_ids, streaming.initial_tokens, streaming.windows) == (frozenset(), 2, (3, 3, 3))
    assert tiny_config(init_tok_max_idx=-1).prefill_pattern().initial_tokens == 0
    grid = tiny_config(USE_FIXED_SEP_INTERVALs=True, fixed_sep_intervals_list=[5, 6, 7]).prefill_pattern()
    assert (grid.intervals, grid.separator_ids) == ((5, 6, 7), frozenset())
    unbounded = tiny_config(USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS=True, prefill_loc_win_size_list=[2**40, 1, 1])
    assert unbounded.prefill_pattern().windows == (UNBOUNDED, 1, 1)
    adjust = tiny_config(USE_SA_SOFTMAX=True, SA_Numerator_Bias=0.5, separator_token_ids=[-1]).prefill_pattern()
    assert adjust.softmax == SelfAdjust(kind="normalised", numerator_bias=0.5)
    assert not adjust.separator_ids


def test_padding_ids_count_only_where_asked(tiny_config: Make) -> None:
    assert tiny_config(PADDING_ID=7).prefill_pattern().padding_id is None
    assert tiny_config(PADDING_ID=7, BATCH_ADAPTIVE_INIT_POS=True).prefill_pattern().padding_id == 7
    assert tiny_config(reference_padding=True).decode_pattern().reference_padding


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"USE_ORIGINAL_FULL_ATTEN": True, "streamingLLM": True}, "USE_ORIGINAL_FULL_ATTEN and streamingLLM are set"),
        ({"USE_SA_SOFTMAX": True, "USE_SA_SOFTMAX_NO_DENO": True}, "USE_SA_SOFTMAX and USE_SA_SOFTMAX_NO_DENO are set"),
        ({"separator_token_ids": [-1]}, "name the separators, or set streamingLLM"),
        ({"streamingLLM": True, "init_tok_max_idx": -1}, "init_tok_max_idx is -1"),
        ({"init_tok_max_idx": -2}, "init_tok_max_idx is -2"),
        ({"USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS": True, "prefill_loc_win_size_list": [1, 2]}, "has 2 entries but num_hidden_layers is 3"),
        ({"USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS": True}, "generate_win_loc_size_list has 0 entries"),
        ({"prefill_local_window_size": 0}, "at least 1"),
        ({"num_layers": 4}, "num_layers \\(4\\) must equal num_hidden_layers \\(3\\)"),
        ({"num_attention_heads": 5}, "must divide hidden_size"),
        ({"pos_emb": "rpe"}, "pos_emb 'rpe'"),
        ({"USE_BiPE": True, "pos_emb": "learned"}, "bilevel positions need pos_emb rotary or alibi"),
        ({"USE_BiPE": True, "BiPE_seps": [-1]}, "list the ids that end a segment"),
        ({"USE_BiPE": True, "USE_ORIGINAL_FULL_ATTEN": True}, "USE_BiPE and USE_ORIGINAL_FULL_ATTEN are both set"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_contradictions_are_errors_with_a_remedy(tiny_config: Make, changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tiny_config(**changes)

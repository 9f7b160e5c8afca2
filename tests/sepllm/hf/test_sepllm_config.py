"""The reference's training-free YAML files as patterns."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sepllm.hf import read_sepllm_config
from sepllm.pattern import AttentionPattern

LLAMA_3 = [128000, 13, 11, 30, 0, 26, 25, 198, 220]
COMMON = {
    "Layer_num": 4,
    "PADDING_ID": 128009,
    "init_tok_max_idx": 2,
    "BATCH_ADAPTIVE_INIT_POS": True,
    "PRINT_KV_RATIO": True,
    "print_ratio_intervals": 10,
    "prefill_local_window_size": 256,
    "generate_local_window_size": 256,
    "separator_token_ids": LLAMA_3,
}
LISTS = {
    "USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS": True,
    "USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS": True,
    "prefill_loc_win_size_list": [8192, 256, 256, 8192],
    "generate_win_loc_size_list": [8192, 128, 128, 8192],
}
SEPLLM = AttentionPattern(initial_tokens=3, separator_ids=LLAMA_3, windows=(256,) * 4, padding_id=128009)


def write(folder: Path, **changes: object) -> Path:
    path = folder / "sepllm.yml"
    path.write_text(yaml.safe_dump(COMMON | changes), encoding="utf-8")
    return path


def test_each_published_kind_of_file_is_its_pattern(tmp_path: Path) -> None:
    assert read_sepllm_config(write(tmp_path), num_layers=4) == (SEPLLM, SEPLLM)
    prefill, decode = read_sepllm_config(write(tmp_path, **LISTS))
    assert (prefill.windows, decode.windows) == ((8192, 256, 256, 8192), (8192, 128, 128, 8192))
    streaming = read_sepllm_config(write(tmp_path, streamingLLM=True, separator_token_ids=[-1], prefill_local_window_size=380))
    assert (streaming.prefill.separator_ids, streaming.prefill.windows, streaming.prefill.initial_tokens) == (frozenset(), (380,) * 4, 3)
    grid = read_sepllm_config(write(tmp_path, USE_FIXED_SEP_INTERVALs=True, fixed_sep_intervals_list=[5] * 4)).prefill
    assert (grid.intervals, grid.separator_ids) == ((5,) * 4, frozenset())
    assert read_sepllm_config(write(tmp_path, USE_ORIGINAL_FULL_ATTEN=True)).prefill.is_full(10**6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"separator_token_ids": None}, "has no separator_token_ids"),
        ({"Layer_num": 5}, "Layer_num is 5 in .*, but the model has 4 layers"),
        ({"prefil_local_window_size": 5}, "did you mean prefill_local_window_size"),
        ({"USE_BiPE": True}, "USE_BiPE in .*: only a model that was trained so"),
        (LISTS | {"prefill_loc_win_size_list": [8192]}, "prefill_loc_win_size_list has 1 entries"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_sepllm_config(write(tmp_path, **changes), num_layers=4)

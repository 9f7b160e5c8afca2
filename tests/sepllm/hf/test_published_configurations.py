"""The config.json files of published SepLLM folders: all fields that SepLLM's converter writes, as transformers 4 saved them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sepllm.hf import SepLLMGPTNeoXConfig, SepLLMGPTNeoXForCausalLM
from sepllm.pattern import AttentionPattern, SelfAdjust
from tests.sepllm.hf.published import PUBLISHED

SEPARATORS = [15, 13, 32, 2, 28, 27, 209, 186, 187]
CONVERTER = {
    "architectures": ["SepLLMGPTNeoXForCausalLM"],
    "model_type": "sepllm_gpt_neox",
    "torch_dtype": "float16",
    "transformers_version": "4.38.0",
    **PUBLISHED,
}
"""What every folder of the 160m size shares."""


def layered(windows: list[int]) -> dict[str, object]:
    flags = ("USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS", "USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS")
    return dict.fromkeys(flags, True) | {"prefill_loc_win_size_list": windows, "generate_win_loc_size_list": windows}


def sparse(*windows: int, separators: tuple[int, ...] = tuple(SEPARATORS), **changes: object) -> AttentionPattern:
    return AttentionPattern(initial_tokens=3, separator_ids=separators, windows=windows if len(windows) > 1 else windows * 12, **changes)


H, HT = [2048, *[64] * 11], [2048, *[64] * 10, 2048]
SA = {
    "USE_SA_SOFTMAX": True,
    "separator_token_ids": [-1],
    "prefill_local_window_size": 2048,
    "generate_local_window_size": 2048,
    "SA_Numerator_Bias": 1e-10,
    "SA_Denominator_Bias": 1e-7,
}
FORMS: dict[str, tuple[dict[str, object], AttentionPattern]] = {
    "n64": ({}, sparse(64)),
    "n128": ({"prefill_local_window_size": 128, "generate_local_window_size": 128}, sparse(128)),
    "n64H": (layered(H), sparse(*H)),
    "n64HT": (layered(HT), sparse(*HT)),
    "StreamingLLM": ({"streamingLLM": True}, sparse(64, separators=())),
    "full attention": ({"USE_ORIGINAL_FULL_ATTEN": True}, AttentionPattern.full(12)),
    "SA": (SA, sparse(2048, separators=(), softmax=SelfAdjust(kind="normalised", numerator_bias=1e-10, denominator_bias=1e-7))),
    "RoBiPE": ({"USE_BiPE": True} | layered(HT), sparse(*HT)),
}
TINY = {
    "vocab_size": 300,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 96,
}


def write(folder: Path, changes: dict[str, object], *, without: tuple[str, ...] = ()) -> Path:
    fields = {name: value for name, value in (CONVERTER | changes).items() if name not in without}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(("changes", "pattern"), list(FORMS.values()), ids=list(FORMS))
def test_the_published_forms_load_as_their_patterns(tmp_path: Path, changes: dict[str, object], pattern: AttentionPattern) -> None:
    config = AutoConfig.from_pretrained(write(tmp_path, changes))
    assert isinstance(config, SepLLMGPTNeoXConfig)
    assert config.prefill_pattern() == config.decode_pattern() == pattern
    assert (config.hidden_act, config.dtype, config.rope_parameters["partial_rotary_factor"]) == ("gelu", torch.float16, 0.25)
    values = config.to_dict()
    kept = {name: value for name, value in (CONVERTER | changes).items() if name in values and name not in ("architectures", "transformers_version")}
    assert {name: values[name] for name in kept} == kept


@pytest.mark.parametrize(("changes", "pattern"), list(FORMS.values()), ids=list(FORMS))
def test_a_model_of_each_form_reads_and_writes_text(tmp_path: Path, changes: dict[str, object], pattern: AttentionPattern) -> None:
    SepLLMGPTNeoXForCausalLM(SepLLMGPTNeoXConfig(**CONVERTER | TINY | changes)).save_pretrained(tmp_path)
    write(tmp_path, TINY | changes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(model) is SepLLMGPTNeoXForCausalLM
    ids = torch.arange(80).view(1, 80)
    assert model(ids).logits.isfinite().all()
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 83)


OPTIONAL = ("num_layers", "model_parallel_size", "rotary_emb_base", "mup_rp_embedding_mult", "BiPE_seps", "print_ratio_intervals")


def test_fields_that_a_folder_lacks_have_the_converters_values(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write(tmp_path, {}, without=OPTIONAL))
    values = config.to_dict()
    assert {name: values[name] for name in OPTIONAL} == {name: CONVERTER[name] for name in OPTIONAL}


@pytest.mark.parametrize(
    "changes", [{"USE_SEP_ATTN_KERNEL_ACCELERATOR": True, "RECOMPILE_SEP_ATTN_KERNEL": False}, {"USE_LATER_MODE": False}], ids=["kernel", "off"]
)
def test_flags_that_change_nothing_are_taken(tmp_path: Path, changes: dict[str, object]) -> None:
    assert AutoConfig.from_pretrained(write(tmp_path, changes)).prefill_pattern() == sparse(64)


def test_a_mode_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="USE_LATER_MODE is true and this model does not know that mode"):
        AutoConfig.from_pretrained(write(tmp_path, {"USE_LATER_MODE": True}))
    with pytest.raises(ValueError, match="USE_ORIGINAL_FULL_ATTEN and streamingLLM are set"):
        AutoConfig.from_pretrained(write(tmp_path, {"USE_ORIGINAL_FULL_ATTEN": True, "streamingLLM": True}))

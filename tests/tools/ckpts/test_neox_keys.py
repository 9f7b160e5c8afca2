"""The config.json forms that transformers 4 wrote, which most published folders still have, become YAML keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.ckpts.hf_folder import read_config
from tools.ckpts.neox_keys import neox_keys

PYTHIA_160M = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "vocab_size": 49152,
}


def folder(path: Path, fields: dict[str, object]) -> Path:
    (path / "config.json").write_text(json.dumps(fields))
    return path


def test_pythias_configuration_becomes_a_size_and_a_method(tmp_path: Path) -> None:
    keys = neox_keys(read_config(folder(tmp_path, PYTHIA_160M)))
    assert (keys.architecture, keys.attention) == ("neox", {"pos_emb": "rotary", "rotary_pct": 0.25, "USE_ORIGINAL_FULL_ATTEN": True})
    expected = {"hidden_size": 768, "intermediate_size": 3072, "gpt_j_residual": True, "bias_gelu_fusion": False, "rotary_emb_base": 10000}
    assert {name: keys.model[name] for name in expected} == expected


def test_llamas_configuration_has_its_own_rotary_base_and_grouped_heads(tmp_path: Path) -> None:
    keys = neox_keys(read_config(folder(tmp_path, LLAMA)))
    expected = {"num_kv_heads": 3, "intermediate_size": 3 * 1536, "norm": "rmsnorm", "rotary_emb_base": 100000, "no_weight_tying": False}
    assert {name: keys.model[name] for name in expected} == expected
    assert keys.attention["rotary_pct"] == 1.0


def test_stretched_positions_of_the_old_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rope_type is linear; training has default"):
        neox_keys(read_config(folder(tmp_path, LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}})))

"""Parameter counts without torch: Pythia's published ones, and the model itself for every option."""

from __future__ import annotations

import pytest

from megatron.config.schema import ModelConfig
from megatron.config.size import model_size

PYTHIA = {
    "14m": (6, 128, 4, 50304, 14_067_712, 1_189_888),
    "31m": (6, 256, 8, 50304, 30_494_720, 4_739_072),
    "70m": (6, 512, 8, 50304, 70_426_624, 18_915_328),
    "160m": (12, 768, 12, 50304, 162_322_944, 85_056_000),
    "410m": (24, 1024, 16, 50304, 405_334_016, 302_311_424),
    "1b": (16, 2048, 8, 50304, 1_011_781_632, 805_736_448),
    "1.4b": (24, 2048, 16, 50304, 1_414_647_808, 1_208_602_624),
    "2.8b": (32, 2560, 32, 50304, 2_775_208_960, 2_517_652_480),
    "6.9b": (32, 4096, 32, 50432, 6_857_302_016, 6_444_163_072),
    "12b": (36, 5120, 40, 50688, 11_846_072_320, 11_327_027_200),
}


def shape(layers: int, hidden: int, heads: int, vocabulary: int | None, **options: object) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "num_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_kv_heads": heads,
            "intermediate_size": 4 * hidden,
            "seq_length": 64,
            "max_position_embeddings": 64,
            "padded_vocab_size": vocabulary,
            "pos_emb": "rotary",
            **options,
        }
    )


@pytest.mark.parametrize("name", PYTHIA)
def test_pythia_has_its_published_number_of_parameters(name: str) -> None:
    layers, hidden, heads, vocabulary, total, non_embedding = PYTHIA[name]
    size = model_size(shape(layers, hidden, heads, vocabulary, no_weight_tying=True, gpt_j_residual=True))
    assert (size.total, size.non_embedding) == (total, non_embedding)


def test_without_a_vocabulary_only_the_blocks_are_counted() -> None:
    size = model_size(shape(12, 768, 12, None, no_weight_tying=True))
    assert (size.total, size.non_embedding) == (None, 85_056_000)


OPTIONS: dict[str, dict[str, object]] = {
    "tied": {"no_weight_tying": False},
    "untied": {"no_weight_tying": True},
    "one norm": {"gpt_j_residual": True, "gpt_j_tied": True},
    "tied norm without parallel residual": {"gpt_j_tied": True},
    "learned positions": {"pos_emb": "learned"},
    "alibi": {"pos_emb": "alibi"},
    "rmsnorm": {"norm": "rmsnorm"},
    "scalenorm": {"norm": "scalenorm"},
    "non-parametric": {"norm": "non_parametric_layernorm"},
    "no biases": {"use_bias_in_attn_linear": False, "use_bias_in_mlp": False},
    "gated": {"activation": "swiglu", "intermediate_size": 48},
    "grouped": {"num_kv_heads": 2},
    "qk norm": {"use_qk_layernorm": True},
    "qk rmsnorm": {"use_qk_layernorm": True, "norm": "rmsnorm"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_count_is_that_of_the_model(name: str) -> None:
    from megatron.model.gpt import parameter_count

    model = shape(3, 32, 4, 128, **OPTIONS[name])
    assert model_size(model).total == parameter_count(model)


def test_layers_that_share_parameters_count_once() -> None:
    shared, plain = model_size(shape(6, 32, 4, 128, num_unique_layers=2)), model_size(shape(2, 32, 4, 128))
    assert shared.total == plain.total

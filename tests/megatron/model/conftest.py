"""A small model configuration to start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from megatron.config.schema import Config, ModelConfig
from sepllm.pattern import AttentionPattern

SMALL: dict[str, object] = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_kv_heads": 4,
    "intermediate_size": 96,
    "seq_length": 32,
    "max_position_embeddings": 64,
    "pos_emb": "rotary",
    "rotary_pct": 0.5,
    "no_weight_tying": True,
    "gpt_j_residual": True,
    "vocab_size": 90,
    "padded_vocab_size": 96,
}

MakeConfig = Callable[..., ModelConfig]
MakeRun = Callable[..., Config]


@pytest.fixture
def make_config() -> MakeConfig:
    """``make_config(num_layers=3)``: the small model with these values instead."""
    return lambda **changes: ModelConfig.model_validate(SMALL | changes)


@pytest.fixture
def make_run() -> MakeRun:
    """``make_run({"precision": {"precision": "fp16"}}, num_layers=3)``: a whole run with the small model, groups changed by name."""

    def make(groups: Mapping[str, Mapping[str, object]] | None = None, **model: object) -> Config:
        shape = SMALL | model
        pattern = AttentionPattern.full(int(str(shape["num_layers"])))
        values: dict[str, Mapping[str, object]] = {name: {} for name in Config.model_fields.keys() - {"deepspeed", "files"}}
        values |= {
            "model": shape,
            "attention": {"prefill": pattern, "decode": pattern, "mode": "full"},
            "schedule": {"lr": 1e-3, "lr_decay_iters": 10},
            "batch": {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "data_parallel_size": 1},
            "runtime": {"world_size": 1, "device": "cpu"},
        }
        return Config.model_validate({name: {**fields, **(groups or {}).get(name, {})} for name, fields in values.items()})

    return make

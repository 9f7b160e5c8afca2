"""Whatever somebody writes under any key, the answer is a configuration or a list of mistakes."""

from __future__ import annotations

import pytest
from pydantic import JsonValue

from megatron.config.checks import check_config, check_settings, check_startable
from megatron.config.deepspeed import deepspeed_config
from megatron.config.keys import KEYS
from megatron.config.loader import config_from_json, config_to_json
from megatron.config.resolve import resolve
from megatron.config.settings import collect
from megatron.config.source import Entry

BASE: dict[str, JsonValue] = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 128,
    "max_position_embeddings": 128,
    "train_micro_batch_size_per_gpu": 2,
    "train_iters": 100,
    "tokenizer_type": "CharLevelTokenizer",
    "separator_token_ids": [5],
}
VALUES: list[JsonValue] = [
    True,
    0,
    -1,
    3,
    1.5,
    "x",
    "1e3",
    float("nan"),
    [],
    [1],
    ["a"],
    [[["global"], 4]],
    {},
    {"enabled": True, "loss_scale": "x"},
    {"stage": [1], "type": 3, "params": {"lr": [], "betas": "x"}},
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_every_key_with_any_value_resolves_or_is_a_mistake(value: JsonValue) -> None:
    for key in KEYS:
        entries = [Entry(key=name, value=given, places={"": f"run.yml:{line}"}) for line, (name, given) in enumerate({**BASE, key: value}.items())]
        settings = collect(entries, {})
        check_settings(settings)
        config = resolve(settings, world_size=4, device="cpu", vocab_size=None, files=[])
        assert config is not None or settings.mistakes, key
        if config is not None:
            check_config(settings, config)
            check_startable(config, has_fp16=False)
            deepspeed_config(config)
            assert settings.mistakes or config_from_json(config_to_json(config)) == config, key

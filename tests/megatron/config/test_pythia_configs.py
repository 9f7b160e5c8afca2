"""Pythia's configurations: their keys, their old names, and the things in them that current software refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.config.deepspeed import deepspeed_config
from megatron.config.loader import ConfigError, load_config_with_notes
from sepllm.pattern import AttentionPattern

KEYS: dict[str, object] = {
    "pipe-parallel-size": 1,
    "model-parallel-size": 1,
    "num-layers": 12,
    "hidden-size": 768,
    "num-attention-heads": 12,
    "seq-length": 2048,
    "max-position-embeddings": 2048,
    "norm": "layernorm",
    "pos-emb": "rotary",
    "rotary-pct": 0.25,
    "no-weight-tying": True,
    "gpt_j_residual": True,
    "output_layer_parallelism": "column",
    "attention-config": [[["flash"], 12]],
    "scaled-upper-triang-masked-softmax-fusion": True,
    "bias-gelu-fusion": True,
    "init_method": "small_init",
    "output_layer_init_method": "wang_init",
    "optimizer": {"type": "Adam", "params": {"lr": 0.0006, "betas": [0.9, 0.95], "eps": 1.0e-8}},
    "min_lr": 0.00006,
    "zero_optimization": {"stage": 1, "allgather_bucket_size": 500000000, "cpu_offload": False},
    "zero_allow_untested_optimizer": True,
    "train_micro_batch_size_per_gpu": 32,
    "gas": 1,
    "data-impl": "mmap",
    "num_workers": 1,
    "checkpoint-activations": True,
    "checkpoint-num-layers": 1,
    "partition-activations": True,
    "synchronize-each-layer": True,
    "gradient_clipping": 1.0,
    "weight-decay": 0.1,
    "hidden-dropout": 0,
    "attention-dropout": 0,
    "fp16": {"fp16": True, "enabled": True, "loss_scale": 0, "initial_scale_power": 12, "hysteresis": 2, "min_loss_scale": 1},
    "train-iters": 143000,
    "lr-decay-iters": 143000,
    "distributed-backend": "nccl",
    "lr-decay-style": "cosine",
    "warmup": 0.01,
    "save-interval": 500,
    "eval-interval": 40000,
    "eval-iters": 10,
    "log-interval": 10,
    "steps_per_print": 10,
    "wall_clock_breakdown": True,
    "train-data-paths": ["pile"],
    "valid-data-paths": ["pile"],
    "test-data-paths": ["pile"],
    "tokenizer-type": "HFTokenizer",
    "vocab-file": "20B_tokenizer.json",
    "launcher": "slurm",
    "deepspeed_slurm": True,
    "save_iters": [1, 2],
    "detect_nvlink_pairs": True,
}
SHAPES = {
    "14m": (6, 128, 4, 1),
    "31m": (6, 256, 8, 1),
    "70m": (6, 512, 8, 1),
    "160m": (12, 768, 12, 1),
    "410m": (24, 1024, 16, 1),
    "1b": (16, 2048, 8, 1),
    "1.4b": (24, 2048, 16, 1),
    "2.8b": (32, 2560, 32, 1),
    "6.9b": (32, 4096, 32, 2),
    "12b": (36, 5120, 40, 4),
}
"""Layers, width, heads, tensor-parallel size."""


def sized(name: str) -> dict[str, object]:
    layers, width, heads, shards = SHAPES[name]
    size = {"num-layers": layers, "hidden-size": width, "num-attention-heads": heads, "model-parallel-size": shards}
    return KEYS | size | {"attention-config": [[["flash"], layers]]}


def write(keys: dict[str, object], folder: Path, *, without_comma_after: str | None = None) -> Path:
    lines = [f"   {json.dumps(key)}: {json.dumps(value)}" + ("" if key == without_comma_after else ",") for key, value in keys.items()]
    path = folder / "pythia.yml"
    path.write_text("\n".join(["{", *lines, "}"]))
    return path


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("world_size", [8, 32])
def test_every_size_resolves_to_full_attention(name: str, world_size: int, tmp_path: Path) -> None:
    loaded = load_config_with_notes([write(sized(name), tmp_path)], world_size=world_size, vocab_size=50277)
    config = loaded.config
    layers, width, _, shards = SHAPES[name]
    assert config.attention.mode == "full"
    assert config.attention.prefill == AttentionPattern.full(layers)
    assert config.model.padded_vocab_size == {1: 50304, 2: 50432, 4: 50688}[shards]
    assert config.model.intermediate_size == 4 * width
    assert config.batch.train_batch_size == 32 * world_size // shards
    assert any(f"Pythia {name} have 1024" in note for note in loaded.notes) == (config.batch.train_batch_size != 1024)


def test_the_note_on_the_batch_names_the_accumulation_that_repairs_it(tmp_path: Path) -> None:
    notes = load_config_with_notes([write(KEYS, tmp_path)], world_size=8).notes
    assert any("256 = 32 x 1 x 8 devices" in note and "set gradient_accumulation_steps to 4." in note for note in notes)


def test_old_names_and_extra_members_are_taken(tmp_path: Path) -> None:
    loaded = load_config_with_notes([write(KEYS, tmp_path)], world_size=32)
    config = loaded.config
    assert config.checkpoint.checkpoint_factor == 500
    assert config.batch.gradient_accumulation_steps == 1
    assert "fp16" not in deepspeed_config(config)["fp16"]  # type: ignore[operator]
    text = "\n".join(loaded.notes)
    assert "gas is the old name of gradient_accumulation_steps" in text
    assert "save-interval is the old name of checkpoint_factor" in text
    assert "save_iters" in text


def test_what_the_published_files_do_not_say_is_noted(tmp_path: Path) -> None:
    one_billion = load_config_with_notes([write(sized("1b"), tmp_path)], world_size=32).notes
    assert any("Pythia 1b was trained in bfloat16" in note for note in one_billion)
    keys = {key: value for key, value in sized("12b").items() if "init_method" not in key}
    loaded = load_config_with_notes([write(keys, tmp_path)], world_size=32)
    assert (loaded.config.model.init_method, loaded.config.model.output_layer_init_method) == ("normal", "scaled_normal")
    assert any("init_method is normal: so was the published Pythia 12b" in note for note in loaded.notes)


def test_tensor_parallel_models_need_enough_devices(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model_parallel_size \(4\) needs a multiple of 4 devices and there are 1"):
        load_config_with_notes([write(sized("12b"), tmp_path)], world_size=1)


def test_the_missing_comma_of_pythia_12b_is_named(tmp_path: Path) -> None:
    path = write(sized("12b"), tmp_path, without_comma_after="attention-config")
    with pytest.raises(ConfigError, match=r"pythia.yml:16: not YAML.*Line 15 probably lacks a comma at its end: .*attention-config"):
        load_config_with_notes([path], world_size=8)

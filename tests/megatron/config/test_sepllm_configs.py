"""The 27 sample configurations of SepLLM, rebuilt from their table (all keys of the vanilla file, and what each file changes)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.config.checks import check_startable
from megatron.config.loader import load_config_with_notes
from sepllm.pattern import UNBOUNDED, AttentionPattern

SEPARATORS = [15, 13, 32, 2, 28, 27, 209, 186, 187]
S = 2048
VANILLA: dict[str, object] = {
    "pipe-parallel-size": 1,
    "model-parallel-size": 1,
    "num-layers": 12,
    "hidden-size": 768,
    "num-attention-heads": 12,
    "seq-length": S,
    "max-position-embeddings": S,
    "pos-emb": "rotary",
    "rotary-pct": 0.25,
    "no-weight-tying": True,
    "gpt-j-residual": True,
    "output-layer-parallelism": "column",
    "attention-config": [[["global"], 12]],
    "scaled_masked_softmax_fusion": True,
    "bias-gelu-fusion": True,
    "init_method": "small_init",
    "output_layer_init_method": "wang_init",
    "optimizer": {"type": "Adam", "params": {"lr": 0.0006, "betas": [0.9, 0.95], "eps": 1.0e-8}},
    "min_lr": 0.00006,
    "zero_optimization": {
        "stage": 1,
        "allgather_partitions": True,
        "allgather_bucket_size": 500000000,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 500000000,
        "contiguous_gradients": True,
        "cpu_offload": False,
    },
    "train_micro_batch_size_per_gpu": 32,
    "gradient_accumulation_steps": 4,
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
    "fp16": {
        "fp16": True,
        "enabled": True,
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 12,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "train-iters": 143000,
    "lr-decay-iters": 143000,
    "distributed-backend": "nccl",
    "lr-decay-style": "cosine",
    "warmup": 0.01,
    "checkpoint-factor": 1000,
    "extra-save-iters": [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
    "eval-interval": 4000,
    "eval-iters": 10,
    "log-interval": 10,
    "steps_per_print": 10,
    "wall_clock_breakdown": True,
    "train-data-paths": ["data/pile"],
    "valid-data-paths": ["data/pile"],
    "test-data-paths": ["data/pile"],
    "tokenizer-type": "HFTokenizer",
    "vocab-file": "data/20B_tokenizer.json",
    "launcher": "pdsh",
    "USE_ORIGINAL_FULL_ATTEN": True,
    "streamingLLM": False,
    "USE_SEP_ATTN_KERNEL_ACCELERATOR": False,
}
SEPLLM: dict[str, object] = {
    "USE_ORIGINAL_FULL_ATTEN": False,
    "separator_token_ids": SEPARATORS,
    "PADDING_ID": 0,
    "init_tok_max_idx": 2,
    "BATCH_ADAPTIVE_INIT_POS": False,
    "PRINT_KV_RATIO": True,
    "print_ratio_intervals": 8000,
}
LARGE: dict[str, object] = {
    "num-layers": 24,
    "hidden-size": 2048,
    "num-attention-heads": 32,
    "attention-config": [[["global"], 24]],
    "optimizer": {"type": "Adam", "params": {"lr": 0.0002, "betas": [0.9, 0.95], "eps": 1.0e-8}},
    "min_lr": 0.00002,
    "train_micro_batch_size_per_gpu": 16,
    "gradient_accumulation_steps": 8,
}
BIPE: dict[str, object] = {"USE_BiPE": True, "BiPE_seps": SEPARATORS}
KERNEL: dict[str, object] = {"USE_SEP_ATTN_KERNEL_ACCELERATOR": True, "train_micro_batch_size_per_gpu": 64, "gradient_accumulation_steps": 2}
NOT_RECOMPILED: dict[str, object] = KERNEL | {"RECOMPILE_SEP_ATTN_KERNEL": False}
RECOMPILED: dict[str, object] = KERNEL | {"RECOMPILE_SEP_ATTN_KERNEL": True}
HALF_BATCH: dict[str, object] = {"train_micro_batch_size_per_gpu": 32, "gradient_accumulation_steps": 4}


def one(window: int, *, layers: int = 12) -> tuple[int, ...]:
    return (window,) * layers


def first_full(window: int) -> tuple[int, ...]:
    return (S, *one(window, layers=11))


def ends_full(window: int) -> tuple[int, ...]:
    return (S, *one(window, layers=10), S)


def ends_and_middle_full(window: int) -> tuple[int, ...]:
    return (S, *one(window, layers=4), S, *one(window, layers=5), S)


Sample = tuple[dict[str, object], tuple[int, ...]]
SAMPLES: dict[str, Sample] = {
    "160m-n64-NOkernel": ({}, one(64)),
    "160m-n64-kernel": (NOT_RECOMPILED, one(64)),
    "160m-n64-kernel-recompile": (RECOMPILED, one(64)),
    "160m-n128-NOkernel": ({}, one(128)),
    "160m-n128-kernel": (NOT_RECOMPILED, one(128)),
    "160m-n128-kernel-recompile": (RECOMPILED, one(128)),
    "160m-n256-NOkernel": ({}, one(256)),
    "160m-n64H-NOkernel": ({}, first_full(64)),
    "160m-n64H-kernel": (NOT_RECOMPILED, first_full(64)),
    "160m-n64H-kernel_recompile": (RECOMPILED, first_full(64)),
    "160m-n64HT-NOkernel": ({}, ends_full(64)),
    "160m-n64HT-kernel": (NOT_RECOMPILED, ends_full(64)),
    "160m-n64HT-kernel_recompile": (RECOMPILED, ends_full(64)),
    "160m-n64HT-NOkernel_rotaryBiPE": (BIPE, ends_full(64)),
    "160m-n64HT-NOkernel_alibiBiPE": (BIPE | {"pos-emb": "alibi"}, ends_full(64)),
    "160m-n64HT-kernel_recompile_rotaryBiPE": (RECOMPILED | BIPE, ends_full(64)),
    "160m-n64HT-kernel_recompile_alibiBiPE": (RECOMPILED | BIPE | HALF_BATCH | {"pos-emb": "alibi"}, ends_full(64)),
    "160m-n64HMT-NOkernel": ({}, ends_and_middle_full(64)),
    "160m-n128HMT-NOkernel": ({}, ends_and_middle_full(128)),
    "160m-n256HMT-NOkernel": ({}, ends_and_middle_full(256)),
    "160m-n128HT-NOkernel": ({}, ends_full(128)),
    "1.4b-n64-NOkernel": (LARGE, one(64, layers=24)),
    "1.4b-n64-kernel": (NOT_RECOMPILED | LARGE | HALF_BATCH, one(64, layers=24)),
    "debug": (RECOMPILED | HALF_BATCH | BIPE | {"USE_BiPE": False}, ends_full(64)),
}
OTHERS: dict[str, dict[str, object]] = {
    "streamingllm-160m-n64": {
        "USE_ORIGINAL_FULL_ATTEN": False,
        "streamingLLM": True,
        "prefill_local_window_size": 64,
        "generate_local_window_size": 64,
        "init_tok_max_idx": 2,
        "PADDING_ID": 0,
    },
    "vanilla-160m-full-attention": {},
    "vanilla-1.4b-32heads-full-attention": LARGE,
}


def keys_of(sample: Sample) -> dict[str, object]:
    changes, windows = sample
    if len(set(windows)) == 1:
        sizes: dict[str, object] = {"prefill_local_window_size": windows[0], "generate_local_window_size": windows[0]}
    else:
        sizes = {
            "USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS": True,
            "USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS": True,
            "prefill_loc_win_size_list": list(windows),
            "generate_win_loc_size_list": list(windows),
        }
    return VANILLA | SEPLLM | changes | sizes


def written(keys: dict[str, object], folder: Path) -> Path:
    """The keys as those files have them: one mapping in braces, with comments and a trailing comma."""
    lines = [f"  '{key}' : {json.dumps(value)}, # as published" for key, value in keys.items()]
    path = folder / "sample.yml"
    path.write_text("\n".join(["{", "  # a comment", *lines, "}"]))
    return path


def test_there_are_27_samples() -> None:
    assert len(SAMPLES) + len(OTHERS) == 27


@pytest.mark.parametrize("name", list(SAMPLES))
def test_each_sepllm_file_resolves_unchanged_on_8_devices(name: str, tmp_path: Path) -> None:
    path = written(keys_of(SAMPLES[name]), tmp_path)
    loaded = load_config_with_notes([path], world_size=8)
    config = loaded.config
    expected = AttentionPattern(initial_tokens=3, separator_ids=frozenset(SEPARATORS), windows=SAMPLES[name][1])
    assert config.attention.mode == "sepllm"
    assert config.attention.prefill == config.attention.decode == expected
    assert config.batch.train_batch_size == 1024
    assert config.attention.core == "auto"
    assert config.attention.print_kv_ratio
    assert config.model.use_bipe == ("BiPE" in name)
    assert config.model.pos_emb == ("alibi" if "alibi" in name else "rotary")
    assert config.files[0].text == path.read_text()
    assert not any("1024" in note for note in loaded.notes)


@pytest.mark.parametrize("name", list(OTHERS))
def test_each_other_file_resolves_unchanged_on_8_devices(name: str, tmp_path: Path) -> None:
    config = load_config_with_notes([written(VANILLA | OTHERS[name], tmp_path)], world_size=8).config
    layers = config.model.num_layers
    is_streaming = name.startswith("streaming")
    expected = AttentionPattern(initial_tokens=3, windows=one(64)) if is_streaming else AttentionPattern(windows=(UNBOUNDED,) * layers)
    assert config.attention.mode == ("streaming" if is_streaming else "full")
    assert config.attention.prefill == config.attention.decode == expected
    assert config.batch.train_batch_size == 1024
    assert config.schedule.lr == (2e-4 if "1.4b" in name else 6e-4)


def test_everything_else_of_the_vanilla_file_arrives(tmp_path: Path) -> None:
    config = load_config_with_notes([written(VANILLA, tmp_path)], world_size=8, vocab_size=50277).config
    assert (config.model.activation, config.model.init_method, config.model.padded_vocab_size) == ("gelu_tanh", "small_init", 50304)
    assert config.model.intermediate_size == 3072
    assert (config.optimizer.type, config.optimizer.betas, config.optimizer.weight_decay) == ("adam", (0.9, 0.95), 0.1)
    assert (config.schedule.min_lr, config.schedule.lr_decay_iters, config.schedule.lr_schedule_version) == (6e-5, 143000, "v3")
    assert (config.precision.precision, config.precision.initial_scale_power) == ("fp16", 12)
    assert config.parallel.zero_stage == 1
    assert config.checkpoint.extra_save_iters == (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    assert config.deepspeed["activation_checkpointing"] == {"partition_activations": True, "synchronize_checkpoint_boundary": True}


@pytest.mark.parametrize("world_size", [1, 8, 32])
def test_a_sample_resolves_on_any_number_of_devices_and_says_when_the_batch_is_not_the_published_one(world_size: int, tmp_path: Path) -> None:
    loaded = load_config_with_notes([written(keys_of(SAMPLES["160m-n64-NOkernel"]), tmp_path)], world_size=world_size)
    assert loaded.config.batch.train_batch_size == 128 * world_size
    assert any("published runs of Pythia 160m have 1024" in note for note in loaded.notes) == (world_size != 8)


def test_an_fp16_sample_starts_where_there_is_fp16_and_otherwise_names_the_two_overrides_that_help(tmp_path: Path) -> None:
    path = written(keys_of(SAMPLES["160m-n64-NOkernel"]), tmp_path)
    config = load_config_with_notes([path], world_size=8, vocab_size=50277).config
    assert check_startable(config, has_fp16=True) == []
    (reason,) = check_startable(config, has_fp16=False)
    assert "--set fp16.enabled=false --set precision=bfloat16" in reason
    helped = load_config_with_notes([path], world_size=8, vocab_size=50277, overrides={"fp16.enabled": False, "precision": "bfloat16"}).config
    assert helped.precision.precision == "bfloat16"
    assert check_startable(helped, has_fp16=False) == []


@pytest.mark.parametrize("name", ["160m-n64HT-NOkernel_rotaryBiPE", "160m-n64HT-NOkernel_alibiBiPE"])
def test_a_bipe_sample_starts(name: str, tmp_path: Path) -> None:
    path = written(keys_of(SAMPLES[name]), tmp_path)
    config = load_config_with_notes([path], world_size=8, vocab_size=50277).config
    assert config.model.bipe_separator_ids == tuple(SEPARATORS)
    assert check_startable(config, has_fp16=True) == []

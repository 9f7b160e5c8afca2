"""Settings to one resolved `Config`: the groups that are worked out elsewhere, the model's own derivations, and the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megatron.config.batch_size import data_parallel_size, resolve_batch
from megatron.config.engine import resolve_engine, resolve_launch, resolve_parallel
from megatron.config.keys import GATED_ACTIVATIONS
from megatron.config.optimizer import resolve_optimizer, resolve_schedule
from megatron.config.pattern import resolve_attention
from megatron.config.precision import resolve_precision
from megatron.config.schema import (
    BatchConfig,
    CheckpointConfig,
    Config,
    ConfigFile,
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    LoggingConfig,
    ModelConfig,
    RuntimeConfig,
    TokenizerConfig,
    TrainingConfig,
)
from megatron.config.settings import Settings, attempt, copied
from megatron.config.vocabulary import padded_vocab_size, vocabulary_size

Device = Literal["cuda", "cpu"]


def resolve(settings: Settings, *, world_size: int, device: Device, vocab_size: int | None, files: Sequence[ConfigFile]) -> Config | None:
    """The configuration, or None where something is missing or wrong; every mistake is in `settings.mistakes`."""
    tokenizer = attempt(settings, lambda: copied(settings, TokenizerConfig))
    model = None if tokenizer is None else attempt(settings, lambda: _model(settings, tokenizer=tokenizer, vocab_size=vocab_size))
    attention = attempt(settings, lambda: resolve_attention(settings))
    optimizer = attempt(settings, lambda: resolve_optimizer(settings))
    schedule = None if optimizer is None else attempt(settings, lambda: resolve_schedule(settings, lr=optimizer.lr))
    batch = attempt(settings, lambda: _batch(settings, world_size=world_size))
    precision = attempt(settings, lambda: resolve_precision(settings))
    parallel = attempt(settings, lambda: resolve_parallel(settings))
    engine = attempt(settings, lambda: resolve_engine(settings))
    rest = {
        "data": attempt(settings, lambda: copied(settings, DataConfig)),
        "training": attempt(settings, lambda: copied(settings, TrainingConfig)),
        "checkpoint": attempt(settings, lambda: copied(settings, CheckpointConfig)),
        "logging": attempt(settings, lambda: copied(settings, LoggingConfig)),
        "launch": attempt(settings, lambda: resolve_launch(settings)),
        "generation": attempt(settings, lambda: _generation(settings)),
        "evaluation": attempt(settings, lambda: copied(settings, EvaluationConfig)),
    }
    groups: dict[str, object] = {
        "model": model,
        "attention": attention,
        "tokenizer": tokenizer,
        "optimizer": None if optimizer is None else optimizer.optimizer,
        "schedule": schedule,
        "batch": batch,
        "precision": precision,
        "parallel": parallel,
        "deepspeed": engine,
        **rest,
    }
    if any(group is None for group in groups.values()):
        return None
    runtime = RuntimeConfig(world_size=world_size, device=device)
    return Config.model_validate({**groups, "runtime": runtime, "files": tuple(files)})


def _model(settings: Settings, *, tokenizer: TokenizerConfig, vocab_size: int | None) -> ModelConfig:
    norm = settings.get_or("norm", "layernorm")
    activation = settings.get_or("activation", "gelu")
    epsilon_key, default_epsilon = {"rmsnorm": ("rms_norm_epsilon", 1e-8), "scalenorm": ("scalenorm_epsilon", 1e-8)}.get(
        norm, ("layernorm_epsilon", 1e-5)
    )
    if vocab_size is None:
        vocab_size = _vocabulary(settings, tokenizer)
    return copied(
        settings,
        ModelConfig,
        num_layers=settings.need("num_layers", int),
        hidden_size=settings.need("hidden_size", int),
        num_attention_heads=settings.need("num_attention_heads", int),
        num_kv_heads=settings.get_or("num_kv_heads", settings.need("num_attention_heads", int)),
        seq_length=settings.need("seq_length", int),
        max_position_embeddings=settings.need("max_position_embeddings", int),
        intermediate_size=mlp_width(
            hidden_size=settings.need("hidden_size", int),
            intermediate_size=settings.get("intermediate_size", int),
            expansion_factor=settings.get("expansion_factor", float),
            multiple_of=settings.get_or("mlp_multiple_of", 1),
            is_gated=activation in GATED_ACTIVATIONS,
        ),
        activation="gelu_tanh" if activation == "gelu" and settings.get_or("bias_gelu_fusion", False) else activation,
        norm_epsilon=settings.get_or(epsilon_key, default_epsilon),
        vocab_size=vocab_size,
        padded_vocab_size=_padded_vocabulary(settings, vocab_size),
        use_bipe=settings.get_or("USE_BiPE", False),
        bipe_separator_ids=(settings.wholes("BiPE_seps") or ()) if settings.get_or("USE_BiPE", False) else (),
    )


def mlp_width(*, hidden_size: int, intermediate_size: int | None, expansion_factor: float | None, multiple_of: int, is_gated: bool) -> int:
    """Columns of linear2 under GPT-NeoX's rule.

    Without a gate: ``intermediate_size`` (by default 4 h) rounded up to a multiple of ``2 * multiple_of``. With a gate: two thirds of it
    rounded up alike, halved, so that a gated and a plain MLP of one ``intermediate_size`` have about as many parameters.
    """
    wanted = intermediate_size or (int(expansion_factor * hidden_size) if expansion_factor else 4 * hidden_size)
    rows = int(wanted * 2 / 3) if is_gated else wanted
    unit = 2 * multiple_of
    rounded = math.ceil(rows / unit) * unit
    return rounded // 2 if is_gated else rounded


def _vocabulary(settings: Settings, tokenizer: TokenizerConfig) -> int | None:
    try:
        size = vocabulary_size(tokenizer)
    except ValueError as error:
        raise settings.fail(["vocab_file"], str(error)) from error
    if size is None:
        where = tokenizer.vocab_file or "vocab_file is not given"
        is_there = tokenizer.vocab_file is not None and Path(tokenizer.vocab_file).exists()
        what = "tokenizer not opened" if is_there else "tokenizer not found, skipped"
        settings.notes.append(f"{what}: {where} ({tokenizer.tokenizer_type}); the size of the vocabulary is unknown.")
    return size


def _padded_vocabulary(settings: Settings, vocab_size: int | None) -> int | None:
    given = settings.get("padded_vocab_size", int)
    if given is not None or vocab_size is None:
        return given
    return padded_vocab_size(vocab_size, settings.get_or("make_vocab_size_divisible_by", 128), settings.get_or("model_parallel_size", 1))


def _batch(settings: Settings, *, world_size: int) -> BatchConfig:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    try:
        copies = data_parallel_size(
            world_size=world_size,
            pipe_parallel_size=settings.get_or("pipe_parallel_size", 0),
            model_parallel_size=settings.get_or("model_parallel_size", 1),
            context_parallel_size=settings.get_or("context_parallel_size", 1),
        )
    except ValueError as error:
        raise settings.fail(["pipe_parallel_size", "model_parallel_size", "context_parallel_size"], str(error)) from error
    total, micro, steps = (settings.get(key, int) for key in keys)
    try:
        return resolve_batch(
            train_batch_size=total, train_micro_batch_size_per_gpu=micro, gradient_accumulation_steps=steps, data_parallel_size=copies
        )
    except ValueError as error:
        raise settings.fail(keys, str(error)) from error


def _generation(settings: Settings) -> GenerationConfig:
    default = "input-file" if settings.has("sample_input_file") else "unconditional"
    return copied(settings, GenerationConfig, text_gen_type=settings.get_or("text_gen_type", default))

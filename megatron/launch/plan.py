"""What `deepy.py --check` prints: everything the configuration resolves to, before any device is touched."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import count, groupby, takewhile

from megatron.config.deepspeed import deepspeed_config
from megatron.config.schema import CheckpointConfig, Config, ModelConfig
from megatron.config.size import model_size
from megatron.launch.inputs import Input, data_inputs, tokenizer_inputs, training_prefix
from megatron.launch.kept import SAMPLES, kept_ratio, needs_data, read_samples
from megatron.launch.memory import dense_map_bytes, memory_estimate
from megatron.optim.schedule import LearningRate
from sepllm.pattern import AttentionPattern, SelfAdjust

_NOT_FOUND = "not found, skipped"

Row = tuple[str, str]
"""A label and its text; an empty label continues the row above."""


def plan_text(config: Config, *, notes: Sequence[str], obstacles: Sequence[str], where: str) -> str:
    """The whole plan. ``where`` says in words what the job runs on; ``obstacles``, why it could not be started now."""
    rows = [
        ("devices", f"{where}: {_parallel_layout(config)}"),
        ("batch", _batch(config)),
        *_inputs(config),
        *_parameters(config),
        *_memory(config),
        *_attention(config),
        ("positions", _positions(config.model)),
        ("kept ratio", _kept(config)),
        *_schedule(config),
        ("checkpoints", _checkpoints(config)),
        *_labelled("notes", notes),
        *_labelled("cannot start", obstacles),
        *_labelled("deepspeed", json.dumps(deepspeed_config(config), indent=2).splitlines()),
    ]
    return "\n".join(f"{label:<14}{text}".rstrip() for label, text in rows)


def _labelled(label: str, lines: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(lines):
        yield ("" if number else label, line)


def _parallel_layout(config: Config) -> str:
    parallel = config.parallel
    sizes = {
        "data parallel": config.batch.data_parallel_size,
        "context": parallel.context_parallel_size,
        "tensor": parallel.model_parallel_size,
        "pipeline": max(1, parallel.pipe_parallel_size),
    }
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) + f", ZeRO {parallel.zero_stage}, {config.precision.precision}"


def _batch(config: Config) -> str:
    batch = config.batch
    tokens = batch.train_batch_size * config.model.seq_length
    return (
        f"{batch.train_batch_size:,} samples a step = micro batch {batch.train_micro_batch_size_per_gpu} x accumulation "
        f"{batch.gradient_accumulation_steps} x data parallel {batch.data_parallel_size}; {tokens:,} tokens a step"
    )


def _inputs(config: Config) -> Iterator[Row]:
    files = tokenizer_inputs(config)
    named = ", ".join(_found(given) for given in files) or "no file"
    size = f"; {config.model.vocab_size:,} tokens" if config.model.vocab_size is not None else ""
    yield "tokenizer", f"{config.tokenizer.tokenizer_type}, {named}{size}"
    data = data_inputs(config)
    yield from _labelled("data", [f"{given.key} {_found(given)}" for given in data] or ["none named"])


def _found(given: Input) -> str:
    return f"{given.name}: {_NOT_FOUND}" if given.missing else given.name


def _parameters(config: Config) -> Iterator[Row]:
    size = model_size(config.model)
    total = f"{size.total:,} in all" if size.total is not None else "in all: vocabulary unknown, skipped"
    yield "parameters", f"{total}; {size.non_embedding:,} without embeddings; {size.per_layer:,} in each of {config.model.num_layers} layers"
    if config.model.padded_vocab_size is not None:
        tied = "output matrix of its own" if config.model.no_weight_tying else "output tied to the embeddings"
        yield "", f"vocabulary padded to {config.model.padded_vocab_size:,}; {tied}"


def _memory(config: Config) -> Iterator[Row]:
    estimate = memory_estimate(config)
    if estimate is None:
        yield "memory", "vocabulary unknown, skipped"
        return
    unit, size = ("GiB", 2**30) if estimate.total_bytes >= 2**30 else ("MiB", 2**20)
    yield "memory", f"{estimate.total_bytes / size:.2f} {unit} on each device (estimate), at the fullest moment of"
    for part in estimate.parts:
        yield "", f"{part.num_bytes / size:9.2f}  {part.text}"
    if config.attention.core == "auto" and not config.attention.prefill.is_full(config.model.seq_length):
        yield "", f"{dense_map_bytes(config) / size:9.2f}  more for each live layer that the dense core computes"
    yield "", "time, communication, and layouts that fit other devices: python -m tools.plan with the same configurations"


def _attention(config: Config) -> Iterator[Row]:
    attention = config.attention
    yield "attention", f"{attention.mode}, core {attention.core}: {_pattern(attention.prefill)}"
    yield from _labelled("", _layers(attention.prefill, config.model.seq_length))
    if attention.decode != attention.prefill:
        yield "", f"when decoding: {_pattern(attention.decode)}"
        yield from _labelled("", _layers(attention.decode, config.model.seq_length))


def _pattern(pattern: AttentionPattern) -> str:
    words = [f"{pattern.initial_tokens} initial tokens", f"{len(pattern.separator_ids)} separator ids"]
    if pattern.separator_ids:
        words[-1] += f" ({', '.join(map(str, sorted(pattern.separator_ids)))})"
    if pattern.sliding_width is not None:
        words.append(f"nothing further back than {pattern.sliding_width}")
    if isinstance(pattern.softmax, SelfAdjust):
        extremes = ", extremes of all causal keys" if pattern.softmax.extremes == "causal" else ""
        words.append(f"self-adjusting softmax ({pattern.softmax.kind}{extremes})")
    return ", ".join(words)


def _layers(pattern: AttentionPattern, length: int) -> list[str]:
    """One line for each run of equal layers."""
    kinds = [_layer(pattern, layer, length) for layer in range(pattern.num_layers)]
    lines, first = [], 0
    for kind, run in groupby(kinds):
        last = first + len(list(run)) - 1
        lines.append(f"{f'layer {first}' if first == last else f'layers {first}-{last}'}: {kind}")
        first = last + 1
    return lines


def _layer(pattern: AttentionPattern, layer: int, length: int) -> str:
    if pattern.is_full(length, layer=layer):
        return "full"
    grid = f", every {pattern.intervals[layer]}th token" if pattern.intervals else ""
    return f"window {pattern.windows[layer]}{grid}"


def _positions(model: ModelConfig) -> str:
    words = f"rotary, {model.rotary_pct:.0%} of each head" if model.pos_emb == "rotary" else model.pos_emb
    if not model.use_bipe:
        return words
    return f"{words}, by segment (BiPE, {len(model.bipe_separator_ids)} separator ids); an embedding for each place in a segment"


def _kept(config: Config) -> str:
    """The share of the causal attention map that is computed, over all layers."""
    pattern, length = config.attention.prefill, config.model.seq_length
    if config.attention.reset_at_document_end:
        return "attention starts anew in every document, skipped"
    if not needs_data(pattern, length):
        return f"{100 * kept_ratio(pattern, [range(length)]):.2f} % of the attention map, whatever the data"
    prefix = training_prefix(config)
    if prefix is None:
        return f"training data {_NOT_FOUND}"
    try:
        samples = read_samples(prefix, length)
    except ValueError as error:
        return f"training data skipped: {error}"
    if not samples:
        return f"{prefix} has fewer than {length} tokens, skipped"
    return f"{100 * kept_ratio(pattern, samples):.2f} % of the attention map, on {len(samples)} of {SAMPLES} stretches of {prefix}"


def _schedule(config: Config) -> Iterator[Row]:
    schedule, steps = config.schedule, config.training.train_iters
    rate = LearningRate(schedule)
    last = rate.at(schedule.lr_decay_iters)
    then = f"down to {last:g} at step {schedule.lr_decay_iters:,}" if last < schedule.lr else "and stays there"
    yield (
        "learning rate",
        f"{schedule.lr_decay_style} {schedule.lr_schedule_version}: up to {schedule.lr:g} in {rate.warmup_steps:g} steps, {then}; "
        f"{config.optimizer.type}, weight decay {config.optimizer.weight_decay:g}",
    )
    if steps is None:
        yield "training", f"{config.training.train_epochs} epochs; their steps follow from the data"
    else:
        tokens = steps * config.batch.train_batch_size * config.model.seq_length
        yield "training", f"{steps:,} steps, {tokens:,} tokens; seed {config.training.seed}"


def _checkpoints(config: Config) -> str:
    checkpoint, steps = config.checkpoint, config.training.train_iters
    if checkpoint.save is None:
        return "none: save is not set"
    if steps is None:
        return f"in {checkpoint.save}"
    saved = saved_steps(checkpoint, steps)
    shown = ", ".join(map(str, saved)) if len(saved) <= 20 else f"{', '.join(map(str, saved[:14]))}, ..., {', '.join(map(str, saved[-2:]))}"
    kept = f"; the newest {checkpoint.keep_last_n_checkpoints} are kept, and extra_save_iters" if checkpoint.keep_last_n_checkpoints else ""
    return f"{len(saved)} in {checkpoint.save}: {shown}{kept}"


def saved_steps(checkpoint: CheckpointConfig, train_iters: int) -> list[int]:
    """After which steps a run of ``train_iters`` saves, its last one included."""
    steps = {step for step in checkpoint.extra_save_iters if step <= train_iters} | {train_iters}
    factor = checkpoint.checkpoint_factor
    if factor is not None and checkpoint.checkpoint_scale == "linear":
        steps.update(range(max(int(factor), 1), train_iters + 1, max(int(factor), 1)))
    elif factor is not None and factor > 1:
        powers = (int(factor**exponent) for exponent in count())
        steps.update(takewhile(lambda power: power <= train_iters, powers))
    return sorted(steps)

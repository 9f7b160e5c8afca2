"""What keys must be together. Each check reads the settings (or the resolved configuration) and says what contradicts what, and the remedy.

`check_startable` is for starting only: a configuration that this machine or this version cannot run still resolves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from megatron.config.keys import KEYS, Confirmed
from megatron.config.precision import accumulation_precision, asked_accumulation
from megatron.config.schema import Config
from megatron.config.settings import Mistake, Settings, Unreadable

_SPLITS = ("train", "valid", "test")
_DENSE_TYPES = ("global", "flash")


def check_settings(settings: Settings) -> None:
    """Reports everything that can be said from the keys alone."""
    for check in _SETTINGS_CHECKS:
        _report(settings, check(settings))


def check_config(settings: Settings, config: Config) -> None:
    """Reports what needs resolved values: vocabulary, padding, and saved keys that repeat a result."""
    for check in _CONFIG_CHECKS:
        _report(settings, check(settings, config))


def _report(settings: Settings, mistakes: Iterator[Mistake]) -> None:
    """Reports what a check finds, as far as the keys that it reads are readable."""
    try:
        for mistake in mistakes:
            settings.report(mistake)
    except Unreadable:
        return


def check_startable(config: Config, *, has_fp16: bool) -> list[str]:
    """Why this run cannot be started here and now, one sentence each; empty when it can.

    ``has_fp16``: whether the device computes in fp16 (a CPU without such units does not).
    """
    reasons = [sentence for is_asked_for, sentence in NOT_BUILT_YET if is_asked_for(config)]
    if config.precision.precision == "fp16" and not has_fp16:
        reasons.append(
            "the configuration asks for fp16 and this device does not compute in fp16: "
            "add --set fp16.enabled=false --set precision=bfloat16 (or precision=fp32)."
        )
    if config.model.vocab_size is None:
        reasons.append(f"the size of the vocabulary is not known: vocab_file ({config.tokenizer.vocab_file}) must be the tokenizer's file.")
    return reasons


NOT_BUILT_YET: tuple[tuple[Callable[[Config], bool], str], ...] = (
    (lambda config: config.model.pos_emb == "rpe", "pos_emb rpe: relative position buckets are not built yet."),
    (lambda config: config.model.use_mup, "use_mup: muP is not built yet."),
    (lambda config: config.model.num_unique_layers is not None, "num_unique_layers: layers that share parameters are not built yet."),
    (
        lambda config: config.generation.text_gen_type == "precompute",
        "text_gen_type precompute: it serves preference training, which is not offered.",
    ),
)
"""(whether the configuration asks for it, what is missing). Building a thing deletes its line."""


def _check_required(settings: Settings) -> Iterator[Mistake]:
    meanings = {
        "num_layers": "the number of blocks",
        "hidden_size": "the width of the model",
        "num_attention_heads": "the heads of each layer",
        "seq_length": "the tokens of one sample",
        "max_position_embeddings": "the longest sequence, at least seq_length",
    }
    for key, meaning in meanings.items():
        if not settings.has(key):
            yield Mistake(keys=(), text=f"{key} is missing: give {meaning}.")


def _check_heads(settings: Settings) -> Iterator[Mistake]:
    hidden, heads = settings.need("hidden_size", int), settings.need("num_attention_heads", int)
    if hidden % heads:
        text = f"num_attention_heads ({heads}) must divide hidden_size ({hidden}): use {_divisors(hidden, near=heads)}, or change hidden_size."
        yield Mistake(keys=("num_attention_heads", "hidden_size"), text=text)


def _check_kv_heads(settings: Settings) -> Iterator[Mistake]:
    heads, shards = settings.need("num_attention_heads", int), settings.get_or("model_parallel_size", 1)
    kv_heads = settings.get_or("num_kv_heads", heads)
    if heads % kv_heads:
        text = f"num_kv_heads ({kv_heads}) must divide num_attention_heads ({heads}): use {_divisors(heads, near=kv_heads)}."
        yield Mistake(keys=("num_kv_heads", "num_attention_heads"), text=text)
    for key, count in {"num_attention_heads": heads, "num_kv_heads": kv_heads}.items():
        if count % shards:
            text = f"model_parallel_size ({shards}) must divide {key} ({count}): use {_divisors(count, near=shards)}, or change {key}."
            yield Mistake(keys=("model_parallel_size", key), text=text)
            return


def _divisors(total: int, *, near: int) -> str:
    """Up to five divisors, the nearest ones, as in ``2, 3 or 6``."""
    divisors = sorted(sorted((d for d in range(1, total + 1) if total % d == 0), key=lambda d: abs(d - near))[:5])
    return ", ".join(map(str, divisors[:-1])) + (" or " if len(divisors) > 1 else "") + str(divisors[-1])


def _check_rotary(settings: Settings) -> Iterator[Mistake]:
    if settings.get_or("pos_emb", "learned") != "rotary":
        return
    head_size = settings.need("hidden_size", int) // settings.need("num_attention_heads", int)
    fraction = settings.get_or("rotary_pct", 1.0)
    rotated = int(head_size * fraction)
    if rotated < 2 or rotated % 2:
        text = f"rotary_pct ({fraction:g}) rotates {rotated} of {head_size} dimensions of a head, which must be even and at least 2: change it."
        yield Mistake(keys=("rotary_pct",), text=text)


def _check_positions(settings: Settings) -> Iterator[Mistake]:
    length, positions = settings.need("seq_length", int), settings.need("max_position_embeddings", int)
    if positions < length:
        text = f"max_position_embeddings ({positions}) is below seq_length ({length}): raise it to at least {length}."
        yield Mistake(keys=("max_position_embeddings", "seq_length"), text=text)


def _check_layers(settings: Settings) -> Iterator[Mistake]:
    layers, unique = settings.need("num_layers", int), settings.get("num_unique_layers", int)
    stages = settings.get_or("pipe_parallel_size", 0)
    if stages > layers:
        text = f"pipe_parallel_size ({stages}) is above num_layers ({layers}): use at most as many stages as there are layers."
        yield Mistake(keys=("pipe_parallel_size", "num_layers"), text=text)
    if unique is not None and layers % unique:
        text = f"num_unique_layers ({unique}) must divide num_layers ({layers}): use {_divisors(layers, near=unique)}."
        yield Mistake(keys=("num_unique_layers", "num_layers"), text=text)


def _check_gpt_j_tied(settings: Settings) -> Iterator[Mistake]:
    if settings.get_or("gpt_j_tied", False) and not settings.get_or("gpt_j_residual", False):
        text = "gpt_j_tied is true and gpt_j_residual is not: one norm for both branches needs the parallel residual; set gpt_j_residual to true."
        yield Mistake(keys=("gpt_j_tied", "gpt_j_residual"), text=text)


def _check_attention_config(settings: Settings) -> Iterator[Mistake]:
    """Every layer is `global` or `flash`, which are the same here, and there are as many as `num_layers`."""
    value = settings.items("attention_config")
    if value is None:
        return
    counted = 0
    is_for_all = False
    for item in value if isinstance(value, list) else [value]:
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and item[0]):
            example = '[[["global"], 12]] or [[["global"], "all"]]'
            yield Mistake(keys=("attention_config",), text=f"attention_config is {value!r}: give a list of [types, repeats], such as {example}.")
            return
        types, repeats = item[0], item[1]
        assert isinstance(types, list)
        for kind in dict.fromkeys(map(str, types)):
            if kind not in _DENSE_TYPES:
                text = f"attention_config holds {kind!r}, which is not offered: use global, with SepLLM's keys or sliding_window_width."
                yield Mistake(keys=("attention_config",), text=text)
        is_for_all = is_for_all or repeats == "all"
        counted += len(types) * repeats if isinstance(repeats, int) else 0
    layers = settings.need("num_layers", int)
    if counted != layers and not is_for_all:
        text = f'attention_config describes {counted} layers but num_layers is {layers}: make them equal, or write "all" for the number.'
        yield Mistake(keys=("attention_config", "num_layers"), text=text)


def _check_bipe(settings: Settings) -> Iterator[Mistake]:
    if not settings.get_or("USE_BiPE", False):
        return
    separators = settings.wholes("BiPE_seps") or ()
    if not separators or min(separators) < 0:
        yield Mistake(keys=("USE_BiPE", "BiPE_seps"), text="USE_BiPE is true and BiPE_seps lists no separator ids: list them, each 0 or more.")
    position = settings.get_or("pos_emb", "learned")
    if position not in ("rotary", "alibi"):
        yield Mistake(
            keys=("USE_BiPE", "pos_emb"), text=f"USE_BiPE is true and pos_emb is {position}: bilevel positions need pos_emb rotary or alibi."
        )
    if settings.get_or("rope_fusion", False):
        yield Mistake(keys=("USE_BiPE", "rope_fusion"), text="USE_BiPE and rope_fusion are both true: set rope_fusion to false.")
    for flag in ("USE_ORIGINAL_FULL_ATTEN", "streamingLLM"):
        if settings.get_or(flag, False):
            yield Mistake(
                keys=("USE_BiPE", flag), text=f"USE_BiPE and {flag} are both true, and SepLLM trains that without BiPE: set USE_BiPE to false."
            )


def _check_length(settings: Settings) -> Iterator[Mistake]:
    keys = ("train_iters", "train_epochs")
    given = [key for key in keys if settings.has(key)]
    if len(given) == 2:
        yield Mistake(keys=keys, text="train_iters and train_epochs are both given: give exactly one of them.")
    if not given:
        yield Mistake(keys=(), text="train_iters and train_epochs are both missing: give exactly one of them.")


def _check_saving(settings: Settings) -> Iterator[Mistake]:
    if settings.has("save") and not (settings.has("checkpoint_factor") or settings.has("extra_save_iters")):
        yield Mistake(keys=("save",), text="save is given without checkpoint_factor or extra_save_iters: say when to save with one of them.")
    if (
        settings.get_or("checkpoint_scale", "linear") == "log"
        and settings.has("checkpoint_factor")
        and settings.get_or("checkpoint_factor", 0.0) <= 1
    ):
        text = "checkpoint_factor is 1 and checkpoint_scale is log: its powers never grow; use 2 or more."
        yield Mistake(keys=("checkpoint_factor", "checkpoint_scale"), text=text)


def _check_schedule_policy(settings: Settings) -> Iterator[Mistake]:
    keys = ("override_lr_scheduler", "use_checkpoint_lr_scheduler")
    if all(settings.get_or(key, False) for key in keys):
        text = (
            "override_lr_scheduler and use_checkpoint_lr_scheduler are both true: on resuming, either this file or the checkpoint decides; keep one."
        )
        yield Mistake(keys=keys, text=text)


def _check_data_paths(settings: Settings) -> Iterator[Mistake]:
    keys = tuple(f"{split}_data_paths" for split in _SPLITS)
    given = [key for key in keys if settings.has(key)]
    if given and settings.has("data_path"):
        text = f"data_path and {given[0]} are both given: give one prefix that `split` cuts, or the three lists."
        yield Mistake(keys=("data_path", given[0]), text=text)
    missing = [key for key in keys if key not in given]
    if given and missing:
        yield Mistake(keys=tuple(given), text=f"{' and '.join(missing)} missing: {', '.join(keys)} are given all together or not at all.")


def _check_parallel_lists(settings: Settings) -> Iterator[Mistake]:
    """Weights and label files come one per data path."""
    for split in _SPLITS:
        paths = settings.items(f"{split}_data_paths")
        for key, what in {f"{split}_data_weights": "weight", f"{split}_label_data_paths": "label file"}.items():
            values = settings.items(key)
            if values is not None and len(values) != len(paths or []):
                text = f"{key} has {len(values)} entries but {split}_data_paths has {len(paths or [])}: give one {what} per path."
                yield Mistake(keys=(key, f"{split}_data_paths"), text=text)


def _check_weights(settings: Settings) -> Iterator[Mistake]:
    """A path that is listed is read."""
    if settings.get_or("weight_by_num_documents", False):
        return
    for split in _SPLITS:
        pairs = zip(settings.items(f"{split}_data_paths") or [], settings.items(f"{split}_data_weights") or [], strict=False)
        for path in [path for path, weight in pairs if weight == 0]:
            text = f"{split}_data_weights gives {path} no sample: leave it out of {split}_data_paths, or weigh it more."
            yield Mistake(keys=(f"{split}_data_weights",), text=text)


def _check_zero(settings: Settings) -> Iterator[Mistake]:
    stages, pipes = (settings.block("zero_optimization") or {}).get("stage", 0), settings.get_or("pipe_parallel_size", 0)
    keys = ("zero_optimization.stage", "pipe_parallel_size")
    if pipes > 1 and stages in (2, 3):
        text = f"zero_optimization.stage {stages} does not work with pipe_parallel_size {pipes}: use stage 1, or pipe_parallel_size 1."
        yield Mistake(keys=keys, text=text)


def _check_context_parallel(settings: Settings) -> Iterator[Mistake]:
    pieces = settings.get_or("context_parallel_size", 1)
    if pieces == 1:
        return
    if settings.get_or("pipe_parallel_size", 0) > 1:
        text = f"context_parallel_size ({pieces}) does not work with pipe_parallel_size above 1: use one of them, and model_parallel_size beside it."
        yield Mistake(keys=("context_parallel_size", "pipe_parallel_size"), text=text)
    length = settings.need("seq_length", int)
    if length % (2 * pieces):
        text = (
            f"seq_length ({length}) must be a multiple of 2 x context_parallel_size ({pieces}), because each device has two chunks of every "
            f"sample: use seq_length {-(-length // (2 * pieces)) * 2 * pieces}, or another number of devices."
        )
        yield Mistake(keys=("seq_length", "context_parallel_size"), text=text)


def _check_vocabulary(settings: Settings, config: Config) -> Iterator[Mistake]:
    size, padded = config.model.vocab_size, config.model.padded_vocab_size
    if size is not None and padded is not None and size > padded:
        text = (
            f"the tokenizer has {size} tokens but the model's vocabulary (padded_vocab_size) has {padded}: "
            "take padded_vocab_size out, or use the tokenizer that the model was made for."
        )
        yield Mistake(keys=("padded_vocab_size", "vocab_file"), text=text)
    limit = size if size is not None else padded
    if limit is None:
        return
    used = {
        "separator_token_ids": config.attention.prefill.separator_ids,
        "BiPE_seps": frozenset(config.model.bipe_separator_ids),
        "PADDING_ID": frozenset() if config.attention.prefill.padding_id is None else frozenset({config.attention.prefill.padding_id}),
    }
    for key, ids in used.items():
        beyond = sorted(token for token in ids if token >= limit)
        if beyond:
            text = f"{key} holds {', '.join(map(str, beyond))}, which the vocabulary of {limit} tokens lacks: give ids of this tokenizer."
            yield Mistake(keys=(key,), text=text)


def _check_padded_vocabulary(settings: Settings, config: Config) -> Iterator[Mistake]:
    padded, shards = config.model.padded_vocab_size, config.parallel.model_parallel_size
    if padded is not None and padded % shards:
        text = f"model_parallel_size ({shards}) must divide padded_vocab_size ({padded}): take padded_vocab_size out."
        yield Mistake(keys=("padded_vocab_size", "model_parallel_size"), text=text)


def _check_cross_entropy(settings: Settings, config: Config) -> Iterator[Mistake]:
    if config.model.fp16_lm_cross_entropy and config.precision.precision != "fp16":
        text = f"fp16_lm_cross_entropy is true and the precision is {config.precision.precision}: it needs fp16; set it to false."
        yield Mistake(keys=("fp16_lm_cross_entropy",), text=text)


def _check_accumulation(settings: Settings, config: Config) -> Iterator[Mistake]:
    given, summed, precision = asked_accumulation(config), accumulation_precision(config), config.precision.precision
    if summed is None:
        yield Mistake(keys=("data_types.grad_accum_dtype",), text=f"data_types.grad_accum_dtype is {given!r}: give fp32, fp16 or bf16.")
    elif summed != precision and config.parallel.zero_stage == 0:
        text = (
            f"data_types.grad_accum_dtype is {given} and the precision is {precision}: without ZeRO, DeepSpeed 0.19 sums gradients in the "
            "precision of the model only. Set zero_optimization.stage to 1, or take data_types.grad_accum_dtype out."
        )
        yield Mistake(keys=("data_types.grad_accum_dtype", "zero_optimization.stage"), text=text)


def _check_pipeline(settings: Settings, config: Config) -> Iterator[Mistake]:
    stages, method, precision = config.parallel.pipe_parallel_size, config.parallel.pipe_partition_method, config.precision.precision
    if stages <= 1:
        return
    if not (method in ("uniform", "parameters") or _finds_layers(method)):
        names = ", ".join(PIPELINE_LAYERS)
        text = f"pipe_partition_method is {method!r}: give uniform, parameters, or type: and a pattern that is found in one of {names}."
        yield Mistake(keys=("pipe_partition_method",), text=text)
    if precision != "fp32" and config.parallel.zero_stage == 0:
        text = (
            f"{precision} with pipe_parallel_size {stages} and no ZeRO: what DeepSpeed 0.19 saves of that optimizer it cannot load (bfloat16), or "
            "its gradient norm counts tied embeddings twice (fp16): set zero_optimization.stage to 1."
        )
        yield Mistake(keys=("pipe_parallel_size", "zero_optimization.stage"), text=text)
    block = config.deepspeed.get("pipeline")
    if isinstance(block, dict) and block:
        text = (
            f"pipeline.{next(iter(block))} steers DeepSpeed's own pipeline layers, which are not used: take the block out; checkpoint_activations is."
        )
        yield Mistake(keys=("pipeline",), text=text)


PIPELINE_LAYERS = ("EmbeddingPipe", "ParallelTransformerLayerPipe", "NormPipe", "ParallelLinearPipe")
"""What `pipe_partition_method` calls the layers: GPT-NeoX's names of its classes."""


def _finds_layers(method: str) -> bool:
    kind, _, pattern = method.partition(":")
    try:
        return kind.lower() == "type" and any(re.search(pattern, name, re.IGNORECASE) for name in PIPELINE_LAYERS)
    except re.error:
        return False


def _check_tensor_parallel(settings: Settings, config: Config) -> Iterator[Mistake]:
    parallel, model, shards = config.parallel, config.model, config.parallel.model_parallel_size
    if shards == 1:
        return
    if model.intermediate_size % shards:
        text = f"model_parallel_size ({shards}) must divide the width of the MLP ({model.intermediate_size}): change intermediate_size."
        yield Mistake(keys=("model_parallel_size", "intermediate_size"), text=text)
    pieces = shards * parallel.context_parallel_size
    if parallel.sequence_parallel and model.seq_length % pieces:
        text = f"sequence_parallel cuts seq_length ({model.seq_length}) into {pieces} pieces, which do not divide it: change seq_length."
        yield Mistake(keys=("sequence_parallel", "seq_length", "model_parallel_size"), text=text)
    if model.fp16_lm_cross_entropy:
        text = "fp16_lm_cross_entropy is true, and model_parallel_size above 1 computes the loss of a sharded vocabulary in fp32: set it to false."
        yield Mistake(keys=("fp16_lm_cross_entropy", "model_parallel_size"), text=text)
    if parallel.zero_stage == 3:
        text = (
            f"zero_optimization.stage 3 and model_parallel_size {shards}: nothing reads what ZeRO 3 saves of sharded weights. Use stage 2, or "
            "model_parallel_size 1."
        )
        yield Mistake(keys=("zero_optimization.stage", "model_parallel_size"), text=text)
    if parallel.zero_stage == 0 and config.precision.precision != "fp32":
        text = (
            f"{config.precision.precision} with model_parallel_size above 1 and no ZeRO clips by the norm of the first shard alone: set "
            "zero_optimization.stage to 1."
        )
        yield Mistake(keys=("model_parallel_size", "zero_optimization.stage"), text=text)
    has_own_dropout = model.attention_dropout > 0 or (model.hidden_dropout > 0 and parallel.sequence_parallel and not model.gpt_j_residual)
    if config.training.compile and has_own_dropout:
        text = (
            "compile cannot trace the random numbers that each shard draws for itself: set compile to false, or attention_dropout (and, with "
            "sequence_parallel and without gpt_j_residual, hidden_dropout) to 0."
        )
        yield Mistake(keys=("compile", "model_parallel_size"), text=text)


def _check_compile(settings: Settings, config: Config) -> Iterator[Mistake]:
    if config.training.compile and config.parallel.zero_stage == 3:
        text = "compile builds whole blocks, whose weights ZeRO stage 3 fetches in between: use stage 2, or set compile to false."
        yield Mistake(keys=("compile", "zero_optimization.stage"), text=text)
    if config.training.compile and config.training.recompute_granularity == "selective" and config.training.checkpoint_activations:
        text = "compile decides itself what a block keeps: set recompute_granularity to full, or compile to false."
        yield Mistake(keys=("compile", "recompute_granularity"), text=text)


def _check_core_of_pieces(settings: Settings, config: Config) -> Iterator[Mistake]:
    if config.parallel.context_parallel_size > 1 and config.attention.core == "sdpa":
        text = "core sdpa computes whole sequences only, and context_parallel_size above 1 cuts them: leave the core to auto."
        yield Mistake(keys=("core", "context_parallel_size"), text=text)


def _check_confirmed(settings: Settings, config: Config) -> Iterator[Mistake]:
    """Keys of saved configurations that repeat a result must agree with it."""
    for key, rule in KEYS.items():
        if isinstance(rule, Confirmed) and key in settings.values:
            given, result = settings.raw(key), getattr(getattr(config, rule.group), rule.field)
            if given != result and str(given).lower() != str(result).lower():
                text = f"{key} is {given} but the other keys and the devices make it {result}: take {key} out, or make them agree."
                yield Mistake(keys=(key,), text=text)


_SETTINGS_CHECKS: tuple[Callable[[Settings], Iterator[Mistake]], ...] = (
    _check_required,
    _check_heads,
    _check_kv_heads,
    _check_rotary,
    _check_positions,
    _check_layers,
    _check_gpt_j_tied,
    _check_attention_config,
    _check_bipe,
    _check_length,
    _check_saving,
    _check_schedule_policy,
    _check_data_paths,
    _check_parallel_lists,
    _check_weights,
    _check_zero,
    _check_context_parallel,
)
_CONFIG_CHECKS: tuple[Callable[[Settings, Config], Iterator[Mistake]], ...] = (
    _check_vocabulary,
    _check_padded_vocabulary,
    _check_cross_entropy,
    _check_accumulation,
    _check_pipeline,
    _check_tensor_parallel,
    _check_compile,
    _check_core_of_pieces,
    _check_confirmed,
)

"""An estimate of the memory of one device, by part. Arithmetic only; caching allocators, communication buffers and fragmentation come on top."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.keys import GATED_ACTIVATIONS
from megatron.config.schema import Config
from megatron.config.size import model_size

_MOMENTS = {"sgd": 0, "lion": 1, "muon": 1, "adagrad": 1}
"""fp32 numbers that an optimizer keeps for each parameter; those of the Adam family keep two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPart:
    name: str
    num_bytes: int
    reason: str


def memory_estimate(config: Config) -> tuple[MemoryPart, ...] | None:
    """What one device holds during a step. None: the vocabulary is not known, so the largest matrices are not either."""
    size = model_size(config.model)
    if size.total is None:
        return None
    parts = [*_state(config, -(-size.total // _model_shards(config))), _activations(config), _logits(config)]
    if config.attention.core == "dense":
        parts.append(
            MemoryPart(name="attention maps", num_bytes=dense_map_bytes(config) * _live_layers(config), reason="core dense keeps whole maps")
        )
    return tuple(parts)


def dense_map_bytes(config: Config) -> int:
    """What one layer's attention maps take where the dense core computes them: scores and fp32 weights, per head."""
    heads = config.model.num_attention_heads // config.parallel.model_parallel_size
    return config.batch.train_micro_batch_size_per_gpu * heads * config.model.seq_length**2 * (_width(config) + 4)


def _state(config: Config, parameters: int) -> list[MemoryPart]:
    stage, replicas = config.parallel.zero_stage, config.batch.data_parallel_size
    is_mixed = config.precision.precision != "fp32"
    momentum = config.optimizer.type == "sgd" and config.optimizer.momentum > 0
    moments = 1 if momentum else _MOMENTS.get(config.optimizer.type, 2)
    optimizer_bytes = 4 * (moments + is_mixed)
    what = f"{moments} fp32 moments of {config.optimizer.type}" + (", fp32 master weights" if is_mixed else "")
    return [
        _sharded("weights", parameters * _width(config), config.precision.precision, replicas if stage >= 3 else 1),
        _sharded("gradients", parameters * _width(config), config.precision.precision, replicas if stage >= 2 else 1),
        _sharded("optimizer", 0 if _is_offloaded(config) else parameters * optimizer_bytes, what, replicas if stage >= 1 else 1),
    ]


def _sharded(name: str, num_bytes: int, what: str, shards: int) -> MemoryPart:
    return MemoryPart(name=name, num_bytes=num_bytes // shards, reason=what + (f", shared by {shards} devices" if shards > 1 else ""))


def _activations(config: Config) -> MemoryPart:
    """Inputs of the blocks and what the backward pass of a block needs, of the layers that are live at once."""
    tokens = config.batch.train_micro_batch_size_per_gpu * config.model.seq_length
    layers = -(-config.model.num_layers // max(1, config.parallel.pipe_parallel_size))
    live = _live_layers(config)
    per_layer = tokens * _saved_numbers_per_token(config) * _width(config)
    inputs = tokens * config.model.hidden_size * _width(config)
    if not config.training.checkpoint_activations:
        return MemoryPart(name="activations", num_bytes=per_layer * layers, reason=f"{layers} layers")
    segments = -(-layers // config.training.checkpoint_num_layers)
    if config.training.recompute_granularity == "selective":
        kept = tokens * _kept_products_per_token(config) * _width(config)
        return MemoryPart(
            name="activations",
            num_bytes=inputs * segments + kept * layers + per_layer * live,
            reason=f"products and attention of {layers} layers, the rest of {live} recomputed at a time",
        )
    return MemoryPart(
        name="activations",
        num_bytes=inputs * segments + per_layer * live,
        reason=f"{segments} checkpointed inputs, {live} layers recomputed at a time",
    )


def _saved_numbers_per_token(config: Config) -> int:
    """Of one block: its input, the two normed inputs, q, k, v before and after rotation, attention's output, the MLP's inner activations."""
    model = config.model
    keys_and_values = 2 * model.num_kv_heads * (model.hidden_size // model.num_attention_heads)
    gated = model.activation in GATED_ACTIVATIONS
    inner = model.intermediate_size * (4 if gated else 2)
    sharded = 2 * model.hidden_size + 3 * keys_and_values // 2 + model.hidden_size + inner
    return 3 * model.hidden_size + sharded // config.parallel.model_parallel_size


def _kept_products_per_token(config: Config) -> int:
    """Of one block under selective recomputation: the results of its products with matrices and of attention."""
    model = config.model
    keys_and_values = 2 * model.num_kv_heads * (model.hidden_size // model.num_attention_heads)
    gated = model.activation in GATED_ACTIVATIONS
    sharded = 2 * model.hidden_size + keys_and_values + model.intermediate_size * (2 if gated else 1)
    return 2 * model.hidden_size + sharded // config.parallel.model_parallel_size


def _logits(config: Config) -> MemoryPart:
    tokens = config.batch.train_micro_batch_size_per_gpu * config.model.seq_length
    rows = (config.model.padded_vocab_size or 0) // config.parallel.model_parallel_size
    return MemoryPart(name="logits", num_bytes=tokens * rows * (_width(config) + 8), reason="with fp32 log-probabilities and their gradient")


def _live_layers(config: Config) -> int:
    """Layers whose inner activations exist at the same time."""
    layers = -(-config.model.num_layers // max(1, config.parallel.pipe_parallel_size))
    return min(layers, config.training.checkpoint_num_layers) if config.training.checkpoint_activations else layers


def _model_shards(config: Config) -> int:
    return config.parallel.model_parallel_size * max(1, config.parallel.pipe_parallel_size)


def _width(config: Config) -> int:
    """Bytes of a number in the precision of the run."""
    return 4 if config.precision.precision == "fp32" else 2


def _is_offloaded(config: Config) -> bool:
    block = config.parallel.zero_optimization
    return bool(block.get("offload_optimizer") or block.get("cpu_offload"))

"""An estimate of the memory of one device, by part: what DeepSpeed 0.19 and this project's layers keep, and when. Arithmetic only.

Caching allocators, fragmentation, NCCL's own buffers and the CUDA context come on top. docs/plan.md says what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.deepspeed import BUCKET, default_bucket
from megatron.config.keys import GATED_ACTIVATIONS
from megatron.config.schema import Config
from megatron.config.size import model_size

_MOMENTS = {"sgd": 0, "lion": 1, "adagrad": 1}
"""fp32 numbers that an optimizer keeps for each parameter; those of the Adam family keep two."""
_MAX_LIVE, _PREFETCH = 1_000_000_000, 50_000_000
"""DeepSpeed's defaults of max_live_parameters and prefetch_bucket_size, in numbers."""
FAR_SHARE = 0.25
"""Of the keys, that far columns are provided for: more than the separators of most texts."""

LOSS_CHUNK = 512
"""Tokens whose logits exist at once where the loss is computed in chunks, as in `sepllm.ops.linear_cross_entropy`."""

Moment = Literal["always", "passes", "loss", "backward", "update"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPart:
    name: str
    num_bytes: int
    reason: str
    moment: Moment = "always"
    """When it is there: through a whole step, through the forward and backward passes, or only while the loss, a layer's backward pass or
    the update is computed."""

    @property
    def text(self) -> str:
        return f"{self.name}: {self.reason}" + ("" if self.moment in ("always", "passes") else f" (only during the {self.moment})")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    parts: tuple[MemoryPart, ...]

    @property
    def total_bytes(self) -> int:
        """At the fullest moment."""
        return self._at("always") + max(self._at("passes") + max(self._at("loss"), self._at("backward")), self._at("update"))

    def _at(self, moment: Moment) -> int:
        return sum(part.num_bytes for part in self.parts if part.moment == moment)


def memory_estimate(config: Config) -> MemoryEstimate | None:
    """What the fullest device holds during a step. None: the vocabulary is not known, so the largest matrices are not either."""
    if model_size(config.model).total is None:
        return None
    stages = max(1, config.parallel.pipe_parallel_size)
    return max((_of_stage(config, stage) for stage in sorted({0, stages - 1})), key=lambda estimate: estimate.total_bytes)


def stage_parameters(config: Config, stage: int) -> int:
    """Parameters that one device of a pipeline stage computes with, the shards of ZeRO put together. Exact but for biases of row shards."""
    size, parallel = model_size(config.model), config.parallel
    assert size.word_embeddings is not None
    assert size.output_matrix is not None
    stages, shards = max(1, parallel.pipe_parallel_size), parallel.model_parallel_size
    layers = min(stage_layers(config), size.unique_layers)
    ends = (size.word_embeddings // shards + size.position_embeddings) if stage == 0 else 0
    if stage == stages - 1:
        tied_copy = size.word_embeddings if stage > 0 and not config.model.no_weight_tying else 0
        ends += (size.output_matrix + tied_copy) // shards + size.final_norm
    return layers * ((size.attention_per_layer + size.mlp_per_layer) // shards + size.norms_per_layer) + ends


def stage_layers(config: Config) -> int:
    """Layers of the fullest pipeline stage."""
    return -(-config.model.num_layers // max(1, config.parallel.pipe_parallel_size))


def dense_map_bytes(config: Config) -> int:
    """What one layer's attention maps take where the dense core computes them: scores and fp32 weights, per head."""
    heads = config.model.num_attention_heads // config.parallel.model_parallel_size
    pairs = config.model.seq_length**2 // config.parallel.context_parallel_size
    return config.batch.train_micro_batch_size_per_gpu * heads * pairs * (number_bytes(config) + 4)


def number_bytes(config: Config) -> int:
    """Bytes of a number in the precision of the run."""
    return 4 if config.precision.precision == "fp32" else 2


def gradient_shards(config: Config) -> int:
    """Devices that sum their gradients, over which ZeRO shards: replicas, and pieces of one sequence."""
    return config.batch.data_parallel_size * config.parallel.context_parallel_size


def reduce_bucket_size(config: Config) -> int:
    """Gradients that DeepSpeed reduces at once, in numbers."""
    return BUCKET if config.parallel.zero_stage == 0 else _zero_number(config, "reduce_bucket_size", default_bucket(config))


def live_parameters(config: Config, parameters: int) -> int:
    """How many parameters ZeRO 3 keeps gathered at once."""
    return min(parameters, _zero_number(config, "max_live_parameters", _MAX_LIVE))


def _zero_number(config: Config, member: str, default: int) -> int:
    """A size in the YAML's zero_optimization block, or DeepSpeed's default."""
    value = config.parallel.zero_optimization.get(member, config.parallel.zero_optimization.get(f"stage3_{member}", default))
    return int(value) if isinstance(value, int | float | str) else default


def _of_stage(config: Config, stage: int) -> MemoryEstimate:
    parameters = stage_parameters(config, stage)
    is_last = stage == max(1, config.parallel.pipe_parallel_size) - 1
    parts = [*_state(config, parameters), *_communication(config, parameters), *_activations(config, stage), *_attention(config)]
    return MemoryEstimate(parts=tuple([*parts, _logits(config)] if is_last else parts))


def _state(config: Config, parameters: int) -> list[MemoryPart]:
    stage, shards = config.parallel.zero_stage, gradient_shards(config)
    is_mixed = config.precision.precision != "fp32"
    has_masters = is_mixed or stage >= 1  # ZeRO copies its part of the weights into fp32, whatever they are in
    momentum = config.optimizer.type == "sgd" and config.optimizer.momentum > 0
    moments = 1 if momentum else _MOMENTS.get(config.optimizer.type, 2)
    what = f"{moments} fp32 moments of {config.optimizer.type}" + (", fp32 master weights" if has_masters else "")
    number = number_bytes(config)
    optimizer_bytes = 0 if _is_offloaded(config) else parameters * 4 * (moments + has_masters)
    parts = [
        _sharded("weights", parameters * number, config.precision.precision, shards if stage >= 3 else 1),
        _sharded("gradients", parameters * number, config.precision.precision, shards if stage >= 2 else 1),
        _sharded("optimizer", optimizer_bytes, what, shards if stage >= 1 else 1),
    ]
    if has_masters and not _is_offloaded(config):
        flat = parameters * (4 + (number if is_mixed else 0)) // (shards if stage >= 1 else 1)
        parts.append(MemoryPart(name="update", num_bytes=flat, reason="gradients of the own part in one piece, in fp32", moment="update"))
    return parts


def _sharded(name: str, num_bytes: int, what: str, shards: int) -> MemoryPart:
    return MemoryPart(name=name, num_bytes=num_bytes // shards, reason=what + (f", shared by {shards} devices" if shards > 1 else ""))


def _communication(config: Config, parameters: int) -> list[MemoryPart]:
    """What DeepSpeed sets aside to reduce gradients in, and under ZeRO 3 to gather weights in."""
    stage, number = config.parallel.zero_stage, number_bytes(config)
    block = config.parallel.zero_optimization
    if stage == 0:
        flat = min(parameters, reduce_bucket_size(config)) * number if gradient_shards(config) > 1 else 0
        return [MemoryPart(name="buffers", num_bytes=flat, reason="gradients in one piece, to be reduced", moment="update")]
    parts = []
    if block.get("contiguous_gradients", True):
        size, count = reduce_bucket_size(config), 2 if block.get("overlap_comm", stage == 3) else 1
        reason = f"{count} buckets of reduce_bucket_size ({size:,}) numbers"
        parts.append(MemoryPart(name="buffers", num_bytes=size * count * number, reason=reason, moment="passes"))
    if stage == 3 and gradient_shards(config) > 1:
        gathered = live_parameters(config, parameters)
        prefetched = min(_zero_number(config, "prefetch_bucket_size", _PREFETCH), parameters - gathered)
        num_bytes = (gathered + prefetched) * number
        parts.append(MemoryPart(name="gathered", num_bytes=num_bytes, reason="weights at work (max_live_parameters)", moment="passes"))
    return parts


def _activations(config: Config, stage: int) -> list[MemoryPart]:
    """What the backward pass needs: of every layer and micro-batch at once, or of checkpointed inputs and the layers computed again."""
    layers, stages = stage_layers(config), max(1, config.parallel.pipe_parallel_size)
    at_once = min(stages - stage, config.batch.gradient_accumulation_steps) if stages > 1 else 1
    of_batches = f", {at_once} micro-batches" if at_once > 1 else ""
    per_layer = _tokens(config) * _saved_bytes_per_token(config)
    if not config.training.checkpoint_activations:
        return [MemoryPart(name="activations", num_bytes=per_layer * layers * at_once, reason=f"{layers} layers{of_batches}", moment="passes")]
    live = min(layers, config.training.checkpoint_num_layers)
    segments = -(-layers // config.training.checkpoint_num_layers)
    kept = _tokens(config) * config.model.hidden_size * number_bytes(config) * segments // _sequence_shards(config)
    reason = f"{segments} checkpointed inputs{of_batches}"
    if config.training.recompute_granularity == "selective":
        kept += _tokens(config) * _kept_products_bytes_per_token(config) * layers
        reason = f"products and attention of {layers} layers{of_batches}"
    recomputed = per_layer * live + _tokens(config) * _working_bytes_per_token(config)
    return [
        MemoryPart(name="activations", num_bytes=kept * at_once, reason=reason, moment="passes"),
        MemoryPart(name="recomputed", num_bytes=recomputed, reason=f"{live} layers at a time, with gradients", moment="backward"),
    ]


def _saved_bytes_per_token(config: Config) -> int:
    """Of one block: its input, the two normed inputs, q, k, v before and after rotation, attention's output, the MLP's inner activations.

    The compiled operators of a CPU rotate in place.
    """
    model = config.model
    keys_and_values = _keys_and_values(config)
    rotated = 0 if config.runtime.device == "cpu" else model.hidden_size + keys_and_values // 2
    inner = model.intermediate_size * _kept_inner(model.activation)
    sharded = (2 * model.hidden_size + keys_and_values + rotated + inner) // config.parallel.model_parallel_size
    masks = 2 * model.hidden_size if model.hidden_dropout > 0 else 0
    return (3 * model.hidden_size * number_bytes(config) + masks) // _sequence_shards(config) + sharded * number_bytes(config)


def _kept_inner(activation: str) -> int:
    """Tensors of the MLP's width that a block keeps. The linear after a GELU computes it again."""
    if activation in GATED_ACTIVATIONS:
        return 4
    return 1 if activation in ("gelu", "gelu_tanh") else 2


def _kept_products_bytes_per_token(config: Config) -> int:
    """Of one block under selective recomputation: the results of its products with matrices and of attention."""
    model = config.model
    rows = model.intermediate_size * (2 if model.activation in GATED_ACTIVATIONS else 1)
    sharded = (2 * model.hidden_size + _keys_and_values(config) + rows) // config.parallel.model_parallel_size
    return (2 * model.hidden_size // _sequence_shards(config) + sharded) * number_bytes(config)


def _working_bytes_per_token(config: Config) -> int:
    """Gradients that exist at once while one block goes backward: of its output, of its input, and on both sides of the MLP's activation."""
    return (2 * config.model.hidden_size + 2 * config.model.intermediate_size // config.parallel.model_parallel_size) * number_bytes(config)


def _attention(config: Config) -> list[MemoryPart]:
    """Work space of the layers whose attention exists at once."""
    live = stage_layers(config)
    if config.training.checkpoint_activations:
        live = min(live, config.training.checkpoint_num_layers)
    if config.attention.core == "dense":
        return [MemoryPart(name="attention", num_bytes=dense_map_bytes(config) * live, reason="core dense keeps whole maps", moment="passes")]
    is_full = config.attention.prefill.is_full(config.model.seq_length)
    if is_full and config.parallel.context_parallel_size == 1:
        return []
    far = int(config.batch.train_micro_batch_size_per_gpu * config.model.seq_length * (1.0 if is_full else FAR_SHARE))
    keys = far * _keys_and_values(config) // config.parallel.model_parallel_size
    reason = "keys and values that were gathered, and their fp32 gradients, of one layer"
    return [MemoryPart(name="attention", num_bytes=keys * (number_bytes(config) + 4), reason=reason, moment="backward")]


def _logits(config: Config) -> MemoryPart:
    """On a CPU the compiled cross-entropy writes the gradient over the logits; torch's makes fp32 probabilities and their gradient."""
    rows = (config.model.padded_vocab_size or 0) // config.parallel.model_parallel_size
    if _has_chunked_loss(config):
        gradients = (_tokens(config) + rows) * config.model.hidden_size  # of hidden state and output matrix
        num_bytes = (min(_tokens(config), LOSS_CHUNK) * rows + gradients) * number_bytes(config)
        return MemoryPart(name="logits", num_bytes=num_bytes, reason=f"of {LOSS_CHUNK} tokens at a time, and gradients", moment="loss")
    extra, reason = (0, "their gradient in place") if config.runtime.device == "cpu" else (8, "with fp32 log-probabilities and their gradient")
    num_bytes = _tokens(config) * rows * (number_bytes(config) + extra)
    return MemoryPart(name="logits", num_bytes=num_bytes, reason=reason, moment="loss")


def _has_chunked_loss(config: Config) -> bool:
    """Whether the model computes its loss chunk by chunk: `GPTModel` in fp32, its output matrix whole."""
    parallel = config.parallel
    is_whole = parallel.model_parallel_size == 1 and parallel.pipe_parallel_size <= 1 and parallel.zero_stage < 3
    return is_whole and config.precision.precision == "fp32"


def _tokens(config: Config) -> int:
    """Of one micro-batch, on one device."""
    return config.batch.train_micro_batch_size_per_gpu * config.model.seq_length // config.parallel.context_parallel_size


def _keys_and_values(config: Config) -> int:
    """Numbers of one token's keys and values, over all heads."""
    return 2 * config.model.num_kv_heads * (config.model.hidden_size // config.model.num_attention_heads)


def _sequence_shards(config: Config) -> int:
    """Over how many devices the activations between sharded layers are spread."""
    return config.parallel.model_parallel_size if config.parallel.sequence_parallel else 1


def _is_offloaded(config: Config) -> bool:
    block = config.parallel.zero_optimization.get("offload_optimizer")
    return isinstance(block, dict) and block.get("device", "none") != "none"

"""What one device sends in a training step, by group of devices: which collectives, how often, how large.

Data parallel is what DeepSpeed 0.19 does, which is not always what the ZeRO paper (arXiv 1910.02054) needs; tensor parallel and sequences cut
between its shards are Megatron's (arXiv 1909.08053, 2205.05198); pieces of one sequence exchange what SepLLM reads, separators and windows.
Numbers that are summed once a step (norms, losses) are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron.config.schema import Config
from megatron.config.size import model_size
from megatron.launch.memory import gradient_shards, live_parameters, number_bytes, reduce_bucket_size, stage_layers, stage_parameters

_MATRICES = 4
"""Of a layer, which ZeRO 3 gathers one by one."""

Group = Literal["data", "tensor", "context", "pipe"]
Operation = Literal["all_reduce", "reduce", "reduce_scatter", "all_gather", "exchange", "send"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """One kind of message of one group, over a step."""

    group: Group
    operation: Operation
    what: str
    size: int
    """Devices that take part."""
    calls: float
    """In a step. ZeRO 3 gathers a part of its weights once more."""
    message_bytes: int
    """Of one call, the shards of all devices together; of an exchange, what a device receives."""
    stride: int
    """Ranks between two neighbours of the group."""
    pieces: int = 1
    """In which one call is sent, one after another."""

    @property
    def handed_bytes(self) -> float:
        """To the collectives in a step, whole tensors: what a counter in front of them sees."""
        return self.calls * self.message_bytes

    @property
    def sent_bytes(self) -> float:
        """By one device in a step, on the wire, by a ring."""
        others = (self.size - 1) / self.size
        return self.handed_bytes * {"all_reduce": 2 * others, "exchange": 1.0, "send": 1.0}.get(self.operation, others)


def step_traffic(config: Config, *, share: float) -> tuple[Traffic, ...]:
    """Everything that the busiest device sends in a step. ``share``: separators of the text."""
    return tuple(traffic for traffic in (*_data(config), *_tensor(config), *_context(config, share), *_pipe(config)) if traffic.handed_bytes > 0)


def exchanged_keys(*, length: int, pieces: int, window: int, share: float) -> float:
    """Keys that a piece of a sequence receives for one layer, on average: far ones of earlier text, and its neighbours.

    Piece p has chunk p of ``2 * pieces`` and the p-th from the end, so the far keys before its last chunk that are not its own come from others:
    ``3 (pieces - 1) / 2`` chunks on average. Windows reach ``window - 1`` keys back from two chunks, but for the first piece and for the
    last, whose chunks are neighbours.
    """
    chunk = length / (2 * pieces)
    far = share * 1.5 * (pieces - 1) * chunk
    neighbours = 2 * (pieces - 1) / pieces * min(window - 1, chunk)
    return min(far + (1 - share) * neighbours, 1.5 * (pieces - 1) * chunk)


def _data(config: Config) -> Iterator[Traffic]:
    """Gradients and weights, under each stage of ZeRO.

    0        one all-reduce of all gradients a step
    1        the same, and an all-gather of the weights that every device has updated its part of
    2        the same, with an all-reduce for every micro-batch
    3        for every micro-batch a reduce-scatter of the gradients and one or two all-gathers of the weights: those that do not
             fit into max_live_parameters are gathered again for the backward pass

    DeepSpeed reduces to the owners of the parts (`reduce`) only with `use_multi_rank_bucket_allreduce: false`.
    """
    devices, stage = gradient_shards(config), config.parallel.zero_stage
    if devices == 1:
        return
    parameters = max(stage_parameters(config, place) for place in {0, max(1, config.parallel.pipe_parallel_size) - 1})
    num_bytes, batches = parameters * number_bytes(config), config.batch.gradient_accumulation_steps
    buckets = -(-parameters // reduce_bucket_size(config))

    def traffic(operation: Operation, what: str, calls: float, pieces: int) -> Traffic:
        return Traffic(
            group="data",
            operation=operation,
            what=what,
            size=devices,
            calls=calls,
            message_bytes=num_bytes,
            stride=config.parallel.model_parallel_size,
            pieces=pieces,
        )

    if stage == 3:
        again = 1 - live_parameters(config, parameters) / parameters
        yield traffic("all_gather", "weights", batches * (1 + again), _MATRICES * stage_layers(config))
        yield traffic("reduce_scatter", "gradients", batches, buckets)
        return
    goes_to_owners = stage > 0 and not config.parallel.zero_optimization.get("use_multi_rank_bucket_allreduce", True)
    yield traffic("reduce" if goes_to_owners else "all_reduce", "gradients", batches if stage == 2 else 1, buckets)
    if stage > 0:
        yield traffic("all_gather", "weights", 1, 1)


def _tensor(config: Config) -> Iterator[Traffic]:
    """Activations between the sharded layers, for the layers of the fullest stage, and both ends of the model.

    A layer is entered twice (attention, MLP) and left once where both add to one residual, else twice. Entering sums the gradients
    backward, leaving sums the parts forward. With a sequence cut, entering gathers forward, and once more backward for the gradient of
    the weight, where it also scatters the sum; leaving scatters the sum forward and gathers backward. A checkpointed group runs forward
    again but for its last sum, which nothing needs.
    """
    parallel, shards = config.parallel, config.parallel.model_parallel_size
    if shards == 1:
        return
    layers, batches = stage_layers(config), config.batch.gradient_accumulation_steps
    training = config.training
    tokens = config.batch.train_micro_batch_size_per_gpu * config.model.seq_length // parallel.context_parallel_size
    hidden_bytes = tokens * config.model.hidden_size * number_bytes(config)
    enters, leaves = 2 * layers, (1 if config.model.gpt_j_residual else 2) * layers
    is_again = training.checkpoint_activations and training.recompute_granularity == "full"
    again = max(leaves - -(-layers // training.checkpoint_num_layers), 0) if is_again else 0

    def traffic(operation: Operation, what: str, calls: int, message_bytes: int = hidden_bytes) -> Traffic:
        return Traffic(group="tensor", operation=operation, what=what, size=shards, calls=calls * batches, message_bytes=message_bytes, stride=1)

    if parallel.sequence_parallel:
        gathered_again = enters if is_again else 0
        yield traffic("all_gather", "activations", enters + gathered_again + 1)
        yield traffic("all_gather", "activations and gradients, backward", enters + leaves + 2)
        yield traffic("reduce_scatter", "activations", leaves + again + 1)
        yield traffic("reduce_scatter", "gradients, backward", enters + 1)
        norms = layers * model_size(config.model).norms_per_layer + model_size(config.model).final_norm
        yield traffic("all_reduce", "gradients of norms", 1, norms * number_bytes(config))
    else:
        yield traffic("all_reduce", "activations", leaves + again + 1)
        yield traffic("all_reduce", "gradients, backward", enters + 1)
    yield traffic("all_reduce", "maxima and sums of the logits", 1, 12 * tokens)


def _context(config: Config, share: float) -> Iterator[Traffic]:
    """Keys and values forward, their gradients back, and forward again where the layer is computed again."""
    pieces, batches = config.parallel.context_parallel_size, config.batch.gradient_accumulation_steps
    if pieces == 1:
        return
    pattern, length, model = config.attention.prefill, config.model.seq_length, config.model
    key_numbers = 2 * model.num_kv_heads * (model.hidden_size // model.num_attention_heads) // config.parallel.model_parallel_size
    key_bytes = config.batch.train_micro_batch_size_per_gpu * key_numbers * number_bytes(config)
    passes = 3 if config.training.checkpoint_activations and config.training.recompute_granularity == "full" else 2
    windows = [pattern.windows[layer] for layer in range(model.num_layers) if not pattern.is_full(length, layer=layer)]
    stride = config.parallel.model_parallel_size
    full = model.num_layers - len(windows)

    def traffic(operation: Operation, what: str, calls: int, keys: float) -> Traffic:
        num_bytes = round(keys * key_bytes)
        return Traffic(group="context", operation=operation, what=what, size=pieces, calls=calls * batches, message_bytes=num_bytes, stride=stride)

    for window in dict.fromkeys(windows):
        far = (pattern.initial_tokens / length) + (share if pattern.separator_ids else 0.0)
        keys = exchanged_keys(length=length, pieces=pieces, window=window, share=min(far, 1.0))
        yield traffic("exchange", f"far keys and windows of {window}, and their gradients", passes * windows.count(window), keys)
    yield traffic("all_gather", "all keys and values of full layers", (passes - 1) * full, length)
    yield traffic("reduce_scatter", "their gradients", full, length)


def _pipe(config: Config) -> Iterator[Traffic]:
    """Activations to the next stage and gradients to the one before; a tied matrix is at both ends."""
    stages, model = config.parallel.pipe_parallel_size, config.model
    if stages <= 1:
        return
    tokens = config.batch.train_micro_batch_size_per_gpu * model.seq_length // config.parallel.context_parallel_size
    hidden_bytes = tokens * model.hidden_size * number_bytes(config)
    batches, stride = config.batch.gradient_accumulation_steps, config.runtime.world_size // stages
    calls, what = (2 * batches, "activations and gradients") if stages > 2 else (batches, "activations or gradients")
    yield Traffic(group="pipe", operation="send", what=what, size=stages, calls=calls, message_bytes=hidden_bytes, stride=stride)
    if not model.no_weight_tying and model.padded_vocab_size is not None:
        tied = model.padded_vocab_size * model.hidden_size * number_bytes(config) // config.parallel.model_parallel_size
        reach = stride * (stages - 1)
        yield Traffic(group="pipe", operation="all_reduce", what="gradient of the tied matrix", size=2, calls=1, message_bytes=tied, stride=reach)

"""How long a training step takes: a roofline for every product, bytes for everything else, rings for the messages. An estimate, never a measurement.

step = (micro-batches + stages - 1) x (products + attention + data movement + tensor and context messages of one micro-batch)
       + messages between stages + what of the gradients' reduction outlasts the backward pass it runs beside + gathering weights + update
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron.config.keys import GATED_ACTIVATIONS
from megatron.config.schema import Config
from megatron.launch.memory import MemoryEstimate, gradient_shards, memory_estimate, number_bytes, stage_layers, stage_parameters
from megatron.training.flops import step_flops
from tools.plan.communication import Traffic, step_traffic
from tools.plan.hardware import Hardware

UPDATE_BYTES = 30
"""Read and written for each parameter by AdamW on fp32 masters: weight, two moments, gradient, and the weight in half precision."""
LOGIT_BYTES = {"cuda": 36, "cpu": 12}
"""Read and written for each logit by torch's cross-entropy in fp32, forward and backward, and by the compiled one in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a step by what they go to, on the slowest pipeline stage."""

    products: float
    """Of matrices with activations, forward and backward."""
    attention: float
    movement: float
    """Norms, activations, residuals, the loss: what only moves data."""
    recompute: float
    launch: float
    """Waiting for Python and the driver to start what takes the device less time."""
    tensor: float
    """Waiting for messages of the tensor group."""
    context: float
    bubble: float
    """Waiting of pipeline stages while the pipeline fills and drains."""
    pipe: float
    data: float
    """Reducing gradients and gathering weights, as far as nothing else runs meanwhile."""
    update: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Of one layout of one run on one kind of device."""

    config: Config
    memory: MemoryEstimate
    traffic: tuple[Traffic, ...]
    time: StepTime
    mfu: float
    """Operations that the model needs (GPT-NeoX's count of the trainer, attention over the pairs that are computed) over the peak."""

    @property
    def tokens_per_s(self) -> float:
        return self.config.batch.train_batch_size * self.config.model.seq_length / self.time.total


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What the estimate has to know of the text."""

    share: float
    """Separators among the tokens."""
    kept_ratio: float
    """Pairs that the pattern keeps of such a text, of the causal ones."""


def estimate(config: Config, hardware: Hardware, text: Text) -> Estimate:
    memory = memory_estimate(config)
    assert memory is not None, "the vocabulary is known"
    traffic = step_traffic(config, share=text.share)
    time = step_time(config, hardware, text, traffic)
    flops = step_flops(config.model, samples=config.batch.train_batch_size, recomputes=False, kept_ratio=text.kept_ratio)
    mfu = flops / time.total / config.runtime.world_size / hardware.peak(config.precision.precision)
    return Estimate(config=config, memory=memory, traffic=traffic, time=time, mfu=mfu)


def step_time(config: Config, hardware: Hardware, text: Text, traffic: Sequence[Traffic]) -> StepTime:
    batches, stages = config.batch.gradient_accumulation_steps, max(1, config.parallel.pipe_parallel_size)
    layers, device = stage_layers(config), _Device(config, hardware)
    forward_products, attention = layers * device.layer_products(), layers * device.layer_attention(text.kept_ratio)
    movement = layers * device.layer_movement()
    forward = forward_products + attention + movement
    training = config.training
    is_full = training.checkpoint_activations and training.recompute_granularity == "full"
    again = forward if is_full else movement if training.checkpoint_activations else 0.0
    busy = {
        "products": 3 * (forward_products + device.output_product()),
        "attention": 3.5 * attention,  # forward has two products a pair, backward five
        "movement": 3 * movement + device.loss_movement(),
        "recompute": again,
    }
    busy["launch"] = max(0.0, (4 if is_full else 3) * (layers * hardware.launch_us * 1e-6 - forward))
    waits = {group: sum(message_s(t, hardware) for t in traffic if t.group == group) for group in ("tensor", "context", "pipe", "data")}
    busy |= {group: waits[group] / batches for group in ("tensor", "context")}
    return StepTime(
        **{part: seconds * batches for part, seconds in busy.items()},
        bubble=(stages - 1) * sum(busy.values()),
        pipe=waits["pipe"],
        data=_exposed(config, hardware, traffic, backward_s=sum(busy.values()) - forward),
        update=device.update(),
    )


def message_s(traffic: Traffic, hardware: Hardware) -> float:
    """Seconds of all calls of one kind of message, nothing else running.

    A group within a node has the node's links. A group over several has its members' network adapters together in each node, as the rings of
    NCCL share them; what goes from one to one has that of the sender. An all-reduce takes the steps of a tree up and down, the others those of
    a ring.
    """
    is_shared = traffic.operation not in ("send", "exchange")
    in_node = max(1, min(traffic.size, hardware.devices_per_node // traffic.stride)) if is_shared else 1
    is_within = traffic.stride * (traffic.size - 1) < hardware.devices_per_node
    speed = hardware.node_gb_s if is_within else min(hardware.node_gb_s, hardware.network_gb_s * in_node)
    hops = {"all_reduce": 2 * math.ceil(math.log2(traffic.size)), "send": 1}.get(traffic.operation, traffic.size - 1)
    slowest = 4 / 3 if traffic.operation == "exchange" else 1.0  # the first piece receives a third more far keys than the mean
    waiting = traffic.calls * traffic.pieces * hops * hardware.latency_us * 1e-6
    return slowest * traffic.sent_bytes / (speed * 1e9 * hardware.link_rate) + waiting


def _exposed(config: Config, hardware: Hardware, traffic: Sequence[Traffic], *, backward_s: float) -> float:
    """What of the data-parallel messages runs alone.

    With `overlap_comm`, ZeRO 1 reduces beside the last backward pass and ZeRO 2 and 3 beside every one; a pipeline reduces after all
    of them. Weights that were updated are gathered alone, those of ZeRO 3 beside the layers before.
    """
    parallel = config.parallel
    overlaps = bool(parallel.zero_optimization.get("overlap_comm", parallel.zero_stage == 3)) and parallel.zero_stage > 0
    passes = 0 if not overlaps or parallel.pipe_parallel_size > 1 else config.batch.gradient_accumulation_steps if parallel.zero_stage > 1 else 1
    hidden = sum(message_s(t, hardware) for t in traffic if t.group == "data" and (t.what == "gradients" or parallel.zero_stage == 3))
    alone = sum(message_s(t, hardware) for t in traffic if t.group == "data") - hidden
    return alone + max(0.0, hidden - passes * backward_s)


class _Device:
    """Seconds that parts of one micro-batch take on one device."""

    def __init__(self, config: Config, hardware: Hardware) -> None:
        self.config, self.hardware, self.model = config, hardware, config.model
        self.rows = config.batch.train_micro_batch_size_per_gpu
        self.tokens = self.rows * config.model.seq_length // config.parallel.context_parallel_size
        self.shards, self.number = config.parallel.model_parallel_size, number_bytes(config)
        self.peak = hardware.peak(config.precision.precision)

    def layer_products(self) -> float:
        """Forward."""
        model, width = self.model, self.model.hidden_size
        packed = width + 2 * model.num_kv_heads * (width // model.num_attention_heads)
        wide = model.intermediate_size * (2 if model.activation in GATED_ACTIVATIONS else 1)
        shapes = ((width, packed // self.shards), (width // self.shards, width), (width, wide // self.shards))
        return sum(self._product(*shape) for shape in (*shapes, (model.intermediate_size // self.shards, width)))

    def output_product(self) -> float:
        return self._product(self.model.hidden_size, (self.model.padded_vocab_size or 0) // self.shards)

    def layer_attention(self, kept_ratio: float) -> float:
        """Forward: two products a pair that is computed, or the bytes of queries, keys, values and results. Zig-zag pieces share pairs alike."""
        length, width = self.model.seq_length, self.model.hidden_size // self.shards
        pairs = self.rows * kept_ratio * length * (length + 1) / 2 / self.config.parallel.context_parallel_size
        return max(4 * pairs * width / (self.peak * self.hardware.attention_rate), self._moved(4 * self.tokens * width * self.number))

    def layer_movement(self) -> float:
        """Forward: norms read one and write two activations, rotation reads and writes q and k, the residual reads three and writes one; the
        MLP's activation reads and writes the wide one. Backward moves about twice as much."""
        cut = self.shards if self.config.parallel.sequence_parallel else 1
        numbers = 7 * self.model.hidden_size / cut + (4 * self.model.hidden_size + 2 * self.model.intermediate_size) / self.shards
        return self._moved(self.tokens * numbers * self.number)

    def loss_movement(self) -> float:
        rows = (self.model.padded_vocab_size or 0) // self.shards
        return self._moved(self.tokens * rows * LOGIT_BYTES[self.config.runtime.device])

    def update(self) -> float:
        stages = max(1, self.config.parallel.pipe_parallel_size)
        parameters = max(stage_parameters(self.config, stage) for stage in {0, stages - 1})
        shards = gradient_shards(self.config) if self.config.parallel.zero_stage > 0 else 1
        return self._moved(parameters * UPDATE_BYTES / shards)

    def _product(self, inner: int, columns: int) -> float:
        """``[tokens, inner] @ [inner, columns]``: computing or moving, whichever takes longer."""
        computing = 2 * self.tokens * inner * columns / (self.peak * self.hardware.matrix_rate)
        moved = (self.tokens * inner + inner * columns + self.tokens * columns) * self.number
        return max(computing, self._moved(moved))

    def _moved(self, num_bytes: float) -> float:
        return num_bytes / (self.hardware.memory_gb_s * 1e9 * self.hardware.memory_rate)

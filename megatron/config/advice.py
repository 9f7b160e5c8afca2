"""Things that are allowed and that the user should hear of."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.precision import accumulation_precision
from megatron.config.schema import BatchConfig, Config

_PYTHIA_BATCH = 1024
_PYTHIA_STEPS = 143000
_PYTHIA_SHAPES = {
    (6, 128, 4): "14m",
    (6, 256, 8): "31m",
    (6, 512, 8): "70m",
    (12, 768, 12): "160m",
    (24, 1024, 16): "410m",
    (16, 2048, 8): "1b",
    (24, 2048, 16): "1.4b",
    (24, 2048, 32): "1.4b with 32 heads (SepLLM's)",
    (32, 2560, 32): "2.8b",
    (32, 4096, 32): "6.9b",
    (36, 5120, 40): "12b",
}
"""(layers, width, heads) -> name."""


def advice(config: Config) -> Iterator[str]:
    """Notes on a configuration that resolves."""
    model = config.model
    shape = _PYTHIA_SHAPES.get((model.num_layers, model.hidden_size, model.num_attention_heads))
    if shape is not None and config.training.train_iters == _PYTHIA_STEPS and config.batch.train_batch_size != _PYTHIA_BATCH:
        yield _other_batch(config.batch, shape)
    if shape == "1b" and config.precision.precision == "fp16":
        yield "the published Pythia 1b was trained in bfloat16, although its file says fp16 (--set fp16.enabled=false --set precision=bfloat16)."
    if shape in ("6.9b", "12b") and model.init_method == "normal":
        yield f"init_method is normal: so was the published Pythia {shape}, whose file leaves it out, unlike those of the smaller sizes."
    padding_id = config.attention.prefill.padding_id
    if padding_id is not None:
        yield f"BATCH_ADAPTIVE_INIT_POS: the initial tokens of a row start after its leading run of PADDING_ID ({padding_id})."
    if config.logging.wall_clock_breakdown and config.parallel.pipe_parallel_size > 1:
        yield "wall_clock_breakdown: of a pipeline only the wait for data is timed, because DeepSpeed 0.19's engine fails with its timers on."
    if config.parallel.sequence_parallel and config.parallel.model_parallel_size == 1:
        yield "sequence_parallel has no effect where model_parallel_size is 1."
    if config.batch.gradient_accumulation_steps > 1 and accumulation_precision(config) == "bfloat16":
        yield _rounded_sums(config)


def _rounded_sums(config: Config) -> str:
    """That DeepSpeed sums in bf16, which it does at every ZeRO stage unless it is told otherwise, and how to tell it."""
    remedy = "set data_types.grad_accum_dtype to fp32" + (" and zero_optimization.stage to 1" if config.parallel.zero_stage == 0 else "")
    return (
        f"the gradients of {config.batch.gradient_accumulation_steps} micro-batches are summed in bf16, which rounds every sum to 8 bits: {remedy} "
        "to sum them in fp32."
    )


def _other_batch(batch: BatchConfig, shape: str) -> str:
    """That the learning rate of the published runs belongs to another batch, and how to get that batch."""
    unit = batch.train_micro_batch_size_per_gpu * batch.data_parallel_size
    remedy = f"set gradient_accumulation_steps to {_PYTHIA_BATCH // unit}" if _PYTHIA_BATCH % unit == 0 else "change the micro-batch or the devices"
    return (
        f"train_batch_size resolves to {batch.train_batch_size} = {batch.train_micro_batch_size_per_gpu} x {batch.gradient_accumulation_steps} x "
        f"{batch.data_parallel_size} devices; the published runs of Pythia {shape} have {_PYTHIA_BATCH}: {remedy}."
    )

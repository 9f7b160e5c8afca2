"""What `deepspeed.initialize(config=...)` gets. The optimizer and the schedule are ours and handed over as objects."""

from __future__ import annotations

from megatron.config.schema import Config, PrecisionConfig
from megatron.config.size import model_size

BUCKET = 500_000_000
"""DeepSpeed's own default of reduce_bucket_size, in numbers."""


def deepspeed_config(config: Config) -> dict[str, object]:
    """DeepSpeed's configuration of this run: batch, clipping, ZeRO, precision, printing, and what passes through."""
    is_pipeline = config.parallel.pipe_parallel_size > 1  # whose timers DeepSpeed 0.19 starts twice, and fails
    own: dict[str, object] = {
        "train_batch_size": config.batch.train_batch_size * config.parallel.context_parallel_size,  # pieces count as data-parallel devices there
        "train_micro_batch_size_per_gpu": config.batch.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": config.batch.gradient_accumulation_steps,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "steps_per_print": config.logging.steps_per_print,
        "wall_clock_breakdown": config.logging.wall_clock_breakdown and not is_pipeline,
        "zero_optimization": _zero(config),
    }
    if config.precision.fp32_allreduce:
        own["communication_data_type"] = "fp32"
    if is_pipeline:
        # Every tensor-parallel rank sends its own hidden states on: DeepSpeed's cutting and gathering takes them to be equal.
        own["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    passed_on = {key: value for key, value in config.deepspeed.items() if key not in ("fp16", "bf16")}
    precision = {name: {**block, **_members(config, name)} for name, block in _precision(config.precision).items()}
    return own | passed_on | precision | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def default_bucket(config: Config) -> int:
    """reduce_bucket_size where the YAML has none, in numbers: ZeRO allocates its buckets whole, and none needs to be larger than the model."""
    return min(BUCKET, model_size(config.model).total or BUCKET)


def _zero(config: Config) -> dict[str, object]:
    bucket = {"reduce_bucket_size": default_bucket(config)} if config.parallel.zero_stage else {}
    return {**bucket, **config.parallel.zero_optimization, "stage": config.parallel.zero_stage}


def _members(config: Config, name: str) -> dict[str, object]:
    block = config.deepspeed.get(name)
    return dict(block) if isinstance(block, dict) else {}


def _precision(precision: PrecisionConfig) -> dict[str, dict[str, object]]:
    """The one block that is on, with DeepSpeed's own members only: it refuses any other."""
    if precision.precision == "bfloat16":
        return {"bf16": {"enabled": True}}
    if precision.precision == "fp32":
        return {}
    return {
        "fp16": {
            "enabled": True,
            "loss_scale": precision.loss_scale,
            "loss_scale_window": precision.loss_scale_window,
            "initial_scale_power": precision.initial_scale_power,
            "hysteresis": precision.hysteresis,
            "min_loss_scale": int(precision.min_loss_scale),
        }
    }

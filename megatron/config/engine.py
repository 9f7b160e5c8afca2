"""What concerns DeepSpeed: the ZeRO block, blocks that pass through, and the launcher's keys."""

from __future__ import annotations

from pydantic import JsonValue

from megatron.config.keys import DEEPSPEED_BLOCKS, KEYS, Refused, nearest
from megatron.config.precision import BF16_PASSED_ON, FP16_PASSED_ON
from megatron.config.schema import LaunchConfig, ParallelConfig
from megatron.config.settings import Mistake, Settings, copied, copied_keys
from megatron.config.values import words

_ZERO_MEMBERS = frozenset(
    words(
        "stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions "
        "allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights elastic_checkpoint offload_param offload_optimizer zenflow "
        "sub_group_size prefetch_bucket_size stage3_prefetch_bucket_size param_persistence_threshold stage3_param_persistence_threshold "
        "model_persistence_threshold stage3_model_persistence_threshold max_live_parameters stage3_max_live_parameters max_reuse_distance "
        "stage3_max_reuse_distance gather_16bit_weights_on_model_save stage3_gather_16bit_weights_on_model_save module_granularity_threshold "
        "stage3_module_granularity_threshold use_all_reduce_for_fetch_params stage3_use_all_reduce_for_fetch_params allgather_sequential "
        "stage3_allgather_sequential ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment zero_hpz_partition_size "
        "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear "
        "pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks "
        "save_muon_momentum_buffer_in_memory leaf_module"
    )
)
_ZERO_OLD = {
    "cpu_offload": "offload_optimizer",
    "cpu_offload_params": "offload_param",
    "cpu_offload_param": "offload_param",
    "cpu_offload_use_pin_memory": None,
    "stage3_gather_fp16_weights_on_model_save": "gather_16bit_weights_on_model_save",
}
"""Members that DeepSpeed has renamed. None: dropped (it only tuned an offload)."""


def resolve_parallel(settings: Settings) -> ParallelConfig:
    """How the run is split over devices, with ZeRO's members under the names DeepSpeed has today."""
    block = dict(settings.block("zero_optimization") or {})
    settings.check_members("zero_optimization", block, (*sorted(_ZERO_MEMBERS), *_ZERO_OLD))
    for old, new in _ZERO_OLD.items():
        value = block.pop(old, None)
        if new is not None and value is not None and value is not False and new not in block:
            block[new] = {"device": "cpu"} if new.startswith("offload") else value
    stage = block.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise settings.fail(["zero_optimization.stage"], f"zero_optimization.stage is {stage!r}: give 0, 1, 2 or 3.")
    return copied(settings, ParallelConfig, zero_stage=stage, zero_optimization=block)


def resolve_engine(settings: Settings) -> dict[str, JsonValue]:
    """What passes through to DeepSpeed as it is."""
    engine = {key: settings.raw(key) for key, _ in copied_keys("deepspeed") if settings.has(key)}
    checkpointing = _activation_checkpointing(settings)
    if checkpointing:
        engine["activation_checkpointing"] = {**checkpointing, **(settings.block("activation_checkpointing") or {})}
    for name, members in {"fp16": FP16_PASSED_ON, "bf16": BF16_PASSED_ON}.items():
        passed_on = {member: value for member, value in (settings.block(name) or {}).items() if member in members}
        engine |= {name: passed_on} if passed_on else {}
    extra = settings.block("deepspeed_extra_args") or {}
    for member in extra:
        _check_extra(settings, member)
    return engine | extra


def _activation_checkpointing(settings: Settings) -> dict[str, JsonValue]:
    names = {
        "partition_activations": "partition_activations",
        "contiguous_checkpointing": "contiguous_memory_optimization",
        "checkpoint_in_cpu": "cpu_checkpointing",
        "synchronize_each_layer": "synchronize_checkpoint_boundary",
        "profile_backward": "profile",
    }
    return {name: settings.raw(key) for key, name in names.items() if settings.has(key)}


def _check_extra(settings: Settings, member: str) -> None:
    rule, key = KEYS.get(member), f"deepspeed_extra_args.{member}"
    if member in DEEPSPEED_BLOCKS:
        return
    if isinstance(rule, Refused):
        text = f"{key}: {rule.reason}."
    elif rule is not None:
        text = f"{key} is a key of its own: set {member} at the top level of the YAML."
    else:
        close = nearest(member, sorted(DEEPSPEED_BLOCKS))
        text = f"unknown member {key}: " + (f"did you mean {close}?" if close is not None else "DeepSpeed knows no such block.")
    settings.report(Mistake(keys=(key,), text=text))


def resolve_launch(settings: Settings) -> LaunchConfig:
    """The launcher's keys; slurm's account and comment become arguments of srun."""
    arguments = [settings.get_or("launcher_args", "")]
    arguments += [f"--{key}={settings.raw(key)}" for key in ("account", "comment") if settings.has(key)]
    if len(arguments) > 1 and settings.get_or("launcher", "pdsh") != "slurm":
        text = "account and comment are options of slurm's srun: set launcher to slurm, or take them out."
        raise settings.fail(["account", "comment"], text)
    return copied(settings, LaunchConfig, launcher_args=" ".join(argument for argument in arguments if argument))

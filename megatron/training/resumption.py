"""What a run takes over from the checkpoint it loads, by its load settings; refused where the two do not fit."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.schema import Config, ScheduleConfig
from megatron.training.manifest import Found, Manifest, SavedSchedule, Shape
from megatron.training.progress import Progress

ZERO_KINDS = ("none", "partitioned", "partitioned", "scattered")
"""How optimizer state is kept, by ZeRO stage; stages 1 and 2 write the same files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """What a run takes over from the checkpoint it loads."""

    schedule: ScheduleConfig
    progress: Progress = Progress()
    takes_optimizer: bool = False
    is_rearranged: bool = False
    """The optimizer's state was saved by a run that was spread over processes otherwise."""
    takes_random_state: bool = False
    wandb_run_id: str | None = None


def resumption(found: Found | None, config: Config, *, data_parallel_size: int) -> Resumption:
    """What to take over, by the table of load settings; raises a sentence where the checkpoint does not fit the run."""
    checkpoint = config.checkpoint
    if found is None:
        return Resumption(schedule=config.schedule)
    takes_optimizer = not (checkpoint.finetune or checkpoint.no_load_optim)
    if found.manifest is None:
        return _foreign_resumption(found, config, takes_optimizer=takes_optimizer)
    manifest = found.manifest
    _check_shape(manifest.shape, Shape.of(config), found, is_finetune=checkpoint.finetune)
    if checkpoint.finetune:
        return Resumption(schedule=config.schedule)
    schedule, progress = config.schedule, manifest.progress
    if takes_optimizer:
        _check_precision(manifest, config, found)
        if config.training.train_iters != 0:
            schedule = _resumed_schedule(manifest.schedule, config.schedule, found)
    else:
        progress = progress.model_copy(update={"applied_steps": 0})
    return Resumption(
        progress=progress,
        schedule=schedule,
        takes_optimizer=takes_optimizer,
        is_rearranged=takes_optimizer and _is_spread_otherwise(manifest, config, data_parallel_size=data_parallel_size),
        takes_random_state=not checkpoint.no_load_rng and _model_sizes(manifest) == _own_model_sizes(config),
        wandb_run_id=manifest.wandb_run_id,
    )


def _check_shape(saved: Shape, here: Shape, found: Found, *, is_finetune: bool) -> None:
    """A finetuning run may have another tokenizer class and longer positions; strict loading of the weights judges the latter. Any run may
    cut its weights otherwise, and pad the vocabulary accordingly."""
    ignored = {"tokenizer_type", "max_position_embeddings", "make_vocab_size_divisible_by", "vocab_size"} if is_finetune else set()
    ignored |= {"model_parallel_size", "padded_vocab_size"}
    differing = [name for name in Shape.model_fields if name not in ignored and getattr(saved, name) != getattr(here, name)]
    if differing:
        sentences = [f"{name} is {getattr(saved, name)} in the checkpoint and {getattr(here, name)} in the configuration" for name in differing]
        raise ValueError(f"The checkpoint {found.folder} is of another shape: {'; '.join(sentences)}. Load it with its own configuration.")


def _is_spread_otherwise(manifest: Manifest, config: Config, *, data_parallel_size: int) -> bool:
    """Whether DeepSpeed's own loading does not fit: another kind of optimizer, or one that is cut otherwise."""
    stages = manifest.zero_stage, config.parallel.zero_stage
    is_cut_by_data = max(stages) > 0 and manifest.data_parallel_size != data_parallel_size
    method, own_method = manifest.pipe_partition_method, config.parallel.pipe_partition_method
    is_cut_by_model = (
        _model_sizes(manifest) != _own_model_sizes(config)
        or manifest.shape.padded_vocab_size != config.model.padded_vocab_size
        or (manifest.pipe_parallel_size > 1 and method is not None and method != own_method)
    )
    return ZERO_KINDS[stages[0]] != ZERO_KINDS[stages[1]] or is_cut_by_data or is_cut_by_model


def _model_sizes(manifest: Manifest) -> tuple[int, int]:
    """Shards and stages of the run that saved. With others, a generator's state would come to a process that must not draw like that one."""
    return manifest.shape.model_parallel_size, max(1, manifest.pipe_parallel_size)


def _own_model_sizes(config: Config) -> tuple[int, int]:
    return config.parallel.model_parallel_size, max(1, config.parallel.pipe_parallel_size)


def _check_precision(manifest: Manifest, config: Config, found: Found) -> None:
    if manifest.precision != config.precision.precision:
        raise ValueError(
            f"The optimizer state of {found.folder} does not fit this run: precision {manifest.precision} in the checkpoint and "
            f"{config.precision.precision} in the configuration. Go on with the same precision, or take the weights only (no_load_optim: true)."
        )


def _resumed_schedule(saved: SavedSchedule, config: ScheduleConfig, found: Found) -> ScheduleConfig:
    """The schedule to go on with: both agree, or a key says which wins."""
    here = SavedSchedule.of(config, applied_steps=saved.num_iters)
    keys = {
        "start_lr": "lr",
        "min_lr": "min_lr",
        "decay_style": "lr_decay_style",
        "end_iter": "lr_decay_iters",
        "warmup": "warmup",
        "lr_schedule_version": "lr_schedule_version",
    }
    differing = [name for name in keys if getattr(saved, name) != getattr(here, name)]
    if not differing or config.override_lr_scheduler:
        return config
    if config.use_checkpoint_lr_scheduler:
        return ScheduleConfig.model_validate(config.model_dump() | {keys[name]: getattr(saved, name) for name in keys})
    sentences = [f"{keys[name]} was {getattr(saved, name)} and is now {getattr(here, name)}" for name in differing]
    raise ValueError(
        f"The learning-rate schedule of {found.folder} differs from the configuration's: {'; '.join(sentences)}. Set override_lr_scheduler: true "
        "to go on with the configuration's, or use_checkpoint_lr_scheduler: true to keep the checkpoint's. (lr_decay_iters follows train_iters "
        "unless it is given.)"
    )


def _foreign_resumption(found: Found, config: Config, *, takes_optimizer: bool) -> Resumption:
    if takes_optimizer:
        raise ValueError(
            f"{found.folder} was written by another program, whose optimizer state is not read: take the weights only, from iteration 0 "
            "(finetune: true) or from the checkpoint's iteration on (no_load_optim: true)."
        )
    progress = Progress()
    if not config.checkpoint.finetune:
        progress = Progress(iteration=found.iteration, consumed_samples=found.iteration * config.batch.train_batch_size)
    return Resumption(schedule=config.schedule, progress=progress)

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
    _check_shape(manifest.shape, Shape.of(config), found, is_finetune=checkpoint.finetune, takes_optimizer=takes_optimizer)
    if checkpoint.finetune:
        return Resumption(schedule=config.schedule)
    schedule, progress = config.schedule, manifest.progress
    if takes_optimizer:
        _check_layout(manifest, config, found, data_parallel_size=data_parallel_size)
        schedule = _resumed_schedule(manifest.schedule, config.schedule, found)
    else:
        progress = progress.model_copy(update={"applied_steps": 0})
    return Resumption(
        progress=progress,
        schedule=schedule,
        takes_optimizer=takes_optimizer,
        takes_random_state=not checkpoint.no_load_rng,
        wandb_run_id=manifest.wandb_run_id,
    )


def _check_shape(saved: Shape, here: Shape, found: Found, *, is_finetune: bool, takes_optimizer: bool) -> None:
    """A finetuning run may have another tokenizer class and longer positions; strict loading of the weights judges the latter. Weights
    without their optimizer may be cut otherwise, and the vocabulary padded accordingly."""
    ignored = {"tokenizer_type", "max_position_embeddings", "make_vocab_size_divisible_by", "vocab_size"} if is_finetune else set()
    ignored |= set() if takes_optimizer else {"model_parallel_size", "padded_vocab_size"}
    differing = [name for name in Shape.model_fields if name not in ignored and getattr(saved, name) != getattr(here, name)]
    if differing:
        sentences = [f"{name} is {getattr(saved, name)} in the checkpoint and {getattr(here, name)} in the configuration" for name in differing]
        raise ValueError(f"The checkpoint {found.folder} is of another shape: {'; '.join(sentences)}. Load it with its own configuration.")


def _check_layout(manifest: Manifest, config: Config, found: Found, *, data_parallel_size: int) -> None:
    """Optimizer state goes back only into the same kind of optimizer, cut the same way."""
    differing = []
    if ZERO_KINDS[manifest.zero_stage] != ZERO_KINDS[config.parallel.zero_stage]:
        differing.append(f"ZeRO stage {manifest.zero_stage} in the checkpoint and {config.parallel.zero_stage} in the configuration")
    elif manifest.zero_stage > 0 and manifest.data_parallel_size != data_parallel_size:
        differing.append(f"{manifest.data_parallel_size} data-parallel replicas in the checkpoint and {data_parallel_size} now")
    if manifest.precision != config.precision.precision:
        differing.append(f"precision {manifest.precision} in the checkpoint and {config.precision.precision} in the configuration")
    if differing:
        raise ValueError(
            f"The optimizer state of {found.folder} does not fit this run: {'; '.join(differing)}. Go on with the same settings, or take "
            "the weights only (no_load_optim: true)."
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

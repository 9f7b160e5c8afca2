"""Checkpoint folders in GPT-NeoX's layout, written so that an interrupted save is never taken for a finished one.

<save>/latest                     the newest finished folder's name
<save>/global_stepN/
  saving                          present while the folder is being filled
  mp_rank_*, *_optim_states.pt    DeepSpeed's files
  configs/                        the user's YAML texts, and overrides.json: what the command line changed
  random_states.pt                every process's generators
  complete.json                   the manifest, written when all processes are done
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from megatron.config.schema import CheckpointConfig, Config, ModelConfig, ScheduleConfig
from megatron.model.gpt import GPTModel
from megatron.optim.schedule import LearningRate
from megatron.parallel.collectives import barrier, gather_objects
from megatron.parallel.mesh import Mesh
from megatron.training.cadence import iterations_to_delete
from megatron.training.progress import Progress
from megatron.training.random_state import RandomState, random_state, set_random_state
from megatron.training.validation import LOGITS, validation_logits
from megatron.training.weights import OVERRIDES, load_into, read_weights

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MANIFEST = "complete.json"
SAVING = "saving"
RANDOM_STATES = "random_states.pt"
ZERO_KINDS = ("none", "partitioned", "partitioned", "scattered")
"""How optimizer state is kept, by ZeRO stage; stages 1 and 2 write the same files."""


class Shape(BaseModel):
    """What must agree between a checkpoint and the run that loads it. The first eight are those GPT-NeoX compares."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    max_position_embeddings: int
    make_vocab_size_divisible_by: int
    padded_vocab_size: int | None
    tokenizer_type: str
    model_parallel_size: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int | None

    @classmethod
    def of(cls, config: Config) -> Shape:
        """The shape of this run."""
        model = config.model.model_dump(include=set(cls.model_fields))
        return cls(**model, tokenizer_type=config.tokenizer.tokenizer_type, model_parallel_size=config.parallel.model_parallel_size)


class SavedSchedule(BaseModel):
    """A learning-rate schedule under the names GPT-NeoX stores, and two more that it leaves to the configuration."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    start_lr: float
    warmup_iter: float
    num_iters: int
    """Applied steps so far."""
    decay_style: str
    end_iter: int
    min_lr: float
    warmup: float
    lr_schedule_version: str

    @classmethod
    def of(cls, config: ScheduleConfig, *, applied_steps: int) -> SavedSchedule:
        """The schedule of this run, now."""
        return cls(
            start_lr=config.lr,
            warmup_iter=LearningRate(config).warmup_steps,
            num_iters=applied_steps,
            decay_style=config.lr_decay_style,
            end_iter=config.lr_decay_iters,
            min_lr=config.min_lr,
            warmup=config.warmup,
            lr_schedule_version=config.lr_schedule_version,
        )


class Manifest(BaseModel):
    """What a run knows of a finished checkpoint before it reads any weights."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int = 1
    progress: Progress
    shape: Shape
    schedule: SavedSchedule
    world_size: int
    data_parallel_size: int
    pipe_parallel_size: int
    zero_stage: int
    precision: str
    wandb_run_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A finished checkpoint on disk."""

    folder: Path
    iteration: int
    manifest: Manifest | None
    """None: another program wrote it (GPT-NeoX, Pythia, SepLLM's fork)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """What a run takes over from the checkpoint it loads."""

    schedule: ScheduleConfig
    progress: Progress = Progress()
    takes_optimizer: bool = False
    takes_random_state: bool = False
    wandb_run_id: str | None = None


def check_save_path(save: str | None) -> None:
    """Raises a sentence unless checkpoints can be written below ``save``. Takes the first write's failure before any training."""
    if save is None:
        return
    probe = Path(save) / f".write-test-{os.getpid()}"
    try:
        Path(save).mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as failure:
        raise ValueError(f"save ({save}) cannot be written: {failure.strerror}. Give a folder that this user may write to.") from failure


def find_checkpoint(config: CheckpointConfig) -> Found | None:
    """The finished checkpoint to load: that of ``iteration``, else the one ``latest`` names, else the newest.

    None where nothing is to be loaded, or nothing is there and ``allow_fresh_start`` says that this is fine.
    """
    if config.load is None:
        return None
    root = Path(config.load)
    available = finished_iterations(root)
    if config.iteration is not None:
        if config.iteration not in available:
            raise ValueError(f"load ({root}) has no finished checkpoint of iteration {config.iteration}; it has {_listed(available)}.")
        return _found(root, config.iteration)
    if not available:
        if config.allow_fresh_start:
            return None
        raise ValueError(
            f"load ({root}) holds no finished checkpoint: correct the path, or leave load out, or set allow_fresh_start: true "
            "to begin from nothing where there is none."
        )
    named = _iteration_of((root / "latest").read_text().strip()) if (root / "latest").is_file() else None
    return _found(root, named if named in available and named is not None else available[-1])


def finished_iterations(root: Path) -> list[int]:
    """Iterations of the finished checkpoints below ``root``, ascending."""
    folders = [folder for folder in root.glob("global_step*") if folder.is_dir()] if root.is_dir() else []
    iterations = [iteration for folder in folders if _is_finished(folder) and (iteration := _iteration_of(folder.name)) is not None]
    return sorted(iterations)


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


def save_checkpoint(
    engine: DeepSpeedEngine, config: Config, mesh: Mesh, *, progress: Progress, schedule: ScheduleConfig, wandb_run_id: str | None
) -> Path:
    """Writes ``<save>/global_stepN``, then names it in ``latest``, then deletes what is no longer to be kept. Returns the folder.

    All processes call this together.
    """
    assert config.checkpoint.save is not None
    root = Path(config.checkpoint.save)
    folder = root / f"global_step{progress.iteration}"
    logits = validation_logits(engine, config, mesh) if config.checkpoint.checkpoint_validation_with_forward_pass else None
    saved_schedule = SavedSchedule.of(schedule, applied_steps=progress.applied_steps)
    states = gather_objects(random_state(mesh.device), mesh)
    if mesh.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SAVING).touch()
        (folder / MANIFEST).unlink(missing_ok=True)
    barrier(mesh)
    client_state = {
        "iteration": progress.iteration,
        "consumed_samples": progress.consumed_samples,
        "args": Shape.of(config).model_dump(),
        "lr_scheduler": saved_schedule.model_dump(),
    }
    engine.save_checkpoint(str(root), tag=folder.name, client_state=client_state, save_latest=False)
    barrier(mesh)
    if mesh.is_first:
        _write_configs(folder, config)
        if not config.checkpoint.no_save_rng:
            torch.save(states, folder / RANDOM_STATES)
        if logits is not None:
            torch.save(logits, folder / LOGITS)
        manifest = Manifest(
            progress=progress,
            shape=Shape.of(config),
            schedule=saved_schedule,
            world_size=mesh.world_size,
            data_parallel_size=mesh.data_parallel_size,
            pipe_parallel_size=config.parallel.pipe_parallel_size,
            zero_stage=config.parallel.zero_stage,
            precision=config.precision.precision,
            wandb_run_id=wandb_run_id,
        )
        write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=1))
        (folder / SAVING).unlink()
        write_atomically(root / "latest", folder.name)
        _prune(root, config.checkpoint)
    barrier(mesh)
    return folder


def load_weights(model: GPTModel, found: Found) -> None:
    """The checkpoint's weights, of any layout, into a model that no engine has taken over yet."""
    load_into(model, weights_of(found, model.config), source=found.folder)


def weights_of(found: Found, model: ModelConfig) -> dict[str, Tensor]:
    """The weights of a finished checkpoint by name. What ZeRO 3 scattered is gathered by DeepSpeed, which unpickles freely, as it does
    whenever it resumes a run."""
    is_scattered = found.manifest is not None and found.manifest.zero_stage == 3
    return read_weights(found.folder, model=model, trust=is_scattered).state


def load_training_state(engine: DeepSpeedEngine, found: Found) -> None:
    """Weights, optimizer state and DeepSpeed's counters of a checkpoint that this program wrote, into the engine."""
    loaded, _ = engine.load_checkpoint(str(found.folder.parent), tag=found.folder.name, load_lr_scheduler_states=False)
    if loaded is None:
        raise ValueError(f"DeepSpeed found nothing to load in {found.folder}: its mp_rank_*_model_states.pt files are missing.")


def restore_random_state(found: Found, mesh: Mesh) -> bool:
    """Puts this process's generators back to where the checkpoint left them. False where it has no state for this many processes."""
    path = found.folder / RANDOM_STATES
    if not path.is_file():
        return False
    states: list[RandomState] = torch.load(path, weights_only=True)
    if len(states) != mesh.world_size:
        return False
    set_random_state(states[mesh.rank], mesh.device)
    return True


def write_atomically(path: Path, text: str) -> None:
    """Writes ``text`` so that a reader sees the old file or the whole new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _write_configs(folder: Path, config: Config) -> None:
    """The user's files, and what the command line changed in them."""
    texts = {file.name: file.text for file in config.files}
    if config.overrides:
        texts[OVERRIDES] = json.dumps(config.overrides, indent=1)
    (folder / "configs").mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / "configs" / name).write_text(text, encoding="utf-8")


def _prune(root: Path, config: CheckpointConfig) -> None:
    for iteration in iterations_to_delete(finished_iterations(root), config):
        shutil.rmtree(root / f"global_step{iteration}")


def _iteration_of(name: str) -> int | None:
    match = re.fullmatch(r"global_step(\d+)", name)
    return int(match[1]) if match else None


def _is_finished(folder: Path) -> bool:
    """Whether every file of the folder is there. Other programs leave no manifest, but no `saving` either."""
    if (folder / MANIFEST).is_file():
        return True
    has_weights = any(folder.glob("*model_states.pt"))
    return has_weights and not (folder / SAVING).exists()


def _found(root: Path, iteration: int) -> Found:
    folder = root / f"global_step{iteration}"
    if not (folder / MANIFEST).is_file():
        return Found(folder=folder, iteration=iteration, manifest=None)
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValidationError as damage:
        raise ValueError(f"{folder / MANIFEST} is damaged or of another version ({damage.error_count()} fields): take another iteration.") from damage
    return Found(folder=folder, iteration=iteration, manifest=manifest)


def _listed(iterations: Sequence[int]) -> str:
    return ", ".join(map(str, iterations)) if iterations else "none"


def _check_shape(saved: Shape, here: Shape, found: Found, *, is_finetune: bool) -> None:
    """A finetuning run may have another tokenizer class and longer positions; strict loading of the weights judges the latter."""
    ignored = {"tokenizer_type", "max_position_embeddings", "make_vocab_size_divisible_by", "vocab_size"} if is_finetune else set()
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

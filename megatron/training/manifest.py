"""What a checkpoint folder says of itself, and which folder a run is to load."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron.config.schema import CheckpointConfig, Config, ScheduleConfig
from megatron.optim.schedule import LearningRate
from megatron.training.progress import Progress

MANIFEST = "complete.json"
"""Written when every other file of a checkpoint is."""
SAVING = "saving"
"""There while the folder is being filled."""


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
    pipe_partition_method: str | None = None
    """None in checkpoints that do not say."""
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


def find_checkpoint(config: CheckpointConfig) -> Found | None:
    """The finished checkpoint to load: that of ``iteration``, else the one ``latest`` names, else the newest.

    None where nothing is to be loaded, or nothing is there and ``allow_fresh_start`` says that this is fine.
    """
    if config.load is None:
        return None
    root = Path(config.load)
    available = finished_iterations(root)
    if not available and _is_finished(root):
        raise ValueError(f"load ({root}) is a checkpoint itself: {_how_to_load(root)}.")
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


def _how_to_load(folder: Path) -> str:
    """What to set to take the checkpoint in this folder."""
    iteration = _iteration_of(folder.name)
    if iteration is None:
        return "rename it to global_stepN, N its iteration, and set load to the folder that it lies in"
    return f"set load to the folder that it lies in ({folder.parent}), and iteration to {iteration} if it is not the newest there"


def finished_iterations(root: Path) -> list[int]:
    """Iterations of the finished checkpoints below ``root``, ascending."""
    folders = [folder for folder in root.glob("global_step*") if folder.is_dir()] if root.is_dir() else []
    iterations = [iteration for folder in folders if _is_finished(folder) and (iteration := _iteration_of(folder.name)) is not None]
    return sorted(iterations)


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

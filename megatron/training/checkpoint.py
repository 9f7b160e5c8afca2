"""Checkpoint folders in GPT-NeoX's layout, written so that an interrupted save is never taken for a finished one.

<save>/latest                     the newest finished folder's name
<save>/global_stepN/
  saving                          present while the folder is being filled
  mp_rank_*, layer_*, *_optim_states.pt    DeepSpeed's files
  configs/                        the user's YAML texts, and overrides.json: what the command line changed
  random_states.pt                every process's generators
  complete.json                   the manifest, written when all processes are done
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron.config.schema import CheckpointConfig, Config, ModelConfig, ScheduleConfig
from megatron.model.gpt import GPTModel
from megatron.parallel.collectives import barrier, gather_objects
from megatron.parallel.mesh import Mesh
from megatron.parallel.shards import RowBiases, split
from megatron.training.cadence import iterations_to_delete
from megatron.training.loss_scale import kept_scaling
from megatron.training.manifest import MANIFEST, SAVING, Found, Manifest, SavedSchedule, Shape, finished_iterations
from megatron.training.optimizer_files import MASTER, PARAMETER_NAMES, SavedOptimizer, parameter_names
from megatron.training.progress import Progress
from megatron.training.random_state import RandomState, random_state, set_random_state
from megatron.training.rearranged import load_rearranged
from megatron.training.validation import LOGITS, validation_logits
from megatron.training.vocabulary import repadded
from megatron.training.weights import OVERRIDES, load_into, read_weights

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from megatron.model.pipeline import GPTPipeline

RANDOM_STATES = "random_states.pt"


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
        _begin(folder)
    barrier(mesh)
    client_state = {
        "iteration": progress.iteration,
        "consumed_samples": progress.consumed_samples,
        "args": Shape.of(config).model_dump(),
        "lr_scheduler": saved_schedule.model_dump(),
        PARAMETER_NAMES: parameter_names(engine),
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
            data_parallel_size=mesh.gradients.size,
            pipe_parallel_size=config.parallel.pipe_parallel_size,
            pipe_partition_method=config.parallel.pipe_partition_method,
            zero_stage=config.parallel.zero_stage,
            precision=config.precision.precision,
            wandb_run_id=wandb_run_id,
        )
        write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=1))
        (folder / SAVING).unlink()
        write_atomically(root / "latest", folder.name)
        _prune(root, config.checkpoint, newest=progress.iteration)
    barrier(mesh)
    return folder


def _begin(folder: Path) -> None:
    """Marks the folder as being filled. What an earlier run left in it goes: spread otherwise, it has files that this run would not write over."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SAVING).touch()
    (folder / MANIFEST).unlink(missing_ok=True)
    for left in folder.glob("*.pt"):
        left.unlink()


def load_weights(model: GPTModel | GPTPipeline, found: Found, mesh: Mesh, *, row_biases: RowBiases = "summed") -> None:
    """The checkpoint's weights, of any layout, into a model, or a stage of one, that no engine has taken over yet: this process's shard of them."""
    shards = mesh.tensor
    whole = _with_own_padding(weights_of(found, model.config, row_biases=row_biases), found, model.config)
    own = {name: split(name, value, model.config, ranks=shards.size)[shards.rank] for name, value in whole.items()}
    load_into(model, own if isinstance(model, GPTModel) else model.own_weights(own), source=found.folder)


def _with_own_padding(state: Mapping[str, Tensor], found: Found, model: ModelConfig) -> Mapping[str, Tensor]:
    """The weights with the rows of this run's vocabulary, where it is known to be that of the checkpoint, padded for another layout."""
    size, rows = model.vocab_size, model.padded_vocab_size
    is_same = found.manifest is None or found.manifest.shape.vocab_size == size
    return state if size is None or rows is None or not is_same else repadded(state, vocab_size=size, rows=rows)


def weights_of(found: Found, model: ModelConfig, *, row_biases: RowBiases = "summed") -> dict[str, Tensor]:
    """The weights of a finished checkpoint by name. What ZeRO 3 scattered is gathered by DeepSpeed, which unpickles freely, as it does
    whenever it resumes a run. ``row_biases``: of another program's; this one's are always summed."""
    is_scattered = found.manifest is not None and found.manifest.zero_stage == 3
    row_biases = row_biases if found.manifest is None else "summed"
    return read_weights(found.folder, model=model, trust=is_scattered, row_biases=row_biases).state


def load_training_state(engine: DeepSpeedEngine, found: Found) -> None:
    """Weights, optimizer state and DeepSpeed's counters of a checkpoint that this program wrote, into the engine, whose parameter groups keep
    the settings of this run: weight decay, betas; so do clipping and the loss scale."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups]
    with kept_scaling(engine):
        loaded, _ = engine.load_checkpoint(str(found.folder.parent), tag=found.folder.name, load_lr_scheduler_states=False)
    if loaded is None:
        raise ValueError(f"DeepSpeed found nothing to load in {found.folder}: its mp_rank_*_model_states.pt files are missing.")
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = engine.gradient_clipping()


def rearrange_training_state(engine: DeepSpeedEngine, found: Found, model: ModelConfig, mesh: Mesh) -> None:
    """Optimizer state and counters of a checkpoint that was saved by a run that was spread otherwise, into an engine that has its weights."""
    assert found.manifest is not None
    shards, progress = mesh.tensor, found.manifest.progress

    def own(name: str, key: str, whole: Tensor) -> Tensor:
        padded = _with_own_padding({name: whole}, found, model)[name]
        if key != MASTER:
            padded[len(whole) :] = 0
        return split(name, padded, model, ranks=shards.size)[shards.rank]

    load_rearranged(
        engine,
        SavedOptimizer(found.folder, tensor_parallel_size=found.manifest.shape.model_parallel_size, model=model),
        own,
        applied_steps=progress.applied_steps,
        skipped_steps=progress.iteration - progress.applied_steps,
    )


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


def _prune(root: Path, config: CheckpointConfig, *, newest: int) -> None:
    """Later ones than the ``newest`` are of a run that this one left behind when it went back: they count for nothing, and stay."""
    saved = [iteration for iteration in finished_iterations(root) if iteration <= newest]
    for iteration in iterations_to_delete(saved, config):
        shutil.rmtree(root / f"global_step{iteration}")

"""Weights out of a checkpoint directory, under today's names, whatever layout and parallel sizes they were saved with.

    mp_rank_RR_model_states.pt             without pipeline stages: everything, RR the tensor-parallel rank
    layer_XX-model_YY-model_states.pt      with a PipelineModule: XX the layer's place, YY the tensor-parallel rank
    layer_XX-model_states.pt               the same without tensor parallelism

Files are loaded as tensors and plain values only; a pickle that wants more must be trusted by name.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.parallel.shards import RowBiases, joined, parts_of_groups

LEGACY_NAMES = {"mlp.dense_h_to_4h.": "mlp.linear1.", "mlp.dense_4h_to_h.": "mlp.linear2."}
"""Names until September 2024: Pythia's, and those of SepLLM's fork."""
OVERRIDES = "overrides.json"
"""Beside the configuration files of a checkpoint: what the command line changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    state: dict[str, Tensor]
    """``sequential.N.<name>`` to the whole tensor, on the CPU."""
    config_files: tuple[Path, ...]
    """The configuration saved with them, as the user gave it."""


def read_weights(
    directory: str | Path,
    *,
    model: ModelConfig | None = None,
    trust: bool = False,
    groups_qkv: bool = False,
    row_biases: RowBiases = "summed",
) -> Weights:
    """All weights of a checkpoint: a ``global_stepN`` folder, or the folder above it, whose ``latest`` names one.

    ``model`` is needed where the weights are in tensor-parallel pieces, whose joints it explains. ``trust`` allows pickles to run code.
    ``groups_qkv``: grouped heads are in the order from before GPT-NeoX's #1315 (`parts_of_groups`); needs ``model``. ``row_biases``: see
    `joined`.
    """
    step = step_directory(directory)
    state: dict[str, Tensor] = {}
    for shards in _layers(step, trust=trust):
        if len(shards) > 1 and model is None:
            raise ValueError(f"{step} is in {len(shards)} tensor-parallel pieces: give the model's configuration to join them.")
        for name in _common_names(shards, step):
            state[name] = _whole(name, [shard[name] for shard in shards], model, groups_qkv=groups_qkv, row_biases=row_biases)
    return Weights(state=state, config_files=saved_config_files(step))


def _whole(name: str, shards: list[Tensor], model: ModelConfig | None, *, groups_qkv: bool, row_biases: RowBiases) -> Tensor:
    if model is None:
        return shards[0]
    if groups_qkv and ".attention.query_key_value." in name and model.num_kv_heads != model.num_attention_heads:
        return parts_of_groups(torch.cat(shards, 0), model)
    return joined(name, shards, model, row_biases=row_biases)


def load_into(
    model: nn.Module, state: Mapping[str, Tensor], *, source: Path, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> None:
    """Give ``model`` these weights: copied into its own, or, with ``dtype`` and ``device``, as they are put there (for a model on meta).

    ValueError, naming both values, where the weights of ``source`` are not this model's.
    """
    wanted = dict(model.named_parameters())
    # GPT-NeoX's checkpoints of tied blocks carry a second norm that nothing reads.
    state = {name: value for name, value in state.items() if name in wanted or ".post_attention_layernorm." not in name}
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    mistakes = [f"it lacks {_some(missing)}"] * bool(missing) + [f"it also has {_some(unknown)}"] * bool(unknown)
    differing = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    mistakes += [f"{name} is {tuple(state[name].shape)} there and {tuple(wanted[name].shape)} in the configuration" for name in differing[:3]]
    if mistakes:
        raise ValueError(f"The checkpoint {source} is of another shape: {'; '.join(mistakes)}. Use the configuration it was trained with.")
    is_moved = dtype is not None or device is not None
    model.load_state_dict({name: value.to(device=device, dtype=dtype) for name, value in state.items()}, assign=is_moved)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def step_directory(directory: str | Path) -> Path:
    """The ``global_stepN`` folder that a checkpoint path means."""
    path = Path(directory)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory: give a checkpoint folder such as checkpoints/global_step1000.")
    latest = path / "latest"
    return path / latest.read_text().strip() if latest.is_file() else path


def saved_config_files(directory: str | Path) -> tuple[Path, ...]:
    """The configuration files saved with a checkpoint, by name."""
    folder = step_directory(directory) / "configs"
    files = [path for path in folder.iterdir() if path.suffix in (".yml", ".yaml", ".json")] if folder.is_dir() else []
    return tuple(sorted(path for path in files if path.name != OVERRIDES))


def saved_overrides(directory: str | Path) -> dict[str, object]:
    """What the command line of the run changed in those files, by key."""
    path = step_directory(directory) / "configs" / OVERRIDES
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def engine_state(step: Path, *, trust: bool = False) -> dict[str, object]:
    """What the first engine file says beside the weights and the optimizer: counters, `args`, versions. Empty without one."""
    paths = sorted([*step.glob("mp_rank_[0-9]*_model_states.pt"), *step.glob("zero_pp_rank_*_model_states.pt")])
    if not paths:
        return {}
    state = cast("dict[str, object]", _load(paths[0], trust=trust))
    return {key: value for key, value in state.items() if key not in ("module", "optimizer")}


def _layers(step: Path, *, trust: bool) -> Iterator[list[dict[str, Tensor]]]:
    """Groups of layers with full names; in each group one dict a tensor-parallel rank."""
    layer_files: dict[int, dict[int, Path]] = defaultdict(dict)
    for path in step.iterdir():
        if match := re.fullmatch(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt", path.name):
            layer_files[int(match[1])][int(match[2] or 0)] = path
    ranks = max((len(files) for files in layer_files.values()), default=0)
    for place, files in sorted(layer_files.items()):
        if sorted(files) != list(range(ranks)):
            raise ValueError(f"{step} lacks pieces of layer {place}: found ranks {sorted(files)} of {ranks}. Copy the checkpoint again.")
        states = [_load(path, trust=trust) for _, path in sorted(files.items())]
        yield [_current_names({f"sequential.{place}.{name}": value for name, value in state.items()}) for state in states]
    engine_files = sorted(step.glob("mp_rank_[0-9]*_model_states.pt"))
    if not layer_files and engine_files:
        yield [_current_names(_module(path, trust=trust)) for path in engine_files]
    elif not layer_files:
        yield [_current_names(_gathered(step, trust=trust))]


def _gathered(step: Path, *, trust: bool) -> Mapping[str, Tensor]:
    """Whole fp32 weights of a checkpoint of ZeRO stage 3, which scatters each one over the data-parallel ranks."""
    if any(step.glob("zero_pp_rank_*_model_states.pt")):
        if not trust:
            raise ValueError(
                f"{step} was saved with ZeRO stage 3, whose pieces DeepSpeed gathers with a loader that could run code. If you trust where it "
                "comes from, say so (trust=True, or --trust_input on the command line)."
            )
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return get_fp32_state_dict_from_zero_checkpoint(str(step.parent), tag=step.name)
    raise ValueError(f"{step} holds neither layer_*-model_states.pt nor mp_rank_*_model_states.pt: it is not a GPT-NeoX or DeepSpeed checkpoint.")


def _module(path: Path, *, trust: bool) -> Mapping[str, Tensor]:
    module = _load(path, trust=trust).get("module")
    if not isinstance(module, Mapping):
        raise ValueError(f"{path} holds no weights, and its layer_*-model_states.pt files are missing: copy the whole checkpoint folder.")
    return module


def _current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under today's names; without rotary frequencies, and without the second copy of tied embeddings."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("rotary_emb.inv_freq") or re.match(r"sequential\.[1-9]\d*\.(word|position)_embeddings\.", name):
            continue
        for legacy, current in LEGACY_NAMES.items():
            name = name.replace(legacy, current)
        renamed[name] = value
    for gate in [name for name in renamed if name.endswith(".mlp.w1.weight")]:
        renamed |= _one_gated_matrix(renamed, gate.removesuffix("w1.weight"))
    return renamed


def _one_gated_matrix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Takes the three matrices of GPT-NeoX's former LLaMA MLP, gate, down and up, out of ``state``; returns today's two."""
    gate, down, up = (state.pop(f"{prefix}{name}.weight") for name in ("w1", "w2", "w3"))
    return {f"{prefix}linear1.weight": torch.cat([up, gate]), f"{prefix}linear2.weight": down}


def _common_names(shards: list[dict[str, Tensor]], step: Path) -> list[str]:
    for rank, shard in enumerate(shards):
        if different := sorted(shard.keys() ^ shards[0].keys()):
            raise ValueError(f"{step}: tensor-parallel ranks 0 and {rank} differ in {', '.join(different[:3])}. Copy the checkpoint again.")
    return list(shards[0])


class _LossScaler:
    """Stands for DeepSpeed's, which has nothing to say about weights."""


def _load(path: Path, *, trust: bool) -> dict[str, Tensor]:
    """A file's dict. Random states are numpy arrays, which torch must be told are harmless."""
    rebuild = cast(Callable[..., object], np.empty(0).__reduce__()[0])
    harmless: list[Callable[..., object] | tuple[Callable[..., object], str]] = [np.ndarray, np.dtype, type(np.dtype(np.uint32)), rebuild]
    harmless.append((rebuild, "numpy.core.multiarray._reconstruct"))  # its name before numpy 2
    harmless += [(_LossScaler, f"deepspeed.runtime.fp16.loss_scaler.{name}") for name in ("LossScaler", "DynamicLossScaler")]
    try:
        with torch.serialization.safe_globals(harmless):
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(
            f"{path} is a pickle that asks for {wanted[1] if wanted else 'more than tensors'}, which could run code. If you trust where it comes "
            "from, say so (trust=True, or --trust_input on the command line)."
        ) from error

"""The optimizer's state out of a checkpoint's files, whole and by the names of parameters, however the run was spread when it saved.

    no ZeRO, fp32           mp_rank_*_model_states.pt   state of each parameter, by its number
    no ZeRO, fp16, bf16     mp_rank_*_model_states.pt   the same, and fp32 masters
    ZeRO 1, 2               *_optim_states.pt           slices of each, in flat partitions, with their names and places
    ZeRO 3                  *_optim_states.pt           an equal piece of each, one after another

Names by number are those that `save_checkpoint` noted; a file of every pipeline stage and tensor-parallel rank has its own.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron.config.schema import ModelConfig
from megatron.model.names import weight_name
from megatron.parallel.shards import cut_of, joined

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MASTER = "master"
"""Stands for the fp32 values of a parameter that is kept in 16 bits, beside the names of the optimizer's own averages."""
PARAMETER_NAMES = "parameter_names"
"""In the client's part of an engine file: names of the optimizer's parameters in the order of their numbers."""


@dataclass(slots=True)
class _Pieces:
    """Of one parameter on one tensor-parallel rank: for each key its slices in order, and its shape."""

    shape: torch.Size
    slices: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def whole(self, key: str) -> Tensor:
        flat = torch.cat([piece.flatten() for piece in self.slices[key]])
        return flat[: self.shape.numel()].view(self.shape)


class SavedOptimizer:
    """State of the optimizer as it was saved. Tensors stay on disk until they are asked for."""

    def __init__(self, folder: Path, *, tensor_parallel_size: int, model: ModelConfig) -> None:
        """``folder`` is a finished ``global_stepN``. ValueError where it has no optimizer state, or none that can be taken apart."""
        self._model = model
        self._shards: list[dict[str, _Pieces]] = [{} for _ in range(tensor_parallel_size)]
        self.step: int | None = None
        """Updates so far, as the optimizer counts them, if it does."""
        self.loss_scale: float | None = None
        engines = _by_model_rank(folder, "model_states")
        optimizers = _by_model_rank(folder, "optim_states")
        if not engines:
            raise ValueError(f"{folder} has no engine files (mp_rank_*_model_states.pt): copy the whole checkpoint folder.")
        for model_rank, files in sorted(engines.items()):
            shard = self._shards[model_rank % tensor_parallel_size]
            engine = _read(files[0])
            if model_rank not in optimizers:
                self._take_numbered(engine, shard, folder)
                continue
            parts = [_read(path)["optimizer_state_dict"] for path in optimizers[model_rank]]
            shapes = _shapes(engine)
            (self._take_scattered if "fp32_flat_groups" in parts[0] else self._take_sliced)(parts, shapes, shard)

    @property
    def names(self) -> set[str]:
        return set(self._shards[0])

    def keys(self, name: str) -> list[str]:
        """What there is of a parameter: names of the optimizer's averages, and `MASTER` where it has one."""
        return list(self._shards[0][name].slices)

    def whole(self, name: str, key: str) -> Tensor:
        """The whole tensor, fp32 on the CPU. A bias that tensor-parallel ranks hold as a sum is the first one's to move."""
        shards = self._shards[:1] if cut_of(name, self._model).kind == "summed" else self._shards
        return joined(name, [shard[name].whole(key) for shard in shards], self._model)

    def _take_numbered(self, engine: Mapping[str, Any], shard: dict[str, _Pieces], folder: Path) -> None:
        saved = engine.get("optimizer")
        names = engine.get(PARAMETER_NAMES)
        if not saved or names is None:
            raise ValueError(
                f"{folder} holds no optimizer state whose parameters have names, because an older version or another program wrote it: resume with "
                "the layout it was saved with, or take the weights only (no_load_optim: true)."
            )
        masters = [tensor for group in saved.get("fp32_groups", ()) for tensor in group]
        states = saved.get("optimizer_state_dict", saved)["state"]
        self._note_scale(saved)
        for number, name in enumerate(names):
            state = states.get(number, {})
            tensors = [value for value in [*masters[number : number + 1], *state.values()] if torch.is_tensor(value) and value.ndim]
            pieces = shard.setdefault(name, _Pieces(tensors[0].shape if tensors else torch.Size()))
            for key, value in self._tensors(state):
                pieces.slices[key] = [value]
            if masters:
                pieces.slices[MASTER] = [masters[number]]

    def _take_sliced(self, parts: Sequence[Mapping[str, Any]], shapes: Mapping[str, torch.Size], shard: dict[str, _Pieces]) -> None:
        """ZeRO 1 and 2. Ranks in order hold the slices of a parameter in order."""
        for part in parts:
            self._note_scale(part)
            for group, places in enumerate(part["param_slice_mappings"]):
                flats = {MASTER: part["single_partition_of_fp32_groups"][group]}
                flats |= dict(self._tensors(part["base_optimizer_state"]["state"][group]))
                for saved_name, place in places.items():
                    name = weight_name(saved_name)
                    pieces = shard.setdefault(name, _Pieces(shapes[name]))
                    for key, flat in flats.items():
                        pieces.slices[key].append(flat[place.start : place.start + place.numel])

    def _take_scattered(self, parts: Sequence[Mapping[str, Any]], shapes: Mapping[str, torch.Size], shard: dict[str, _Pieces]) -> None:
        """ZeRO 3. Every rank holds an equal piece of each parameter, the last ones padded."""
        for part in parts:
            self._note_scale(part)
            states = part["optimizer_state_dict"]["state"]
            of_keys: dict[str, list[Tensor]] = defaultdict(list)
            for group, flat in enumerate(part["fp32_flat_groups"]):
                of_keys[MASTER].append(flat)
                for key, value in self._tensors(states.get(group, {})):
                    of_keys[key].append(value)
            for key, flats in of_keys.items():
                start, together = 0, torch.cat(flats) if len(flats) > 1 else flats[0]
                for name, shape in shapes.items():
                    length = math.ceil(shape.numel() / len(parts))
                    shard.setdefault(name, _Pieces(shape)).slices[key].append(together[start : start + length])
                    start += length

    def _tensors(self, state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """The averages among an optimizer's state. Notes its count of steps."""
        for key, value in state.items():
            if key == "step":
                self.step = int(value)
            elif torch.is_tensor(value) and value.ndim:
                yield key, value

    def _note_scale(self, saved: Mapping[str, Any]) -> None:
        if saved.get("dynamic_loss_scale"):
            scaler = saved.get("loss_scaler")
            self.loss_scale = float(saved["cur_scale"] if scaler is None else scaler.cur_scale)


def _shapes(engine: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Of the parameters on this model rank, in the order of the optimizer's groups."""
    return {weight_name(name): shape for group in engine["param_shapes"] for name, shape in group.items()}


def _by_model_rank(folder: Path, kind: str) -> dict[int, list[Path]]:
    """Engine or optimizer files by the number of their stage and shard, each list in the order of data-parallel ranks."""
    found: dict[int, list[tuple[int, Path]]] = defaultdict(list)
    for path in folder.iterdir():
        if match := re.fullmatch(rf"(?:(?:bf16_)?zero_pp_rank_(\d+)_)?mp_rank_(\d+)_{kind}\.pt", path.name):
            found[int(match[2])].append((int(match[1] or 0), path))
    return {model_rank: [path for _, path in sorted(files)] for model_rank, files in found.items()}


def _read(path: Path) -> dict[str, Any]:
    """DeepSpeed's files hold objects of its own, which is how it reads them itself when a run resumes."""
    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)


def parameter_names(engine: DeepSpeedEngine) -> list[str]:
    """`PARAMETER_NAMES` of a file of this engine; none with ZeRO, whose files have names of their own."""
    if engine.zero_optimization() or hasattr(engine.optimizer, "bf16_groups"):
        return []
    names = {id(parameter): weight_name(name) for name, parameter in engine.module.named_parameters()}
    groups = getattr(engine.optimizer, "fp16_groups", None) or [group["params"] for group in engine.basic_optimizer.param_groups]
    return [names[id(parameter)] for group in groups for parameter in group]

"""What a checkpoint folder holds, or how two of them differ. Reads GPT-NeoX's and DeepSpeed's layout and transformers folders.

usage: python tools/ckpts/inspect_checkpoints.py checkpoints/mine
       python tools/ckpts/inspect_checkpoints.py checkpoints/mine/global_step100 checkpoints/mine/global_step200
       python tools/ckpts/inspect_checkpoints.py checkpoints/mine --config_file your.yml
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a checkout that is not installed

import torch
from pydantic import BaseModel, ConfigDict, JsonValue
from torch import Tensor

from megatron.config.loader import ConfigError
from megatron.config.schema import Config
from megatron.training.manifest import MANIFEST, SAVING, Manifest, finished_iterations
from megatron.training.weights import engine_state, read_weights, saved_config_files, step_directory
from tools.ckpts.hf_folder import read_config, read_state
from tools.ckpts.saved_config import run_config
from tools.command import until_stopped

_NOT_THE_RUN = ("files", "overrides", "runtime", "batch", "launch")
"""Groups of a configuration that say where a run ran."""


class Parameter(BaseModel):
    model_config = ConfigDict(frozen=True)

    shape: tuple[int, ...]
    """Of the whole tensor, or of one rank's piece where no configuration explains how to join the pieces."""
    dtype: str


class Report(BaseModel):
    model_config = ConfigDict(frozen=True)

    folder: str
    form: str
    iteration: int | None = None
    is_finished: bool = True
    other_iterations: tuple[int, ...] = ()
    """Finished checkpoints beside this one."""
    tensor_parallel_size: int = 1
    engine_files: int = 0
    """One for each pipeline stage and tensor-parallel rank."""
    optimizer_files: int = 0
    written_by: str
    zero_stage: int | None = None
    precision: str | None = None
    config_files: tuple[str, ...] = ()
    num_parameters: int
    parameters: dict[str, Parameter]


class Difference(BaseModel):
    """Of two checkpoints."""

    model_config = ConfigDict(frozen=True)

    config: dict[str, tuple[JsonValue, JsonValue]]
    """By key path: the first's value, the second's."""
    only_first: tuple[str, ...] = ()
    only_second: tuple[str, ...] = ()
    other_shape_or_dtype: dict[str, tuple[Parameter, Parameter]] = {}
    values: dict[str, float] = {}
    """Parameters whose values differ: the largest absolute difference."""
    num_equal: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    folders = [Path(name) for words in options.folders for name in words.split(",")]
    try:
        if len(folders) > 2:
            raise ValueError(f"{len(folders)} folders are given: give one to be described, or two to be compared.")
        result: BaseModel
        if len(folders) == 2:
            result = compare(*folders, trust=options.trust_input)
        elif options.config_file:
            result = Difference(config=config_differences(run_config(folders[0]), run_config(folders[0], config_files=options.config_file)))
        else:
            result = describe(folders[0], trust=options.trust_input)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        print(result.model_dump_json(indent=1))
    else:
        print(report_text(result) if isinstance(result, Report) else difference_text(result))
    return 0


def describe(folder: Path, *, trust: bool = False) -> Report:
    """What the checkpoint holds: a ``global_stepN`` folder, the folder above it, or a transformers folder."""
    state = weights(folder, trust=trust)
    parameters = {name: _parameter(value) for name, value in state.items()}
    count = sum(value.numel() for value in state.values())
    if (folder / "config.json").is_file():
        config = read_config(folder)
        form = f"transformers model of type {config.model_type}"
        return Report(
            folder=str(folder), form=form, written_by=f"transformers {config.transformers_version}", num_parameters=count, parameters=parameters
        )
    step = step_directory(folder)
    engine = engine_state(step, trust=trust)
    ranks = {int(match[1]) for path in step.iterdir() if (match := re.fullmatch(r"layer_\d+-model_(\d+)-model_states\.pt", path.name))}
    layers, engines = list(step.glob("layer_*-model_states.pt")), list(step.glob("mp_rank_*_model_states.pt"))
    manifest = Manifest.model_validate_json((step / MANIFEST).read_text(encoding="utf-8")) if (step / MANIFEST).is_file() else None
    numbered = re.fullmatch(r"global_step(\d+)", step.name)
    return Report(
        folder=str(step),
        form="a file a layer" if layers else "a file a rank" if engines else "scattered by ZeRO stage 3",
        iteration=_iteration(engine, int(numbered[1]) if numbered else None),
        is_finished=not (step / SAVING).exists(),
        other_iterations=tuple(found for found in finished_iterations(step.parent) if not numbered or found != int(numbered[1])),
        tensor_parallel_size=len(ranks) or (1 if layers else max(1, len(engines))),
        engine_files=len(engines),
        optimizer_files=len(list(step.glob("*optim_states.pt"))),
        written_by="this program" if manifest is not None else f"another program{_version(engine)}",
        zero_stage=None if manifest is None else manifest.zero_stage,
        precision=None if manifest is None else manifest.precision,
        config_files=tuple(path.name for path in saved_config_files(step)),
        num_parameters=count,
        parameters=parameters,
    )


def compare(first: Path, second: Path, *, trust: bool = False) -> Difference:
    """How two checkpoints of one kind differ."""
    ours, theirs = weights(first, trust=trust), weights(second, trust=trust)
    both = [name for name in ours if name in theirs]
    alike = [name for name in both if _parameter(ours[name]) == _parameter(theirs[name])]
    distances = {
        name: float((ours[name].double() - theirs[name].double()).abs().max()) for name in alike if not torch.equal(ours[name], theirs[name])
    }
    return Difference(
        config=config_differences(_config(first), _config(second)),
        only_first=tuple(name for name in ours if name not in theirs),
        only_second=tuple(name for name in theirs if name not in ours),
        other_shape_or_dtype={name: (_parameter(ours[name]), _parameter(theirs[name])) for name in both if name not in alike},
        values=distances,
        num_equal=len(alike) - len(distances),
    )


def config_differences(first: Config | None, second: Config | None) -> dict[str, tuple[JsonValue, JsonValue]]:
    """The fields of two runs that differ, as ``group.field``. None: nothing is known of that run, and nothing is compared."""
    if first is None or second is None:
        return {}
    ours, theirs = (_flat(config.model_dump(mode="json", exclude=set(_NOT_THE_RUN))) for config in (first, second))
    return {key: (ours.get(key), theirs.get(key)) for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)}


def weights(folder: Path, *, trust: bool = False) -> dict[str, Tensor]:
    """Every weight of the folder by name, pieces joined as far as that is known."""
    if (folder / "config.json").is_file():
        return read_state(folder)
    config = _config(folder)
    return read_weights(folder, model=None if config is None else config.model, trust=trust).state


def report_text(report: Report) -> str:
    """The report for reading."""
    lines = [report.folder, f"  form           {report.form}{'' if report.is_finished else ', NOT FINISHED: its save was interrupted'}"]
    if report.iteration is not None:
        lines += [f"  iteration      {report.iteration}", f"  beside it      {', '.join(map(str, report.other_iterations)) or 'no other'}"]
        lines += [f"  parallel       tensor {report.tensor_parallel_size}, {report.engine_files} engine and {report.optimizer_files} optimizer files"]
    lines += [f"  written by     {report.written_by}"]
    if report.zero_stage is not None:
        lines += [f"  ZeRO stage     {report.zero_stage}", f"  precision      {report.precision}"]
    if report.config_files:
        lines += [f"  configuration  {', '.join(report.config_files)}"]
    lines += [f"  parameters     {report.num_parameters:,} in {len(report.parameters)} tensors", ""]
    width = max(map(len, report.parameters), default=0)
    return "\n".join([*lines, *(f"  {name:<{width}}  {_shown(parameter)}" for name, parameter in report.parameters.items())])


def difference_text(difference: Difference) -> str:
    """The difference for reading."""
    lines = [f"{key}: {ours} | {theirs}" for key, (ours, theirs) in difference.config.items()] or ["The configurations are the same."]
    lines += [f"only in the first: {name}" for name in difference.only_first] + [f"only in the second: {name}" for name in difference.only_second]
    lines += [f"{name}: {_shown(ours)} | {_shown(theirs)}" for name, (ours, theirs) in difference.other_shape_or_dtype.items()]
    lines += [f"{name}: values differ by up to {distance:.3g}" for name, distance in difference.values.items()]
    return "\n".join([*lines, f"{difference.num_equal} tensors are equal."] if difference.num_equal or len(lines) > 1 else lines)


def _config(folder: Path) -> Config | None:
    """The run of a checkpoint, where it says."""
    if (folder / "config.json").is_file() or not saved_config_files(folder):
        return None
    try:
        return run_config(folder)
    except ConfigError:
        return None


def _flat(values: Mapping[str, JsonValue], path: str = "") -> dict[str, JsonValue]:
    """One entry a field; ids that are a set in order."""
    flat: dict[str, JsonValue] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{path}{key}.")
        else:
            flat[f"{path}{key}"] = [*sorted(cast("list[int]", value))] if key == "separator_ids" else value
    return flat


def _iteration(engine: Mapping[str, object], numbered: int | None) -> int | None:
    """`total_iters` is what GPT-NeoX before 1.0 called it."""
    found = engine.get("iteration", engine.get("total_iters", numbered))
    return found if isinstance(found, int) else numbered


def _version(engine: Mapping[str, object]) -> str:
    return f" (DeepSpeed {engine['ds_version']})" if "ds_version" in engine else ""


def _parameter(value: Tensor) -> Parameter:
    return Parameter(shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."))


def _shown(parameter: Parameter) -> str:
    return f"{parameter.dtype:<9}{list(parameter.shape)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a checkpoint, or two (also as A,B) to be compared")
    parser.add_argument("--config_file", type=Path, nargs="+", help="YAML files to compare the checkpoint's own with")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trust_input", action="store_true", help="allow the checkpoint's pickles to run code")
    return parser


if __name__ == "__main__":
    raise SystemExit(until_stopped(main))

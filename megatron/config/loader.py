"""YAML files and overrides in, one resolved `Config` out; every mistake in one `ConfigError`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.config.advice import advice
from megatron.config.checks import check_config, check_settings
from megatron.config.engine import resolve_launch
from megatron.config.resolve import Device, resolve
from megatron.config.schema import Config, ConfigFile, LaunchConfig
from megatron.config.settings import Settings, attempt, collect
from megatron.config.source import Entry, read_scalar, read_source


class ConfigError(ValueError):
    """Every mistake of a configuration, one a line."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        self.mistakes = tuple(dict.fromkeys(mistakes))
        super().__init__("\n".join(self.mistakes))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedConfig:
    config: Config
    notes: tuple[str, ...]
    """What the user should know: inert keys and why, numbers that YAML had read as text, warnings."""


def load_config(
    paths: Sequence[str | Path],
    *,
    overrides: Mapping[str, object] | None = None,
    world_size: int,
    device: Device = "cuda",
    vocab_size: int | None = None,
    holds_whole_models: bool = False,
) -> Config:
    """The resolved configuration of these files for ``world_size`` devices, ``overrides`` winning. Raises `ConfigError` with every mistake.

    ``overrides`` are values by key, dots leading into blocks, as `parse_override` reads them. ``vocab_size`` is the tokenizer's; by default
    it is counted in `vocab_file`, and unknown (None) where that is absent. ``holds_whole_models``: every device holds all of the model, to
    generate, score or convert, whatever layout the files train it with; the model itself is theirs, its padded vocabulary too.
    """
    return load_config_with_notes(
        paths, overrides=overrides, world_size=world_size, device=device, vocab_size=vocab_size, holds_whole_models=holds_whole_models
    ).config


def load_config_with_notes(
    paths: Sequence[str | Path],
    *,
    overrides: Mapping[str, object] | None = None,
    world_size: int,
    device: Device = "cuda",
    vocab_size: int | None = None,
    holds_whole_models: bool = False,
) -> LoadedConfig:
    """As `load_config`, with the notes for the user."""
    files, settings = _read(paths, overrides)
    if holds_whole_models:
        attempt(settings, lambda: _hold_whole_models(settings, world_size=world_size))
    check_settings(settings)
    config = resolve(settings, world_size=world_size, device=device, vocab_size=vocab_size, files=files)
    if config is not None:
        check_config(settings, config)
    if settings.mistakes:
        raise ConfigError(settings.mistakes)
    assert config is not None, "something was unreadable and nobody reported it"
    config = config.model_copy(update={"overrides": dict(overrides or {})})
    return LoadedConfig(config=config, notes=tuple(dict.fromkeys([*settings.notes, *advice(config)])))


_OF_PARALLEL_TRAINING = ("pipe_parallel_size", "model_parallel_size", "context_parallel_size", "sequence_parallel", "world_size", "global_num_gpus")
_OF_A_STEP = ("train_batch_size", "gradient_accumulation_steps")


def _hold_whole_models(settings: Settings, *, world_size: int) -> None:
    """Takes out how the model is spread over devices and how many samples make a step. The vocabulary stays padded as it is trained."""
    if not settings.has("padded_vocab_size"):
        unit = settings.get_or("make_vocab_size_divisible_by", 128) * settings.get_or("model_parallel_size", 1)
        settings.values["make_vocab_size_divisible_by"] = unit
    samples = settings.get("train_batch_size", int)
    if samples is not None and not settings.has("train_micro_batch_size_per_gpu"):
        devices = world_size * settings.get_or("gradient_accumulation_steps", 1)
        settings.values["train_micro_batch_size_per_gpu"] = max(1, samples // devices)
    for key in (*_OF_PARALLEL_TRAINING, *_OF_A_STEP):
        settings.values.pop(key, None)


def load_launch(paths: Sequence[str | Path], *, overrides: Mapping[str, object] | None = None) -> LaunchConfig:
    """The launcher's keys alone, for counting devices before anything that depends on their number is resolved.

    Raises `ConfigError` where a file or one of these keys cannot be read. Mistakes in other keys are left to `load_config`, which tells
    all of them together.
    """
    _, settings = _read(paths, overrides)
    launch = attempt(settings, lambda: resolve_launch(settings))
    if launch is None:
        raise ConfigError(settings.mistakes)
    return launch


def parse_override(text: str) -> tuple[str, object]:
    """``("fp16.enabled", False)`` of ``"fp16.enabled=false"``: the value is read as YAML. Raises ValueError when there is no ``=``."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {text}: give KEY=VALUE, as in --set train_iters=100 or --set fp16.enabled=false.")
    return key.strip(), read_scalar(value)


def config_to_json(config: Config) -> str:
    """The whole configuration as text, for the workers and the checkpoint."""
    return config.model_dump_json()


def config_from_json(text: str) -> Config:
    """The inverse of `config_to_json`."""
    return Config.model_validate_json(text)


def _read(paths: Sequence[str | Path], overrides: Mapping[str, object] | None) -> tuple[list[ConfigFile], Settings]:
    """The texts and all their keys. Raises ConfigError at once for files that cannot be read, where no more could be said."""
    files: list[ConfigFile] = []
    entries: list[Entry] = []
    mistakes: list[str] = []
    is_readable = True
    for path in map(Path, paths):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            mistakes.append(f"{path}: cannot be read ({error}): give the path of a YAML file.")
            is_readable = False
            continue
        source = read_source(str(path), text)
        files.append(ConfigFile(name=path.name, text=text))
        entries += source.entries
        mistakes += source.mistakes
        is_readable = is_readable and source.is_yaml
    for name, count in Counter(file.name for file in files).items():
        if count > 1:
            mistakes.append(f"{count} files are called {name}: rename one, because checkpoints keep the files by name.")
    settings = collect(entries, overrides or {})
    if not is_readable:
        raise ConfigError([*mistakes, *settings.mistakes])
    settings.mistakes[:0] = mistakes
    return files, settings

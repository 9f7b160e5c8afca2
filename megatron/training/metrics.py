"""Where the numbers of a run go: JSON lines, TensorBoard and Weights & Biases, all under the same names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron.config.schema import Config, LoggingConfig
from megatron.training.checkpoint import write_atomically

if TYPE_CHECKING:
    import wandb

Metrics = Mapping[str, float]


class Sink(Protocol):
    """One place that takes the metrics of an iteration."""

    def write(self, iteration: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricLogger:
    """Passes the metrics of each iteration on to every sink."""

    sinks: Sequence[Sink] = ()
    wandb_run_id: str | None = None
    """Kept in checkpoints, so that a resumed run goes on in the same chart."""

    @classmethod
    def open(cls, config: Config, *, is_first: bool, iteration: int, wandb_run_id: str | None = None) -> MetricLogger:
        """The sinks that the configuration names, on the first process; elsewhere none (wandb on all, if asked).

        ``iteration``: where the run starts; what an interrupted run wrote beyond it is dropped.
        """
        sinks: list[Sink] = []
        path = metrics_path(config)
        if is_first and path is not None:
            sinks.append(JsonLines(path, iteration=iteration))
        if is_first and config.logging.tensorboard_dir is not None:
            sinks.append(TensorBoard(Path(config.logging.tensorboard_dir), iteration=iteration))
        if config.logging.use_wandb and (is_first or config.logging.wandb_init_all_ranks):
            run = WandbRun(config, run_id=wandb_run_id if is_first else None)
            sinks.append(run)
            wandb_run_id = run.run_id if is_first else wandb_run_id
        return cls(sinks=tuple(sinks), wandb_run_id=wandb_run_id)

    def write(self, iteration: int, metrics: Metrics) -> None:
        """One iteration's metrics to every sink."""
        for sink in self.sinks:
            sink.write(iteration, metrics)

    def close(self) -> None:
        """Flushes and closes every sink."""
        for sink in self.sinks:
            sink.close()


def metrics_path(config: Config) -> Path | None:
    """The JSON-lines file of a run: `metrics_file`, else `metrics.jsonl` beside the checkpoints, else none."""
    if config.logging.metrics_file is not None:
        return Path(config.logging.metrics_file)
    return Path(config.checkpoint.save) / "metrics.jsonl" if config.checkpoint.save is not None else None


class JsonLines:
    """One JSON object a line: ``iteration`` and every metric. Readable while the run goes on."""

    def __init__(self, path: Path, *, iteration: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_lines_after(path, iteration)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, iteration: int, metrics: Metrics) -> None:
        self._file.write(json.dumps({"iteration": iteration, **metrics}) + "\n")

    def close(self) -> None:
        self._file.close()


def _drop_lines_after(path: Path, iteration: int) -> None:
    """Removes what an earlier run wrote beyond the point where this one starts; the file as it was stays as ``.previous``."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _iteration_of(line) <= iteration]
    if len(kept) < len(lines):
        shutil.copyfile(path, path.with_name(path.name + ".previous"))
        write_atomically(path, "".join(kept))


def _iteration_of(line: str) -> float:
    """The iteration of a line; infinite for one that was cut off in the middle."""
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class TensorBoard:
    """TensorBoard's event files; the step is the iteration."""

    def __init__(self, folder: Path, *, iteration: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as missing:
            raise ValueError("tensorboard_dir is set but TensorBoard is not installed: pip install tensorboard.") from missing
        self._writer = SummaryWriter(str(folder), purge_step=iteration + 1)

    def write(self, iteration: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        self._writer.close()


class WandbRun:
    """A Weights & Biases run: online, offline or disabled. A known ``run_id`` is continued."""

    def __init__(self, config: Config, *, run_id: str | None) -> None:
        try:
            import wandb
        except ImportError as missing:
            raise ValueError("use_wandb is set but wandb is not installed: pip install wandb, or leave use_wandb out.") from missing
        logging = config.logging
        self._run = wandb.init(
            project=logging.wandb_project,
            group=logging.wandb_group,
            name=logging.wandb_run_name,
            entity=logging.wandb_team,
            mode=logging.wandb_mode,
            id=run_id,
            resume="allow" if run_id is not None and logging.wandb_mode != "offline" else None,
            config=config.model_dump(mode="json", exclude={"files"}),
            settings=_wandb_settings(logging),
        )

    @property
    def run_id(self) -> str:
        """What to pass as ``run_id`` to go on with this run."""
        return str(self._run.id)

    def write(self, iteration: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=iteration)

    def close(self) -> None:
        self._run.finish()


def _wandb_settings(logging: LoggingConfig) -> wandb.Settings:
    import wandb

    return wandb.Settings(base_url=logging.wandb_host, console="off")

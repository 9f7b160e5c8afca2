"""The runs of a study and their carrying out: each in a process of its own with one thread, done once, found again when asked for again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from megatron.config.loader import config_to_json
from megatron.config.schema import Config
from tools.sepllm.study.methods import Method
from tools.sepllm.study.results import RunResult, fingerprint

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One method from one seed."""

    method: Method
    config: Config
    folder: Path

    @property
    def seed(self) -> int:
        return self.config.training.seed

    @property
    def result(self) -> Path:
        return self._file(".json")

    @property
    def log(self) -> Path:
        return self._file(".log")

    def done(self) -> RunResult | None:
        """What it found, where it has run before with this very configuration."""
        if not self.result.exists():
            return None
        found = RunResult.load(self.result)
        return found if found.fingerprint == fingerprint(self.config) else None

    def run(self) -> RunResult:
        """Trains in a new process; RuntimeError with the end of what it said, where that fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self._file(".config.json")
        config.write_text(config_to_json(self.config), encoding="utf-8")
        command = [sys.executable, "-m", "tools.sepllm.study.train", str(config), str(self.result)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
        with self.log.open("w", encoding="utf-8") as log:
            done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            said = "\n".join(self.log.read_text(encoding="utf-8").splitlines()[-15:])
            raise RuntimeError(f"{self.method.name} with seed {self.seed} failed with status {done.returncode} ({self.log}):\n{said}")
        return RunResult.load(self.result)

    def _file(self, suffix: str) -> Path:
        return self.folder / f"{self.method.name}-seed{self.seed}{suffix}"


def tasks_of(methods: Sequence[Method], seeds: Sequence[int], config_of: Callable[[Method, int], Config], folder: Path) -> list[Task]:
    """Seed by seed, so that a study that is interrupted holds whole seeds."""
    return [Task(method=method, config=config_of(method, seed), folder=folder.absolute()) for seed in seeds for method in methods]


def carry_out(tasks: Sequence[Task], *, processes: int, say: Callable[[str], None]) -> list[RunResult]:
    """The results of all tasks, in their order; those that are there already are not computed again."""
    results = {task.result: found for task in tasks if (found := task.done()) is not None}
    waiting = [task for task in tasks if task.result not in results]
    say(f"{len(tasks)} runs, {len(results)} of them done before; {processes} at a time.")
    started = time.monotonic()
    with ThreadPoolExecutor(max_workers=processes) as pool:
        running = {pool.submit(task.run): task for task in waiting}
        try:
            for count, future in enumerate(as_completed(running), start=1):
                task, found = running[future], future.result()
                results[task.result] = found
                left_s = (time.monotonic() - started) / count * (len(waiting) - count)
                say(f"{task.method.name}, seed {task.seed}: test loss {found.test_loss:.4f}; about {left_s / 60:.0f} minutes left")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[task.result] for task in tasks]

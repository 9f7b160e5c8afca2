"""What a person reads: GPT-NeoX's console line, a progress bar, and a copy of the output in `log_dir`."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tqdm import tqdm


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """The iterations since the last console line."""

    iteration: int
    train_iters: int
    steps: int
    elapsed_s: float
    samples: int
    learning_rate: float
    flops_per_s: float
    """Of one device, dense-equivalent."""
    loss: float
    """Mean over the interval's steps that have one."""
    model_utilization: float | None = None
    hardware_utilization: float | None = None
    loss_scale: float | None = None
    skipped: int = 0
    nan: int = 0


def console_line(interval: Interval) -> str:
    """The report of an interval in the order and the format that people's regular expressions know from GPT-NeoX."""
    parts = [
        f"samples/sec: {interval.samples / interval.elapsed_s:.3f}",
        f"iteration {interval.iteration:8d}/{interval.train_iters:8d}",
        f"elapsed time per iteration (ms): {interval.elapsed_s * 1000 / interval.steps:.1f}",
        f"learning rate: {interval.learning_rate:.3E}",
        f"approx flops per GPU: {readable_flops(interval.flops_per_s)}",
    ]
    if interval.model_utilization is not None and interval.hardware_utilization is not None:
        parts += [f"MFU: {interval.model_utilization:.2%}", f"HFU: {interval.hardware_utilization:.2%}"]
    parts.append(f"lm_loss: {interval.loss:.6E}")
    if interval.loss_scale is not None:
        parts.append(f"loss scale: {interval.loss_scale:.1f}")
    parts += [f"number of skipped iterations: {interval.skipped:3d}", f"number of nan iterations: {interval.nan:3d}"]
    return "".join(f" {part} |" for part in parts)


def readable_flops(flops_per_s: float) -> str:
    """``41.3TFLOPS``: three digits and a unit."""
    for unit in ("", "K", "M", "G", "T"):
        if abs(flops_per_s) < 1000:
            return f"{flops_per_s:3.1f}{unit}FLOPS"
        flops_per_s /= 1000
    return f"{flops_per_s:3.1f}PFLOPS"


def cores_line(cores: tuple[str, ...]) -> str:
    """Which attention core computes which layers: ``native in layers 1-11, sdpa in layer 0``."""
    layers = {name: [layer for layer, core in enumerate(cores) if core == name] for name in sorted(set(cores))}
    if len(layers) == 1:
        return f"{cores[0]} in all layers"
    return ", ".join(f"{name} in layer{'s' if len(numbers) > 1 else ''} {_spans(numbers)}" for name, numbers in layers.items())


def _spans(numbers: list[int]) -> str:
    """``0-3, 7``"""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


class Console:
    """Prints for the run: on the first process only, above the progress bar if there is one."""

    def __init__(self, *, is_first: bool, bar_iterations: int | None = None, iteration: int = 0) -> None:
        """``bar_iterations``: length of the progress bar, None for no bar. ``iteration``: where the run starts."""
        self._is_first = is_first
        has_bar = is_first and bar_iterations is not None
        self._bar = tqdm(total=bar_iterations, initial=iteration, unit="step", dynamic_ncols=True) if has_bar else None

    def say(self, text: str) -> None:
        """One line, now."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        elif self._is_first:
            print(text, flush=True)

    def step(self, *, loss: float, tokens_per_s: float) -> None:
        """Moves the bar on by one iteration."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
            self._bar.update()

    def close(self) -> None:
        """Leaves the bar where it stands."""
        if self._bar is not None:
            self._bar.close()


class Tee:
    """A text stream that writes to another one and to a file."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        self._file.write(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._file.flush()
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        return self._stream.encoding


@contextmanager
def copied_output(log_dir: str | None, *, local_rank: int) -> Iterator[None]:
    """Standard output and error also go to ``<log_dir>/<host>_stdout.txt`` and ``_stderr.txt``, from one process a host."""
    if log_dir is None or local_rank != 0:
        yield
        return
    folder = Path(log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    out, error = sys.stdout, sys.stderr
    with (
        (folder / f"{socket.gethostname()}_stdout.txt").open("a", buffering=1) as out_file,
        (folder / f"{socket.gethostname()}_stderr.txt").open("a", buffering=1) as error_file,
    ):
        out_file.write(f"--- {started}\n")
        error_file.write(f"--- {started}\n")
        sys.stdout, sys.stderr = Tee(out, out_file), Tee(error, error_file)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = out, error

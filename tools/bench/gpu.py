"""All that wants a GPU, in steps: the tests that are marked gpu, then every benchmark of one.

    python -m tools.bench.gpu                # all of it
    python -m tools.bench.gpu --minutes 9    # what fits into nine minutes; the same command again goes on from there

A step is a command with a time limit, and begins only where that is left of the minutes. What it printed stands in its log, how it ended
in `steps.json` beside; a step that has ended, well or not, is not begun again unless it is named. Benchmarks save their results as they
always do. `cores` fails where `auto` does not take the fastest core, as on every device without a row in sepllm/attention/measured.py.
Nothing is installed: this runs in whatever Python has the packages of requirements/train.txt, pytest and pytest-xdist.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tools.bench.machine import ROOT
from tools.bench.text import add_text_flags
from tools.command import until_stopped

FOLDER = Path("runs/bench-gpu")
COMPILERS = "4"
"""Processes that each process of a step compiles with. torch would start as many as there are processors for each of eight tests at a time."""
LAST_LINES = 12
"""Of the log of a step that failed, which are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    name: str
    words: tuple[str, ...]
    """What follows ``python -m``."""
    limit_minutes: float
    reads_text: bool = False
    """Takes the flags of the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a step ended."""

    status: int | None
    """None: it was ended at its limit."""
    seconds: float


def _tests(name: str, *words: str, limit_minutes: float) -> Step:
    return Step(name=name, words=("pytest", "-m", "gpu", "-n", "8", *words), limit_minutes=limit_minutes)


def _bench(name: str, tool: str, *words: str, limit_minutes: float) -> Step:
    usual = ("--device", "cuda", "--dtype", "bf16", "--save")
    return Step(name=name, words=(f"tools.bench.{tool}", *words, *usual), limit_minutes=limit_minutes, reads_text=True)


def _attention(length: int, *variants: str) -> Step:
    words = ("--seq-lengths", str(length), "--minutes", "1", *(("--variants", *variants) if variants else ()))
    return _bench(f"attention-{length}", "attention", *words, limit_minutes=5)


def _training(model: str, length: int, *arms: str) -> Step:
    words = ("--model", model, "--seq-lengths", str(length), "--arms", *arms, "--minutes", "1")
    return _bench(f"train-step-{model}-{length}", "train_step", *words, limit_minutes=6)


TO_COMPILE_FEW = ("dense_mask", "flex", "chunked", "fused_triton")
"""The variants of attention without the two block masks over all pairs."""
OURS = ("full", "fused_triton", "full_compiled", "fused_triton_compiled")
STEPS = (
    Step(name="build", words=("sepllm.ops.extension",), limit_minutes=4),
    _tests("test-operators", "tests/gpu/test_ops_on_cuda.py", "tests/gpu/test_losses_on_cuda.py", limit_minutes=3),
    _tests("test-cores", "tests/gpu/test_cores_on_cuda.py", limit_minutes=4),
    _attention(2048),
    _training("160m", 2048, *OURS, "full_native", "fused_triton_native", "reference", "transformers"),
    _attention(32768, *TO_COMPILE_FEW),
    _training("160m", 32768, *OURS),
    _attention(8192),
    _training("160m", 8192, *OURS, "flex", "transformers"),
    _bench("cores", "cores", "--cores", "sdpa", "fused_triton", "chunked", "dense", limit_minutes=4),
    _training("1.4b", 2048, *OURS),
    _bench("profile", "profile_step", "--arms", "fused_triton", "full", "transformers", limit_minutes=4),
    _tests("test-flex", "tests/sepllm/attention/test_flex.py", limit_minutes=6),
    _tests("test-training", "tests/megatron/data/test_packet.py", "tests/test_end_to_end.py", limit_minutes=6),
    _attention(4096, *TO_COMPILE_FEW),
    _bench("cores-with-flex", "cores", "--cores", "sdpa", "fused_triton", "flex", "chunked", "dense", limit_minutes=8),
)
"""What the rest depends on first, then what says most."""


def main(argv: Sequence[str] | None = None, *, steps: Sequence[Step] = STEPS) -> int:
    arguments = parse(argv, steps=steps)
    if steps is STEPS and not torch.cuda.is_available():
        print("torch sees no CUDA device here, so every test would be skipped.", file=sys.stderr)
        return 1
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    ended = _read(folder)
    begins_by = float("inf") if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    wanted = [step for step in steps if (step.name in arguments.steps if arguments.steps else step.name not in ended)]
    left = []
    for step in wanted:
        if time.monotonic() + 60 * step.limit_minutes > begins_by:
            left.append(step.name)
            continue
        ended[step.name] = run(step, folder, text=_text_words(arguments) if step.reads_text else ())
        _write(folder, ended)
    failed = [step.name for step in steps if step.name in ended and ended[step.name].status != 0]
    if left:
        print(f"Left for another time: {', '.join(left)}.")
    if failed:
        print(f"Failed: {', '.join(failed)} (logs in {folder}).")
    return 1 if left or failed else 0


def parse(argv: Sequence[str] | None, *, steps: Sequence[Step]) -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="tools.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--minutes", type=float, help="begin no step that might take longer than what is left of these (default: all steps)")
    flags.add_argument("--steps", nargs="+", choices=[step.name for step in steps], default=[], metavar="STEP", help="only these, ended or not")
    flags.add_argument("--folder", type=Path, default=FOLDER, help="of the logs, and of what has ended (default: %(default)s)")
    add_text_flags(flags)
    return flags.parse_args(argv)


def run(step: Step, folder: Path, *, text: Sequence[str] = ()) -> Ended:
    """One step, to its end or its limit, and a line about it."""
    log, start = folder / f"{step.name}.log", time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *step.words, *text],
            cwd=ROOT,
            env=_environment(),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it started ends with it
        )
        try:
            status: int | None = process.wait(60 * step.limit_minutes)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = None
    ended = Ended(status=status, seconds=round(time.monotonic() - start, 1))
    said = f"was ended after {step.limit_minutes:g} minutes" if status is None else f"status {status}"
    print(f"{step.name}: {said}, {ended.seconds:.0f} s", flush=True)
    if status != 0:
        print(*(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-LAST_LINES:]), sep="\n", flush=True)
    return ended


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {"TORCHINDUCTOR_COMPILE_THREADS": COMPILERS} | os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _text_words(arguments: argparse.Namespace) -> list[str]:
    if arguments.tokens is None:
        return []
    density = [] if arguments.density_target is None else ["--density-target", str(arguments.density_target)]
    return ["--tokens", str(arguments.tokens.resolve()), "--separator-ids", *map(str, arguments.separator_ids), *density]


def _read(folder: Path) -> dict[str, Ended]:
    path = folder / "steps.json"
    return {name: Ended(**how) for name, how in json.loads(path.read_text()).items()} if path.exists() else {}


def _write(folder: Path, ended: Mapping[str, Ended]) -> None:
    path = folder / "steps.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps({name: asdict(how) for name, how in ended.items()}, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the step under way ends too
    sys.exit(until_stopped(main))

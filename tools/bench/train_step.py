"""Time, memory and utilisation of whole training steps: full attention, the reference's way, and SepLLM.

    python -m tools.bench.train_step --model 160m --seq-lengths 2048 8192 --threads 2 --save
    python -m tools.bench.train_step --parity 200 --model 14m --seq-lengths 512

A step is the layout of new rows, forward, loss, backward, clipping and AdamW. The arms share weights and data and take turns, step by step.
With --parity nothing is timed: SepLLM's losses over a short training run are compared with those of the plain masked softmax.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron.config.schema import Config
from tools.bench import report
from tools.bench.arms import ARMS, ONE_CORE_ARMS, PRECISIONS, PYTHIA_VOCAB, Arm, StepTime, Training, config_of, refusal
from tools.bench.lineup import DTYPES
from tools.bench.machine import ROOT, describe, gemm_tflops, memory_bytes, peak_rss_bytes
from tools.bench.measure import interleave, rounds_for
from tools.bench.parity import compare
from tools.bench.step_rows import Row, panels_of, row_of, table_of
from tools.bench.text import TokenStream, add_text_flags, chosen_stream

AGREEMENT = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest distance of an arm's gradient from the portable core's, over its norm."""
FEWEST_ROUNDS = 3


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.memory_of is not None:
            print(json.dumps(own_peak_bytes(arguments)))
            return 0
        result, kind, failures = compare_losses(arguments) if arguments.parity else run(arguments)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    words = (str(result.header["date"]), str(result.header["device"]), kind, arguments.model, arguments.dtype)
    save_as = report.base_name(*words) if arguments.save else None
    for path in report.write(result, json_path=arguments.json, png_path=arguments.png, save_as=save_as):
        print(f"wrote {path}")
    for failure in failures:
        print(f"WRONG, and therefore without a row: {failure}", file=sys.stderr)
    return 1 if failures else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="tools.bench.train_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", default="160m", help="a size of configs/size/ (default: %(default)s)")
    flags.add_argument("--seq-lengths", type=int, nargs="+", default=[2048], metavar="S")
    flags.add_argument("--batch", type=int, default=1, help="rows of a step (default: %(default)s)")
    flags.add_argument("--window", type=int, default=64, help="n, the nearest keys that a query reads (default: %(default)s)")
    flags.add_argument("--dtype", choices=PRECISIONS, default="fp32", help="bf16 has float32 masters (default: %(default)s)")
    flags.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    flags.add_argument("--threads", type=int, default=2, help="of a CPU (default: %(default)s)")
    names = [arm.name for arm in (*ARMS, *ONE_CORE_ARMS)]
    usual = [arm.name for arm in ARMS]
    flags.add_argument("--arms", nargs="+", choices=names, default=usual, help="ratios are to the first (default: %(default)s)")
    flags.add_argument("--steps", type=int, help="timed steps of each arm (default: what fits into --minutes, but 3 at least)")
    flags.add_argument("--minutes", type=float, default=10, help="for all lengths together (default: %(default)s)")
    flags.add_argument("--parity", type=int, metavar="STEPS", help="compare losses over so many steps instead, at the first length")
    add_text_flags(flags)
    flags.add_argument("--json", type=Path, metavar="OUT")
    flags.add_argument("--png", type=Path, metavar="OUT")
    flags.add_argument("--save", action="store_true", help="JSON, Markdown and PNG into benchmarks/results/")
    flags.add_argument("--memory-of", choices=names, help=argparse.SUPPRESS)
    words = list(sys.argv[1:] if argv is None else argv)
    return flags.parse_args(words, argparse.Namespace(command=shlex.join(["python", "-m", "tools.bench.train_step", *words])))


def run(arguments: argparse.Namespace) -> tuple[report.Result, str, list[str]]:
    """The whole benchmark, each length printed when it is done; the kind of result; and what was found to be wrong."""
    device = checked_device(arguments)
    machine, stream = describe(device), chosen_stream(arguments)
    rate = gemm_tflops(DTYPES[arguments.dtype], device)
    print(f"{machine.title()}. Matrix products: {rate:.3g} TFLOP/s in {arguments.dtype}.", flush=True)
    rows: list[Row] = []
    tables: list[report.Table] = []
    notes: list[str] = []
    failures: list[str] = []
    for length in arguments.seq_lengths:
        found, excluded, wrong = run_length(arguments, stream, length, rate)
        rows += found
        tables.append(table_of(found))
        notes += [f"S = {length}: {note}" for note in excluded]
        failures += [f"S = {length}: {failure}" for failure in wrong]
        print("", tables[-1].text(), *excluded, sep="\n", flush=True)
    facts = {"command": arguments.command, "text": stream.name, "gemm_tflops": {arguments.dtype: rate}}
    title = f"Training step, {arguments.model} in {arguments.dtype}: {machine.title()}"
    result = report.Result(
        header={**machine.as_dict(), **facts},
        body={"rows": [asdict(row) for row in rows]},
        tables=tables,
        notes=[*notes, *(f"wrong: {failure}" for failure in failures)],
        title=title,
        picture=partial(report.draw, panels_of(rows), title),
    )
    return result, "train-step", failures


def run_length(arguments: argparse.Namespace, stream: TokenStream, length: int, rate: float) -> tuple[list[Row], list[str], list[str]]:
    """Rows, who was left out and why, and who was wrong."""
    device = torch.device(arguments.device)
    config = config_for(arguments, stream, length)
    text = text_rows(arguments, stream, length)
    arms, notes = [], []
    for arm in (arm for name in arguments.arms for arm in (*ARMS, *ONE_CORE_ARMS) if arm.name == name):
        reason = refusal(arm, config, batch=arguments.batch, memory_bytes=memory_bytes(device))
        if reason is None:
            arms.append(arm)
        else:
            notes.append(f"{arm.name} does not run: {reason}")
    if not arms:
        raise ValueError("\n".join([f"No arm can run at S = {length}.", *notes]))
    peaks = {arm.name: peak_bytes_apart(arguments, arm, text, stream) for arm in arms} if device.type == "cpu" else {}
    training = Training(config, device)
    errors = {arm.name: training.disagreement(arm, text) for arm in arms}
    limit = AGREEMENT[arguments.dtype]
    failures = [f"{name}: its gradient is off by {error:.2g}, and {limit:g} is allowed" for name, error in errors.items() if not error <= limit]
    arms = [arm for arm in arms if errors[arm.name] <= limit]
    if not arms:
        raise ValueError("\n".join(["Every arm is wrong.", *failures]))
    for arm in arms if device.type == "cuda" else ():
        torch.cuda.reset_peak_memory_stats(device)
        training.step(arm, text)
        peaks[arm.name] = torch.cuda.max_memory_allocated(device)
    times = time_arms(training, arms, text, steps=arguments.steps, budget_s=60 * arguments.minutes / len(arguments.seq_lengths))
    density = torch.isin(text, torch.tensor(stream.separator_ids)).float().mean().item()
    rows = [
        row_of(
            training,
            arm,
            times,
            text,
            size=arguments.model,
            dtype=arguments.dtype,
            baseline=arms[0],
            peak_bytes=peaks[arm.name],
            gemm_tflops=rate,
            density=density,
        )
        for arm in arms
    ]
    return rows, notes, failures


def time_arms(training: Training, arms: Sequence[Arm], text: Tensor, *, steps: int | None, budget_s: float) -> dict[str, list[StepTime]]:
    """The arms in turns, one step each."""
    calls = {arm.name: partial(training.step, arm, text) for arm in arms}
    steps = steps or rounds_for(lambda: interleave(calls, rounds=1), budget_s=budget_s, fewest=FEWEST_ROUNDS)
    interleave(calls, rounds=1)
    return interleave(calls, rounds=steps)


def peak_bytes_apart(arguments: argparse.Namespace, arm: Arm, text: Tensor, stream: TokenStream) -> int:
    """Peak resident memory of two steps of one arm in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "rows.npy"
        np.save(tokens, text.flatten().numpy())
        shape = ("--seq-lengths", text.shape[1] - 1, "--batch", len(text), "--window", arguments.window, "--threads", arguments.threads)
        words = ("--model", arguments.model, "--dtype", arguments.dtype, *shape, "--tokens", tokens, "--separator-ids", *stream.separator_ids)
        command = [sys.executable, "-m", "tools.bench.train_step", "--memory-of", arm.name, *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"The memory of {arm.name} could not be measured (status {done.returncode}; -9 is lack of memory).\n{done.stderr}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def own_peak_bytes(arguments: argparse.Namespace) -> int:
    """What `peak_bytes_apart` runs."""
    (arm,) = (arm for arm in (*ARMS, *ONE_CORE_ARMS) if arm.name == arguments.memory_of)
    stream, length = chosen_stream(arguments), arguments.seq_lengths[0]
    training = Training(config_for(arguments, stream, length), torch.device("cpu"))
    text = text_rows(arguments, stream, length)
    for _ in range(2):
        training.step(arm, text)
    return peak_rss_bytes()


def compare_losses(arguments: argparse.Namespace) -> tuple[report.Result, str, list[str]]:
    """The loss-parity run."""
    device = checked_device(arguments)
    stream, length = chosen_stream(arguments), arguments.seq_lengths[0]
    config = config_for(arguments, stream, length, vocab_size=int(stream.ids.max()) + 1)
    text = stream.rows(arguments.parity * arguments.batch, length + 1, target=None).view(arguments.parity, arguments.batch, length + 1)
    result, failures = compare(config, text, device, model=arguments.model, facts={"command": arguments.command, "text": stream.name})
    print("", *(table.text() for table in result.tables), sep="\n")
    return result, "parity", failures


def checked_device(arguments: argparse.Namespace) -> torch.device:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu.")
    return torch.device(arguments.device)


def config_for(arguments: argparse.Namespace, stream: TokenStream, length: int, *, vocab_size: int = PYTHIA_VOCAB) -> Config:
    return config_of(
        arguments.model,
        length=length,
        window=arguments.window,
        batch=arguments.batch,
        dtype=arguments.dtype,
        separator_ids=stream.separator_ids,
        vocab_size=vocab_size,
        device=arguments.device,
    )


def text_rows(arguments: argparse.Namespace, stream: TokenStream, length: int) -> Tensor:
    return stream.rows(arguments.batch, length + 1, target=arguments.density_target)


if __name__ == "__main__":
    sys.exit(main())

"""Time, memory and utilisation of whole training steps: full attention, the reference's way, and SepLLM.

    python -m tools.bench.train_step --model 160m --seq-lengths 2048 8192 --threads 2 --save
    python -m tools.bench.train_step --engine deepspeed --arms full sepllm transformers litgpt --minutes 30
    python -m tools.bench.train_step --parity 200 --model 14m --seq-lengths 512

A step is the layout of new rows, forward, loss, backward, clipping and AdamW. The arms have the same weights and data, and take turns, step by
step, each in a process of its own. litgpt is optional: pip install --no-deps -r requirements/bench.txt
With --parity nothing is timed: SepLLM's losses over a short training run are compared with those of the plain masked softmax.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron.config.schema import Config
from tools.bench import report
from tools.bench.arms import ALL_ARMS, ARMS, PRECISIONS, PYTHIA_VOCAB, Arm, StepTime, config_of, refusal
from tools.bench.lineup import DTYPES
from tools.bench.machine import describe, gemm_tflops, memory_bytes
from tools.bench.measure import interleave, rounds_for
from tools.bench.parity import compare
from tools.bench.step_rows import Row, panels_of, reached, row_of, table_of
from tools.bench.text import TokenStream, add_text_flags, chosen_stream, usual_rows
from tools.bench.turns import Assignment, Check, Worker
from tools.command import until_stopped

AGREEMENT = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest distance of an arm's loss from the portable core's, and of its gradient over the norm of that."""
FEWEST_ROUNDS = 3


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    try:
        result, kind, failures = compare_losses(arguments) if arguments.parity else run(arguments)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    engine = ("deepspeed",) if arguments.engine == "deepspeed" and not arguments.parity else ()
    report.deliver(result, arguments, kind, arguments.model, arguments.dtype, *engine, *report.lengths(arguments))
    for failure in failures:
        print(f"WRONG, and therefore without a row: {failure}", file=sys.stderr)
    return 1 if failures else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="tools.bench.train_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", default="160m", help="a size of configs/size/ (default: %(default)s)")
    flags.add_argument("--seq-lengths", type=int, nargs="+", default=[2048], metavar="S")
    flags.add_argument("--batch", type=int, help="rows of a step (default: 1; on a GPU as many as make 16384 tokens)")
    flags.add_argument("--window", type=int, default=64, help="n, the nearest keys that a query reads (default: %(default)s)")
    flags.add_argument("--dtype", choices=PRECISIONS, default="fp32", help="bf16 has float32 masters (default: %(default)s)")
    flags.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    flags.add_argument("--threads", type=int, default=2, help="of a CPU (default: %(default)s)")
    usual = [arm.name for arm in ARMS]
    flags.add_argument("--arms", nargs="+", choices=list(ALL_ARMS), default=usual, help="ratios are to the first (default: %(default)s)")
    engines = ("plain", "deepspeed")
    flags.add_argument("--engine", choices=engines, default="plain", help="what every arm's model and AdamW run in (default: %(default)s)")
    flags.add_argument("--steps", type=int, help="timed steps of each arm (default: what fits into --minutes, but 3 at least)")
    flags.add_argument("--minutes", type=float, default=10, help="for all lengths together (default: %(default)s)")
    flags.add_argument("--parity", type=int, metavar="STEPS", help="compare losses over so many steps instead, at the first length")
    add_text_flags(flags)
    return report.parsed(flags, argv, draws=True)


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
    facts = {"command": arguments.command, "text": stream.name, "gemm_tflops": {arguments.dtype: rate}, "engine": arguments.engine}
    through = " through DeepSpeed" if arguments.engine == "deepspeed" else ""
    title = f"Training step{through}, {arguments.model} in {arguments.dtype}: {machine.title()}"
    result = report.Result(
        header={**machine.as_dict(), **facts},
        body={"rows": [asdict(row) for row in rows]},
        tables=tables,
        notes=[*notes, *(f"wrong: {failure.partition(chr(10))[0]}" for failure in failures)],
        title=title,
        picture=partial(report.draw, panels_of(rows), title),
    )
    return result, "train-step", failures


def run_length(arguments: argparse.Namespace, stream: TokenStream, length: int, rate: float) -> tuple[list[Row], list[str], list[str]]:
    """Rows, who was left out and why, and who was wrong."""
    config = config_for(arguments, stream, length)
    text = text_rows(arguments, stream, length)
    arms, notes = admitted(arguments, config, length)
    task = partial(Assignment, config=config, device=arguments.device, engine=arguments.engine, threads=arguments.threads, text=text.numpy())
    with ExitStack() as stack:
        workers = {arm.name: stack.enter_context(Worker(task(arm=arm))) for arm in arms}
        failures = wrong_arms(arms, workers, {pattern: portable(task, pattern) for pattern in dict.fromkeys(arm.pattern for arm in arms)}, arguments)
        failures |= failing_arms([arm for arm in arms if arm.name not in failures], workers)
        arms = [arm for arm in arms if arm.name not in failures]
        if not arms:
            raise ValueError("\n".join(["Every arm is wrong.", *failures.values()]))
        calls = {arm.name: workers[arm.name].step for arm in arms}
        times = time_arms(calls, steps=arguments.steps, budget_s=60 * arguments.minutes / len(arguments.seq_lengths))
        peaks = {arm.name: workers[arm.name].peak_bytes() for arm in arms}
    density = torch.isin(text, torch.tensor(stream.separator_ids)).float().mean().item()
    facts = {"size": arguments.model, "dtype": arguments.dtype, "gemm_tflops": rate, "density": density, "engine": arguments.engine}
    rows = [row_of(config, arm, times, text, baseline=arms[0], peak_bytes=peaks[arm.name], **facts) for arm in arms]
    return rows, [*notes, *(reached(rows) if arguments.device == "cpu" else [])], list(failures.values())


def admitted(arguments: argparse.Namespace, config: Config, length: int) -> tuple[list[Arm], list[str]]:
    """The arms that were asked for and can run, and why the others cannot."""
    wanted = [ALL_ARMS[name] for name in arguments.arms]
    memory = memory_bytes(torch.device(arguments.device))
    reasons = {arm.name: refusal(arm, config, batch=batch_of(arguments, length), memory_bytes=memory) for arm in wanted}
    notes = [f"{name} does not run: {reason}" for name, reason in reasons.items() if reason is not None]
    arms = [arm for arm in wanted if reasons[arm.name] is None]
    if not arms:
        raise ValueError("\n".join([f"No arm can run at S = {length}.", *notes]))
    return arms, notes


def portable(task: Callable[..., Assignment], pattern: Literal["full", "sepllm"]) -> Check:
    """Loss and gradient of a pattern by the portable core: what every arm with that pattern must give."""
    arm = Arm(name="chunked", pattern=pattern, core="chunked", executes="kept")
    with Worker(task(arm=arm)) as worker:
        return worker.check()


def wrong_arms(arms: Sequence[Arm], workers: Mapping[str, Worker], wanted: Mapping[str, Check], arguments: argparse.Namespace) -> dict[str, str]:
    """What is wrong with whom: a loss or a gradient away from the portable core's, or none at all."""
    limit = AGREEMENT[arguments.dtype]
    failures = {}
    for arm in arms:
        try:
            found, right = workers[arm.name].check(), wanted[arm.pattern]
        except ValueError as error:
            failures[arm.name] = str(error)
            continue
        apart = abs(found.loss - right.loss)
        off = float(np.linalg.norm(found.gradient - right.gradient) / np.linalg.norm(right.gradient))
        if not (apart <= limit and off <= limit):
            failures[arm.name] = f"{arm.name}: its loss is off by {apart:.2g}, its gradient by {off:.2g} of itself, and {limit:g} is allowed"
    return failures


def failing_arms(arms: Sequence[Arm], workers: Mapping[str, Worker]) -> dict[str, str]:
    """Why an arm cannot take a step, of those that cannot. This step, in which optimizers and compiled code are made, does not count."""
    failures = {}
    for arm in arms:
        try:
            workers[arm.name].step()
        except ValueError as error:
            failures[arm.name] = str(error)
    return failures


def time_arms(calls: Mapping[str, Callable[[], StepTime]], *, steps: int | None, budget_s: float) -> dict[str, list[StepTime]]:
    """The arms in turns, one step each."""
    steps = steps or rounds_for(lambda: interleave(calls, rounds=1), budget_s=budget_s, fewest=FEWEST_ROUNDS)
    return interleave(calls, rounds=steps)


def compare_losses(arguments: argparse.Namespace) -> tuple[report.Result, str, list[str]]:
    """The loss-parity run."""
    device = checked_device(arguments)
    stream, length = chosen_stream(arguments), arguments.seq_lengths[0]
    config = config_for(arguments, stream, length, vocab_size=int(stream.ids.max()) + 1)
    batch = batch_of(arguments, length)
    text = stream.rows(arguments.parity * batch, length + 1, target=None).view(arguments.parity, batch, length + 1)
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
        batch=batch_of(arguments, length),
        dtype=arguments.dtype,
        separator_ids=stream.separator_ids,
        vocab_size=vocab_size,
        device=arguments.device,
    )


def text_rows(arguments: argparse.Namespace, stream: TokenStream, length: int) -> Tensor:
    return stream.rows(batch_of(arguments, length), length + 1, target=arguments.density_target)


def batch_of(arguments: argparse.Namespace, length: int) -> int:
    return arguments.batch or usual_rows(length, arguments.device)


if __name__ == "__main__":
    sys.exit(until_stopped(main))

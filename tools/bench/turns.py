"""Arms that take turns, each in a process of its own.

One process an arm, because then its largest resident memory is its own, because each has its own weights, optimizer and engine (a process holds
one DeepSpeed world), and because what one framework changes in torch when it is imported touches no other. Only one of them
computes at a time: it is asked for a step, and the next is asked when it has answered. The others sleep on a pipe.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from megatron.config.schema import Config
from tools.bench.arms import Arm, Engine, StepTime, Trainee
from tools.bench.machine import peak_rss_bytes

Question = Literal["check", "step", "memory", "end"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a process is to train."""

    arm: Arm
    config: Config
    device: str
    engine: Engine
    threads: int
    text: NDArray[np.int64]
    """``[B, S + 1]``: the rows of every step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    loss: float
    gradient: NDArray[np.float64]
    """Of the first attention weights."""


class Worker:
    """The process of one arm. ValueError where it fails, with its own words."""

    def __init__(self, assignment: Assignment) -> None:
        self.name = assignment.arm.name
        context = multiprocessing.get_context("spawn")  # a forked child would count this process's memory as its own
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, assignment), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process.is_alive():
            self._process.terminate() if kind else self._connection.send("end")
        self._process.join()
        self._connection.close()

    def check(self) -> Check:
        """Loss and gradient of the rows, before any step."""
        return cast(Check, self._ask("check"))

    def step(self) -> StepTime:
        return cast(StepTime, self._ask("step"))

    def peak_bytes(self) -> int:
        """Largest memory so far: on a CPU resident in the process, Python, torch and the framework included; on a GPU what torch allocated."""
        return cast(int, self._ask("memory"))

    def _ask(self, question: Question) -> object:
        try:
            self._connection.send(question)
            answer = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            raise ValueError(f"{self.name} ended with status {self._process.exitcode} (-9 is lack of memory: give fewer --arms at once).") from None
        if isinstance(answer, str):
            raise ValueError(f"{self.name} failed: {answer.strip().splitlines()[-1]}\n{answer}")
        return answer


def serve(connection: Connection, assignment: Assignment) -> None:
    """The life of a worker: answers until it is told to end. An answer that is a string is what went wrong."""
    torch.set_num_threads(assignment.threads)
    if assignment.arm.is_unfused or assignment.arm.is_native:
        os.environ["SEPLLM_OPS"] = "reference" if assignment.arm.is_unfused else "native"
    device = torch.device(assignment.device)
    answers: dict[str, Callable[[], object]] = {}
    try:
        answers = _answers(assignment, device)
    except Exception:
        failure = traceback.format_exc()
        answers = dict.fromkeys(("check", "step", "memory"), lambda: failure)
    while (question := _next(connection)) != "end":
        try:
            answer = answers[question]()
        except Exception:
            answer = traceback.format_exc()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what torch keeps for the next turn, the others may have until then
        connection.send(answer)
    os._exit(0)  # DeepSpeed's destructors have nothing to save


def _next(connection: Connection) -> Question:
    try:
        return cast(Question, connection.recv())
    except EOFError:  # the parent is gone
        return "end"


def _answers(assignment: Assignment, device: torch.device) -> dict[str, Callable[[], object]]:
    text = torch.from_numpy(assignment.text)
    trainee = Trainee(assignment.arm, assignment.config, device, engine=assignment.engine)

    def check() -> Check:
        loss, gradient = trainee.check(text)
        return Check(loss=loss, gradient=gradient.numpy())

    def step() -> StepTime:
        if device.type == "cuda":
            trainee.step(text)  # fills torch's cache of memory again
        return trainee.step(text)

    return {"check": check, "step": step, "memory": lambda: _peak_bytes(device)}


def _peak_bytes(device: torch.device) -> int:
    return peak_rss_bytes() if device.type == "cpu" else torch.cuda.max_memory_allocated(device)

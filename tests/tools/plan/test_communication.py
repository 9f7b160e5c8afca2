"""What the formulas say that is sent, against what a run on gloo hands to its collectives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron.config.checks import check_startable
from megatron.config.schema import Config
from megatron.data.indexed import IndexedDatasetWriter
from tests.megatron.training.running import tiny_config, without_launcher
from tests.tools.plan.measuring import Account, accounts
from tools.plan.communication import Operation, Traffic, exchanged_keys, step_traffic

SMALL_BYTES = 200
"""Norms, losses and flags, which the formulas leave out."""
STEPS = (1, 3)
"""A case runs twice; what a step hands over is the difference, so that starting and ZeRO 3's first pass do not count."""
COUNTED: dict[str, Operation] = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "reduce_": "reduce",
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "alltoall_base_": "exchange",
    "all_to_all_single": "exchange",
    "send": "send",
}
"""torch's names, of operators with and without a result of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A layout of two processes, and how far the count may be from the formula."""

    name: str
    parallel: dict[str, object]
    precision: str = "fp32"
    data: int = 2
    tolerance: float = 0.01


CASES = (
    Case(name="ZeRO 0", parallel={"zero_stage": 0}),
    Case(name="ZeRO 1", parallel={"zero_stage": 1}),
    Case(name="ZeRO 1, reduced to owners", parallel={"zero_stage": 1, "zero_optimization": {"use_multi_rank_bucket_allreduce": False}}),
    Case(name="ZeRO 1, bf16", parallel={"zero_stage": 1}, precision="bfloat16"),
    Case(name="ZeRO 2", parallel={"zero_stage": 2}),
    Case(name="ZeRO 3", parallel={"zero_stage": 3, "zero_optimization": {"param_persistence_threshold": 0}}, tolerance=0.02),
    Case(name="tensor", parallel={"model_parallel_size": 2}, data=1, tolerance=0.02),
    Case(name="tensor, sequence cut", parallel={"model_parallel_size": 2, "sequence_parallel": True}, data=1, tolerance=0.02),
    Case(name="pipeline", parallel={"pipe_parallel_size": 2}, data=1, tolerance=0.1),
    Case(name="context", parallel={"context_parallel_size": 2}, data=1, tolerance=0.25),
)


def config_of(case: Case, prefix: str, *, steps: int) -> Config:
    return tiny_config(
        prefix,
        Path("unused"),
        world_size=2,
        precision=case.precision,
        batch={"train_batch_size": 4 * case.data, "train_micro_batch_size_per_gpu": 2, "data_parallel_size": case.data},
        parallel={"zero_stage": 0} | case.parallel,
        model={"hidden_dropout": 0.0},
        training={"train_iters": steps, "eval_iters": 0, "eval_interval": 100},
        checkpoint={"save": None, "checkpoint_factor": None},
        data={"split": "1000,0,0"},
    )


def is_built(case: Case) -> bool:
    return not check_startable(config_of(case, "unused", steps=1), has_fp16=False)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Account]:
    """Of each case, the mean account of a process, of a step."""
    folder = tmp_path_factory.mktemp("counted")
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "bytes", np.uint16) as writer:
        for _ in range(20):
            writer.add_document(random.integers(32, 127, 200).tolist())
    built = [case for case in CASES if is_built(case)]
    found = {}
    for cases in (built[:6], built[6:]):  # one start of Python for many runs, and not too many runs for a slow machine's patience
        configs = [config_of(case, str(folder / "bytes"), steps=steps) for case in cases for steps in STEPS]
        with without_launcher():
            runs = accounts(configs, ranks=2, folder=folder) if configs else []
        found |= {case.name: _of_a_step(short, long) for case, short, long in zip(cases, runs[::2], runs[1::2], strict=True)}
    return found


def _of_a_step(short: list[Account], long: list[Account]) -> Account:
    steps, names = STEPS[1] - STEPS[0], {name for account in long for name in account.sent}
    more = {name: sum(account.sent.get(name, 0) for account in long) - sum(account.sent.get(name, 0) for account in short) for name in names}
    return Account(sent={name: num_bytes // steps // len(long) for name, num_bytes in more.items()})


def by_operation(traffic: tuple[Traffic, ...]) -> dict[Operation, float]:
    totals: dict[Operation, float] = {}
    for one in traffic:
        totals[one.operation] = totals.get(one.operation, 0.0) + one.handed_bytes
    return totals


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_hands_over_what_the_formulas_say(case: Case, counted: dict[str, Account]) -> None:
    if case.name not in counted:
        pytest.skip("; ".join(check_startable(config_of(case, "unused", steps=1), has_fp16=False)))
    measured: dict[Operation, int] = {}
    for name, num_bytes in counted[case.name].sent.items():
        if name in COUNTED:
            measured[COUNTED[name]] = measured.get(COUNTED[name], 0) + num_bytes
    expected = by_operation(step_traffic(config_of(case, "unused", steps=1), share=2 / 95))
    for operation in measured.keys() | expected.keys():
        said, seen = expected.get(operation, 0.0), measured.get(operation, 0)
        assert math.isclose(seen, said, rel_tol=case.tolerance, abs_tol=SMALL_BYTES), f"{operation}: {seen} counted, {said:.0f} expected"


@pytest.mark.parametrize("pieces", [2, 4])
@pytest.mark.parametrize("window", [1, 5, 16])
@pytest.mark.parametrize("far_every", [1, 4, 1000])
def test_exchanged_keys_are_those_that_others_hold_and_a_piece_reads(pieces: int, window: int, far_every: int) -> None:
    """Counted key by key. A key is far when its place is a multiple; of the windows, those that are far count once."""
    length = 128
    chunk = length // (2 * pieces)
    received = 0
    for piece in range(pieces):
        own = {place for number in (piece, 2 * pieces - 1 - piece) for place in range(number * chunk, (number + 1) * chunk)}
        read = {key for query in own for key in range(query + 1) if key % far_every == far_every - 1 or query - key < window}
        received += len(read - own)
    expected = exchanged_keys(length=length, pieces=pieces, window=window, share=1 / far_every if far_every < length else 0.0)
    assert received / pieces == pytest.approx(expected, abs=1.5)


def test_an_all_reduce_costs_twice_a_reduce_scatter_on_the_wire() -> None:
    one = {"group": "data", "what": "gradients", "size": 4, "calls": 1, "message_bytes": 400, "stride": 1}
    sent = {operation: Traffic(operation=operation, **one).sent_bytes for operation in ("all_reduce", "reduce_scatter", "send")}  # type: ignore[arg-type]
    assert sent == {"all_reduce": 600, "reduce_scatter": 300, "send": 400}

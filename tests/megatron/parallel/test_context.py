"""Models on pieces of rows, by groups of two and of four processes: losses and all gradients are those of one process on whole rows."""

from __future__ import annotations

import json

import pytest
import torch

from megatron.parallel.context import ContextLayout
from megatron.parallel.mesh import Axis
from sepllm.layout import TokenLayout
from sepllm.pattern import UNBOUNDED, AttentionPattern
from tests.megatron.parallel.context_cases import CASES
from tests.megatron.training.running import run_ranks

Errors = dict[str, dict[str, float]]
COMPUTED = [
    pytest.param(ranks, name, id=f"{ranks} processes, {name}") for ranks in (2, 4) for name, case in CASES.items() if ranks == 2 or case.is_for_four
]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Errors]]:
    """By number of processes and case."""
    folder = tmp_path_factory.mktemp("context")
    results = {}
    for ranks in (2, 4):
        path = folder / f"errors{ranks}.json"
        run_ranks(["-m", "tests.megatron.parallel.context_cases", str(path)], ranks=ranks, folder=folder)
        results[ranks] = json.loads(path.read_text())
    return results


@pytest.mark.parametrize(("ranks", "name"), COMPUTED)
def test_losses_and_gradients_are_those_of_one_process(ranks: int, name: str, errors: dict[int, dict[str, Errors]]) -> None:
    found, dtype = errors[ranks][name], CASES[name].dtype
    if dtype == torch.bfloat16:
        too_large = {name: error for name, error in found["pieces"].items() if error > 2 * found["whole"][name] + 1e-3}
    else:
        too_large = {name: error for name, error in found["against_whole"].items() if error > (1e-12 if dtype == torch.float64 else 1e-6)}
    assert not too_large


def layout_of_piece(rank: int) -> ContextLayout:
    pattern = AttentionPattern(initial_tokens=2, separator_ids=frozenset({1}), windows=(4, UNBOUNDED, 4))
    layout = TokenLayout.from_ids(torch.randint(0, 9, (2, 32)), pattern)
    return ContextLayout.of(layout, Axis(size=2, rank=rank, group=FakeGroup()))  # type: ignore[arg-type]


class FakeGroup:
    group_name = "fake"


def test_layers_with_the_same_window_share_what_was_worked_out() -> None:
    layout = layout_of_piece(0)
    assert layout.ranges(0) is layout.ranges(2)
    assert layout.ranges(0) is not layout.ranges(1)
    assert layout.to("cpu").ranges(0).num_keys == layout.ranges(0).num_keys
    assert layout.to("meta").ranges(0) is not layout.to("meta").ranges(1)


def test_a_piece_has_the_first_and_the_last_chunk_or_those_in_the_middle() -> None:
    assert layout_of_piece(0).columns.tolist() == [*range(8), *range(24, 32)]
    assert layout_of_piece(1).columns.tolist() == list(range(8, 24))
    assert layout_of_piece(1).ids.shape == (2, 16)
    assert layout_of_piece(1).num_queries == 16

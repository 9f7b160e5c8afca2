"""A model in two shards computes what the whole model computes, on two processes of this machine (`sharded.py` is what they run)."""

from __future__ import annotations

import pytest
import torch

from tests.megatron.parallel.sharded import CASES, Compared, Key
from tests.megatron.training.running import run_ranks

EXACT = [name for name, case in CASES.items() if "dropout" not in name]
WAYS = pytest.mark.parametrize("cuts_sequence", [False, True], ids=["tensor", "sequence"])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Key, Compared]:
    """What both processes found, by case, whether the sequence was cut, and dtype."""
    folder = tmp_path_factory.mktemp("sharded")
    run_ranks(["-m", "tests.megatron.parallel.sharded", str(folder / "results.pt")], ranks=2, folder=folder)
    found: dict[Key, Compared] = torch.load(folder / "results.pt", weights_only=False)
    return found


@WAYS
@pytest.mark.parametrize("name", EXACT)
def test_shards_have_the_loss_and_the_gradients_of_the_whole_model(results: dict[Key, Compared], name: str, cuts_sequence: bool) -> None:
    found = results[name, cuts_sequence, torch.float32]
    assert found.losses[1] == pytest.approx(found.losses[0], rel=1e-6)
    assert found.norms[1] == pytest.approx(found.norms[0], rel=1e-6)
    assert {parameter: error for parameter, error in found.differences.items() if error > 1e-6} == {}


@WAYS
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if torch.bfloat16 in case.dtypes])
def test_in_half_precision_shards_err_no_more_than_twice_the_whole_model(results: dict[Key, Compared], name: str, cuts_sequence: bool) -> None:
    found = results[name, cuts_sequence, torch.bfloat16]
    assert found.losses[1] == pytest.approx(found.losses[0], rel=1e-3)
    assert found.errors[1] < 2 * found.errors[0]


def test_the_initial_weights_are_the_same_to_the_bit(results: dict[Key, Compared]) -> None:
    assert [key for key, found in results.items() if not found.same_weights] == []


def test_copies_stay_the_same_to_the_bit(results: dict[Key, Compared]) -> None:
    assert [key for key, found in results.items() if not found.agree] == []


def test_dropout_of_what_all_shards_hold_is_that_of_the_whole_model(results: dict[Key, Compared]) -> None:
    found = results["hidden dropout", False, torch.float32]
    assert found.losses[1] == pytest.approx(found.losses[0], rel=1e-6)
    assert max(found.differences.values()) < 1e-6


@WAYS
@pytest.mark.parametrize("how", ["recomputed", "recomputed selectively"])
def test_recomputing_repeats_the_dropout_of_every_shard(results: dict[Key, Compared], how: str, cuts_sequence: bool) -> None:
    kept, again = (results[name, cuts_sequence, torch.float32] for name in ("dropout", f"dropout, {how}"))
    assert again.losses[1] == kept.losses[1]
    assert again.norms[1] == pytest.approx(kept.norms[1], rel=1e-6)

"""The cache policy against published traces and against a definition that keeps one token after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sepllm.cache import EMPTY, CacheBudget, CachePolicy, Policy, ReferencePolicy, StoredTokens, TokenHistory

CASES: dict[str, dict[str, Any]] = {
    case["name"]: case for case in json.loads((Path(__file__).parents[1] / "golden" / "sepcache.json").read_text(encoding="utf-8"))
}
REFUSED_AT_ONCE = {"violates_budget"}
BROKEN_BY_PADDING = {"padding_breaks_budget"}
TRACES = sorted(set(CASES) - REFUSED_AT_ONCE - BROKEN_BY_PADDING)
LONE_ROWS = [name for name in TRACES if len(CASES[name]["ids"]) == 1 and name != "inner_padding_id"]
SEPARATORS = frozenset({3, 4})


def budget_of(case: dict[str, Any], layer: int) -> CacheBudget:
    sizes = [size[layer] if isinstance(size, list) else size for size in (case["params"][name] for name in "aswc")]
    return CacheBudget(initial=sizes[0], separators=sizes[1], local=sizes[2], total=sizes[3])


def policy_of(case: dict[str, Any], layer: int, *, is_reference: bool) -> Policy:
    params = case["params"]
    shared = {
        "budget": budget_of(case, layer),
        "separator_ids": frozenset(params["seps"]) - {-1},
        "accumulates": params.get("accumulate", True),
        "is_bounded": params.get("use_max", False),
    }
    if is_reference:
        return ReferencePolicy(**shared, padding_id=0, fills_rows=params.get("pad_in_batch", False))
    return CachePolicy(**shared)


def play(case: dict[str, Any], layer: int, *, is_reference: bool) -> list[dict[str, Any]]:
    """The layer after every step of a trace."""
    history = TokenHistory(policy=policy_of(case, layer, is_reference=is_reference))
    ids, states = torch.tensor(case["ids"]), []
    for step in case["steps"]:
        new = torch.tensor(step["tokens"])
        history.advance(ids[:, new], is_text=None, positions=new[None], compresses="never" if step["prefill"] else "before reading")
        assert history.stored is not None
        states.append(
            {
                "kept": history.stored.positions.tolist(),
                "cache_size": int(history.policy.limits(history.stored).max()),
                "sep_cache_size": history.policy.budget.separators + int(history.stored.growth.max()),
                "kept_kv_ratio": [history.kept_sum, history.seen_sum],
            }
            | ({"sep_exrange": history.stored.lockstep.separators_end} if history.stored.lockstep else {})
        )
    return states


def published(case: dict[str, Any], layer: int, state: dict[str, Any]) -> list[dict[str, Any]]:
    """The same fields of the published trace."""
    return [{name: step["layers"][layer][name] for name in state} for step in case["steps"]]


@pytest.mark.parametrize("name", TRACES)
def test_reference_policy_reproduces_published_traces(name: str) -> None:
    case = CASES[name]
    for layer in range(case["params"].get("layers", 1)):
        states = play(case, layer, is_reference=True)
        assert states == published(case, layer, states[0])


@pytest.mark.parametrize("name", LONE_ROWS)
def test_a_row_alone_follows_published_traces_by_default(name: str) -> None:
    case = CASES[name]
    for layer in range(case["params"].get("layers", 1)):
        states = play(case, layer, is_reference=False)
        assert states == published(case, layer, states[0])


def test_budgets_that_do_not_fit_are_refused_when_they_are_made() -> None:
    with pytest.raises(ValueError, match=r"init_cache_size \(1\) \+ sep_cache_size \(4\) \+ local_size \(3\) must be less than cache_size \(8\)"):
        budget_of(CASES["violates_budget"], 0)
    for wrong in ({"initial": -1}, {"separators": -1}, {"local": 0}):
        with pytest.raises(ValueError, match="counts tokens"):
            CacheBudget(**{"initial": 1, "separators": 1, "local": 1, "total": 9} | wrong)


def test_padding_that_breaks_the_reference_is_explained_and_costs_nothing_by_default() -> None:
    case = {**CASES["padding_breaks_budget"]}
    case["steps"] = [{"tokens": list(range(5)), "prefill": True}, *({"tokens": [token], "prefill": False} for token in range(5, 16))]
    with pytest.raises(ValueError, match="2 padding ids"):
        play(case, 0, is_reference=True)
    play(case, 0, is_reference=False)


def kept_by_definition(text: list[int], num_prompt: int, budget: CacheBudget, *, accumulates: bool, is_bounded: bool) -> list[list[int]]:
    """Places that are stored after the prompt and after each further token, one token looked at after the other."""
    stored, block, growth, steps = list(range(num_prompt)), [], 0, [list(range(num_prompt))]
    old_end = budget.initial
    for place in range(num_prompt, len(text)):
        stored.append(place)
        if len(stored) >= budget.total + growth:
            local_start = place - budget.local + 1
            found = [p for p in stored if max(old_end, budget.initial) <= p < local_start and text[p] in SEPARATORS]
            block = block + found if accumulates else found
            if is_bounded:
                block = block[-budget.separators :]
            else:
                growth = max(growth, len(block) - budget.separators)
            stored = list(range(budget.initial)) + block + list(range(local_start, place + 1))
            old_end = local_start
        steps.append(list(stored))
    return steps


def random_text(length: int, seed: int, separators: float = 0.25) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 30, (length,), generator=generator)
    return torch.where(torch.rand(length, generator=generator) < separators, 3, ids).tolist()


def places_of(stored: StoredTokens) -> list[list[int]]:
    return [[place for place in row if place != EMPTY] for row in stored.places.tolist()]


@pytest.mark.parametrize("accumulates", [True, False])
@pytest.mark.parametrize("is_bounded", [True, False])
@pytest.mark.parametrize("sizes", [(2, 3, 4, 12), (0, 1, 1, 4), (3, 2, 6, 30), (1, 4, 2, 8)])
def test_each_row_of_a_padded_batch_keeps_what_it_would_keep_alone(sizes: tuple[int, int, int, int], is_bounded: bool, accumulates: bool) -> None:
    budget = CacheBudget(initial=sizes[0], separators=sizes[1], local=sizes[2], total=sizes[3])
    paddings, num_columns, num_new = [0, 5, 2, 9], 10, 60
    shares = [0.2, 0.0, 0.6, 0.3]
    texts = [random_text(num_columns - padding + num_new, seed, shares[seed]) for seed, padding in enumerate(paddings)]
    ids = torch.tensor([[0] * padding + text for padding, text in zip(paddings, texts, strict=True)])
    is_text = torch.arange(num_columns) >= torch.tensor(paddings)[:, None]
    history = TokenHistory(policy=CachePolicy(budget=budget, separator_ids=SEPARATORS, accumulates=accumulates, is_bounded=is_bounded))
    expected = [
        kept_by_definition(text, num_columns - padding, budget, accumulates=accumulates, is_bounded=is_bounded)
        for padding, text in zip(paddings, texts, strict=True)
    ]
    history.advance(ids[:, :num_columns], is_text=is_text, positions=None, compresses="never")
    for step in range(num_new + 1):
        stored = history.stored
        assert stored is not None
        assert places_of(stored) == [row[step] for row in expected]
        assert stored.counts.tolist() == [len(row[step]) for row in expected]
        tokens = [ids[places >= 0].tolist() for ids, places in zip(stored.ids, stored.places, strict=True)]
        assert tokens == [[text[place] for place in row] for text, row in zip(texts, places_of(stored), strict=True)]
        if step < num_new:
            history.advance(ids[:, num_columns + step, None], is_text=None, positions=None, compresses="before reading")


def test_the_newest_separators_stay() -> None:
    text = [9, 3, 9, 3, 9, 3, 9, 9, 9, 9]
    policy = CachePolicy(budget=CacheBudget(initial=1, separators=2, local=2, total=9), separator_ids=SEPARATORS)
    history = TokenHistory(policy=policy)
    history.advance(torch.tensor([text[:9]]), is_text=None, positions=None, compresses="after reading")
    assert history.step is not None
    assert history.step.reads.width == 9
    assert history.stored is not None
    assert places_of(history.stored) == [[0, 3, 5, 7, 8]]


def test_beams_carry_their_own_tokens() -> None:
    budget = CacheBudget(initial=1, separators=2, local=2, total=7)
    texts = [random_text(30, seed, 0.5) for seed in (1, 2)]
    policy = CachePolicy(budget=budget, separator_ids=SEPARATORS)
    history = TokenHistory(policy=policy)
    history.advance(torch.tensor([text[:4] for text in texts]), is_text=None, positions=None, compresses="never")
    for step in range(4, 20):
        history.advance(torch.tensor([text[step] for text in texts])[:, None], is_text=None, positions=None, compresses="before reading")
    history.select(torch.tensor([1, 1, 0]))
    for step in range(20, 30):
        ids = torch.tensor([texts[row][step] for row in (1, 1, 0)])[:, None]
        history.advance(ids, is_text=None, positions=None, compresses="before reading")
    expected = [kept_by_definition(text, 4, budget, accumulates=True, is_bounded=True)[-1] for text in texts]
    assert history.stored is not None
    assert places_of(history.stored) == [expected[1], expected[1], expected[0]]


class Operators(TorchDispatchMode):
    """The names of torch's operators that were called meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_between_compressions_a_token_is_written_where_it_belongs_and_no_tensor_is_looked_at() -> None:
    policy = CachePolicy(budget=CacheBudget(initial=1, separators=2, local=4, total=64), separator_ids=SEPARATORS)
    history, text = TokenHistory(policy=policy), torch.tensor([random_text(40, seed) for seed in range(2)])
    is_text = torch.arange(20) >= torch.tensor([[0], [5]])
    history.advance(text[:, :20], is_text=is_text, positions=None, compresses="never")
    history.advance(text[:, 20:21], is_text=None, positions=None, compresses="before reading")
    assert history.stored is not None
    columns = history.stored.columns
    with Operators() as operators:
        for place in range(21, 40):
            history.advance(text[:, place : place + 1], is_text=None, positions=None, compresses="before reading")
    assert operators.names <= {"slice", "select", "copy_"}
    assert history.stored.columns is columns
    assert torch.equal(history.stored.ids, text)
    assert places_of(history.stored) == [list(range(40)), list(range(35))]
    assert history.stored.positions.tolist() == history.stored.places.clamp(min=0).tolist()


def test_source_says_where_every_stored_token_was() -> None:
    policy = CachePolicy(budget=CacheBudget(initial=2, separators=3, local=4, total=12), separator_ids=SEPARATORS)
    stored = StoredTokens.none(3)
    ids = torch.tensor([random_text(20, seed) for seed in range(3)])
    is_text = torch.arange(20) >= torch.tensor([[0], [3], [11]])
    stored = stored.append(ids, is_text=is_text)
    compression = policy.compress(stored)
    assert compression is not None
    moved: Tensor = stored.places.gather(1, compression.source)
    is_there = compression.stored.places != EMPTY
    assert torch.equal(moved[is_there], compression.stored.places[is_there])
    assert compression.stored.counts[2] == 9, "a row that is not due keeps all it has"

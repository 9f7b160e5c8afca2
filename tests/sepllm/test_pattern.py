"""The pattern as a value: what it accepts, and its definition of reading."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest

from sepllm.pattern import UNBOUNDED, AttentionPattern, SelfAdjust

LENGTH = 24
IDS = [9, 9, 5, 9, 9, 6, 9, 9, 9, 9, 5, 9] * 2


def read_keys(pattern: AttentionPattern, query: int, *, layer: int = 0) -> list[int]:
    return [key for key in range(LENGTH) if pattern.reads(query=query, key=key, key_id=IDS[key], layer=layer)]


def test_full_attention_reads_every_earlier_key() -> None:
    pattern = AttentionPattern.full(3)
    assert pattern.num_layers == 3
    assert all(read_keys(pattern, query, layer=2) == list(range(query + 1)) for query in range(LENGTH))


def test_window_counts_the_query_itself() -> None:
    pattern = AttentionPattern(windows=(4,))
    assert read_keys(pattern, 0) == [0]
    assert read_keys(pattern, 20) == [17, 18, 19, 20]


def test_streaming_reads_initial_tokens_and_the_window() -> None:
    assert read_keys(AttentionPattern(initial_tokens=3, windows=(2,)), 10) == [0, 1, 2, 9, 10]


def test_sepllm_reads_initial_tokens_separators_and_the_window() -> None:
    pattern = AttentionPattern(initial_tokens=1, separator_ids=(5, 6), windows=(3,))
    assert read_keys(pattern, 20) == [0, 2, 5, 10, 14, 17, 18, 19, 20]


def test_every_layer_has_its_own_window() -> None:
    pattern = AttentionPattern(windows=(1, 3, UNBOUNDED))
    assert [len(read_keys(pattern, 20, layer=layer)) for layer in range(3)] == [1, 3, 21]


def test_grid_begins_one_interval_after_the_initial_tokens() -> None:
    pattern = AttentionPattern(initial_tokens=2, windows=(1, 1), intervals=(4, 6))
    assert read_keys(pattern, 20, layer=0) == [0, 1, 5, 9, 13, 17, 20]
    assert read_keys(pattern, 20, layer=1) == [0, 1, 7, 13, 19, 20]


def test_sliding_width_limits_initial_tokens_and_separators_too() -> None:
    pattern = AttentionPattern(initial_tokens=3, separator_ids=(5, 6), windows=(2,), sliding_width=6)
    assert read_keys(pattern, 20) == [14, 17, 19, 20]
    assert read_keys(pattern, 7) == [1, 2, 5, 6, 7]


def test_no_query_reads_a_later_key() -> None:
    pattern = AttentionPattern(initial_tokens=9, separator_ids=(5, 6, 9), windows=(UNBOUNDED,))
    assert not [(q, k) for q, k in product(range(LENGTH), repeat=2) if k > q and pattern.reads(query=q, key=k, key_id=IDS[k])]


def test_widening_adds_to_every_window_and_stops_at_unbounded() -> None:
    assert AttentionPattern(windows=(1, 8, UNBOUNDED)).widened(1).windows == (2, 9, UNBOUNDED)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (AttentionPattern(windows=(8, 9)), True),
        (AttentionPattern(windows=(8, 7)), False),
        (AttentionPattern(windows=(8, 9), sliding_width=7), True),
        (AttentionPattern(windows=(8, 9), sliding_width=6), False),
    ],
)
def test_full_means_that_window_and_sliding_width_cover_the_sequence(pattern: AttentionPattern, expected: bool) -> None:
    assert pattern.is_full(8) == expected
    every_pair = all(pattern.reads(query=q, key=k, key_id=0, layer=layer) for layer in range(2) for q in range(8) for k in range(q + 1))
    assert every_pair == expected


def test_one_layer_may_be_full_where_another_is_not() -> None:
    pattern = AttentionPattern(windows=(8, 7))
    assert pattern.is_full(8, layer=0)
    assert not pattern.is_full(8, layer=1)


def test_patterns_are_values() -> None:
    first = AttentionPattern(separator_ids=[5, 6, 5], windows=[4])
    second = AttentionPattern(separator_ids=(6, 5), windows=(4,))
    assert first == second
    assert hash(first) == hash(second)
    assert first != AttentionPattern(separator_ids=(6, 5), windows=(4,), softmax=SelfAdjust(kind="raw"))
    with pytest.raises(AttributeError):
        first.initial_tokens = 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"initial_tokens": -1}, "initial_tokens is -1"),
        ({"windows": ()}, r"windows is \(\): give one window of at least 1"),
        ({"windows": (4, 0)}, r"windows is \(4, 0\): give one window of at least 1"),
        ({"separator_ids": (3, -1)}, "separator_ids holds -1"),
        ({"windows": (4, 4), "intervals": (2,)}, "one interval of at least 1 for each of the 2 layers"),
        ({"windows": (4,), "intervals": (0,)}, "one interval of at least 1 for each of the 1 layers"),
    ],
)
def test_what_is_no_pattern_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionPattern(**fields)


def test_pattern_needs_the_standard_library_only() -> None:
    code = "import sys, sepllm.pattern; sys.exit(bool({'torch', 'numpy', 'pydantic', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

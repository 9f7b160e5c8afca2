"""The share of the attention map without torch equals what the layout counts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from megatron.data.indexed import IndexedDatasetWriter
from megatron.launch.kept import kept_ratio, needs_data, read_samples
from sepllm.layout import TokenLayout
from sepllm.pattern import UNBOUNDED, AttentionPattern

PATTERNS = [
    AttentionPattern.full(2),
    AttentionPattern(initial_tokens=3, windows=(8, 8)),
    AttentionPattern(initial_tokens=3, separator_ids={1, 2}, windows=(8, UNBOUNDED, 5)),
    AttentionPattern(initial_tokens=0, separator_ids={1, 2}, windows=(1,)),
    AttentionPattern(initial_tokens=2, windows=(4, 4), intervals=(5, 3)),
    AttentionPattern(initial_tokens=2, separator_ids={1}, windows=(4,), sliding_width=20),
    AttentionPattern(initial_tokens=2, separator_ids={1}, windows=(50,), sliding_width=20),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_share_equals_that_of_the_layout(pattern: AttentionPattern) -> None:
    random.seed(0)
    samples = [[random.randrange(12) for _ in range(65)] for _ in range(3)]
    layout = TokenLayout.from_ids(torch.tensor(samples), pattern)
    kept = sum(int(layout.ranges(layer=layer).kept_pairs().sum()) for layer in range(pattern.num_layers))
    assert kept_ratio(pattern, samples) == pytest.approx(kept / (3 * pattern.num_layers * 65 * 66 // 2))


def test_streamingllm_keeps_the_papers_share_whatever_the_data() -> None:
    pattern = AttentionPattern(initial_tokens=3, windows=(64,) * 12)
    assert not needs_data(pattern, 2048)
    assert round(100 * kept_ratio(pattern, [range(2048)]), 2) == 6.43


def test_samples_are_stretches_of_the_data_across_its_sequences(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "text", "u2") as writer:
        for start in range(0, 40, 4):
            writer.add_document(list(range(start, start + 4)))
    samples = read_samples(str(tmp_path / "text"), 10)
    assert samples[0] == list(range(10))
    assert all(ids == list(range(ids[0], ids[0] + 10)) for ids in samples)
    assert read_samples(str(tmp_path / "text"), 41) == []

from __future__ import annotations

import pytest
import torch

from megatron.training.ratios import Ratios
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern


def test_the_counts_are_those_of_the_mask() -> None:
    ids = torch.randint(0, 20, (3, 40), generator=torch.Generator().manual_seed(0))
    layout = TokenLayout.from_ids(ids, AttentionPattern(initial_tokens=2, separator_ids=(3, 7), windows=(4, 9, 4)))
    masks = [layout.ranges(layer).dense() for layer in range(3)]
    ratios = Ratios.of(layout)
    assert ratios.kept_pairs == sum(int(mask.sum()) for mask in masks)
    assert ratios.kept_keys == sum(int(mask[:, -1].sum()) for mask in masks)
    assert ratios.attention_map == pytest.approx(layout.attention_map_ratio())
    assert ratios.kv == pytest.approx(layout.kv_ratio())


def test_ratios_of_several_batches_weigh_by_their_counts() -> None:
    few, many = Ratios(kept_pairs=1, causal_pairs=2, kept_keys=1, keys=1), Ratios(kept_pairs=1, causal_pairs=8, kept_keys=1, keys=3)
    assert ((few + many).attention_map, (few + many).kv) == (0.2, 0.5)

from __future__ import annotations

import pytest
import torch

from megatron.training.ratios import RatioReport, Ratios
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


@pytest.mark.parametrize(("length", "padding"), [(876, 0), (300, 0), (259, 0), (200, 0), (876, 60)])
def test_fixllm_keeps_as_many_keys_as_the_reference_logged(length: int, padding: int) -> None:
    """Its log of a = 3, n = 256 and an interval of 5 has 382 keys in the last row of 876. Padding is no part of the grid."""
    mask = (torch.arange(length) >= padding)[None]
    pattern = AttentionPattern(initial_tokens=3, windows=(256,), intervals=(5,))
    layout = TokenLayout.from_ids(torch.ones(1, length, dtype=torch.int64), pattern, attention_mask=mask)
    kept, text = Ratios.of(layout).kept_keys, length - padding
    assert kept == (3 + 256 + (text - 256 - 3) // 5 if text > 259 else text)
    assert padding or length != 876 or kept == 382


def test_ratios_of_several_batches_weigh_by_their_counts() -> None:
    few, many = Ratios(kept_pairs=1, causal_pairs=2, kept_keys=1, keys=1), Ratios(kept_pairs=1, causal_pairs=8, kept_keys=1, keys=3)
    assert ((few + many).attention_map, (few + many).kv) == (0.2, 0.5)


def test_chosen_layers_alone_are_counted() -> None:
    ids = torch.randint(0, 20, (2, 30), generator=torch.Generator().manual_seed(0))
    layout = TokenLayout.from_ids(ids, AttentionPattern(initial_tokens=2, separator_ids=(3,), windows=(4, 9, 4)))
    each = [Ratios.of(layout, layers=[layer]) for layer in range(3)]
    assert sum(each, Ratios()) == Ratios.of(layout)
    assert each[0] == each[2]
    assert each[0].kept_pairs == int(layout.ranges(0).dense().sum())


@pytest.mark.parametrize("new", [1, 3])
def test_new_tokens_after_cached_ones_are_all_that_counts(new: int) -> None:
    """The reference divides a decoded token's keys by half their number, and so exceeds 1."""
    ids = torch.randint(0, 20, (2, 30), generator=torch.Generator().manual_seed(0))
    pattern = AttentionPattern(initial_tokens=2, separator_ids=(3, 7), windows=(4, 64))
    whole = TokenLayout.from_ids(ids, pattern)
    layout = TokenLayout.from_ids(ids[:, :-new], pattern).extend(ids[:, -new:])
    ratios = Ratios.of(layout)
    masks = torch.stack([whole.ranges(layer).dense()[:, -new:] for layer in range(2)])
    assert (ratios.kept_pairs, ratios.kept_keys) == (int(masks.sum()), int(masks[:, :, -1].sum()))
    assert (ratios.causal_pairs, ratios.keys) == (2 * 2 * sum(range(31 - new, 31)), 2 * 2 * 30)
    assert ratios.attention_map == pytest.approx(layout.attention_map_ratio())
    assert ratios.kv == pytest.approx(layout.kv_ratio())
    assert ratios.attention_map <= 1


def test_the_reference_example_of_ten_tokens() -> None:
    ids = torch.tensor([[10, 11, 12, 1, 13, 14, 2, 15, 16, 17]])
    pattern = AttentionPattern(initial_tokens=2, separator_ids=(1, 2), windows=(3,))
    prompt = TokenLayout.from_ids(ids, pattern)
    assert Ratios.of(prompt) == Ratios(kept_pairs=45, causal_pairs=55, kept_keys=7, keys=10)
    assert Ratios.of(prompt.extend(torch.tensor([[1]]))) == Ratios(kept_pairs=7, causal_pairs=11, kept_keys=7, keys=11)


def test_counting_waits_for_no_device() -> None:
    """On the meta device there is nothing to wait for, so a number that is read is an error."""
    ids = torch.zeros(2, 30, dtype=torch.long)
    layout = TokenLayout.from_ids(ids, AttentionPattern(initial_tokens=2, separator_ids=(3,), windows=(4, 9)))
    for layer in range(2):
        layout.ranges(layer)
    ratios = Ratios.of(layout.to("meta")) + Ratios.of(layout.to("meta"))
    assert (ratios.causal_pairs, ratios.keys) == (2 * 2 * 2 * 465, 2 * 2 * 2 * 30)
    with pytest.raises(RuntimeError, match="meta"):
        _ = ratios.kv


def test_a_report_comes_each_time_so_many_passes_are_over() -> None:
    said: list[str] = []
    report = RatioReport(every=5, say=said.append)
    few, many = Ratios(kept_pairs=1, causal_pairs=2, kept_keys=1, keys=1), Ratios(kept_pairs=1, causal_pairs=8, kept_keys=1, keys=3)
    for newest in (few, many, few, few):
        report.note(newest, passes=2, what="step")
    assert said == [
        " kept/total of the KV: 1.0000 in this step, 0.6000 so far | kept/total of the attention map: 0.5000 in this step, 0.2500 so far |"
    ]

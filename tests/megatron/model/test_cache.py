"""The growing key and value tensors of generation."""

from __future__ import annotations

import pytest
import torch

from megatron.model.cache import KeyValueCache


@pytest.mark.parametrize("capacity", [0, 3, 100])
def test_cache_holds_everything_appended_in_order(capacity: int) -> None:
    torch.manual_seed(0)
    cache = KeyValueCache(2, capacity=capacity)
    keys, values = torch.randn(2, 37, 3, 4), torch.randn(2, 37, 3, 4)
    start = 0
    for count in (5, 1, 1, 20, 10):
        stop = start + count
        for layer in range(2):
            held = cache.append(layer, keys[:, start:stop] + layer, values[:, start:stop] - layer)
            torch.testing.assert_close(held, (keys[:, :stop] + layer, values[:, :stop] - layer), rtol=0, atol=0)
        start = stop
        assert cache.length == stop


def test_room_doubles_so_that_appending_one_token_rarely_copies() -> None:
    cache = KeyValueCache(1)
    places = set()
    for _ in range(1000):
        keys, _values = cache.append(0, torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
        places.add(keys.data_ptr())
    assert len(places) <= 11


def test_reserved_capacity_never_moves() -> None:
    cache = KeyValueCache(1, capacity=50)
    places = {cache.append(0, torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))[0].data_ptr() for _ in range(50)}
    assert len(places) == 1


def test_crop_forgets_the_last_columns() -> None:
    cache = KeyValueCache(1)
    keys = torch.randn(1, 9, 1, 2)
    cache.append(0, keys, keys)
    cache.crop(4)
    assert cache.length == 4
    held, _ = cache.append(0, keys[:, 8:], keys[:, 8:])
    torch.testing.assert_close(held, torch.cat([keys[:, :4], keys[:, 8:]], 1), rtol=0, atol=0)


def test_select_reorders_and_repeats_rows() -> None:
    cache = KeyValueCache(2)
    keys = torch.randn(3, 5, 1, 2)
    cache.append(0, keys, keys)
    cache.append(1, keys, keys)
    rows = torch.tensor([2, 0, 0, 1])
    cache.select(rows)
    held, _ = cache.append(1, keys[rows, :1], keys[rows, :1])
    torch.testing.assert_close(held, torch.cat([keys[rows], keys[rows, :1]], 1), rtol=0, atol=0)

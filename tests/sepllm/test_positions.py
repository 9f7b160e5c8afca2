"""Rotary tables, ALiBi slopes and sinusoidal embeddings against golden vectors and their formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sepllm.positions import alibi_slopes, apply_rotary, apply_rotary_once_more, rotary_frequencies, rotary_table, sinusoidal_table

GOLDEN = Path(__file__).parents[1] / "golden"
INDEX = json.loads((GOLDEN / "tensors_index.json").read_text())
BIPE = json.loads((GOLDEN / "bipe.json").read_text())


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.load(GOLDEN / "tensors.npz")[name])


def rotated(x: Tensor, positions: Tensor, *, dims: int, base: float = 10000.0) -> Tensor:
    """``x [T, H]`` as one head."""
    cos, sin = rotary_table(positions[None], rotary_dims=dims, base=base, dtype=x.dtype)
    return apply_rotary(x[None, :, None], cos, sin)[0, :, 0]


@pytest.mark.parametrize("name", ["rope_plain", "rope_bipe"])
def test_rotary_gives_the_golden_vectors(name: str) -> None:
    x, expected = golden("rope_x"), golden(name)
    positions = torch.arange(8) if name == "rope_plain" else torch.tensor(INDEX["rope"]["inter"][0])
    torch.testing.assert_close(rotated(x, positions, dims=6, base=INDEX["rope"]["base"]), expected.to(x.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dims", [4, 8])
def test_rotary_once_more_is_rotary_forward_and_backward(dims: int) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(2, 3, 7, 8, dtype=torch.float64).transpose(1, 2), torch.randn(2, 7, 3, 8, dtype=torch.float64)
    cos, sin = rotary_table(torch.randint(-50, 50, (2, 7)), rotary_dims=dims, base=100.0, dtype=x.dtype)
    both = []
    for function in (apply_rotary, apply_rotary_once_more):
        leaf = x.clone().requires_grad_()
        turned = function(leaf, cos, sin)
        both.append((turned, *torch.autograd.grad((turned * weights).sum(), leaf)))
    torch.testing.assert_close(both[1], both[0])


def test_rotary_turns_each_pair_of_dimensions_as_a_complex_number() -> None:
    torch.manual_seed(0)
    x, positions = torch.randn(7, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 50, 3, 2047, 9])
    frequency = torch.tensor([10000.0 ** (-2 * pair / 8) for pair in range(4)], dtype=torch.float64)
    turned = torch.complex(x[:, :4], x[:, 4:]) * torch.exp(1j * positions[:, None] * frequency)
    torch.testing.assert_close(rotated(x, positions, dims=8), torch.cat([turned.real, turned.imag], 1), rtol=1e-4, atol=2e-4)


def test_partial_rotary_passes_the_other_dimensions_through() -> None:
    x, positions = torch.randn(5, 16), torch.arange(5)
    out = rotated(x, positions, dims=4)
    assert torch.equal(out[:, 4:], x[:, 4:])
    torch.testing.assert_close(out[:, :4], rotated(x[:, :4], positions, dims=4))


def test_rotated_products_depend_on_the_distance_only() -> None:
    q, k = torch.randn(1, 8, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64)
    products = [(rotated(q, torch.tensor([at + 5]), dims=8) * rotated(k, torch.tensor([at]), dims=8)).sum() for at in (0, 3, 100)]
    torch.testing.assert_close(torch.stack(products), products[0].expand(3), rtol=1e-4, atol=1e-4)


def test_fp16_angles_are_coarse_at_far_positions() -> None:
    positions = torch.tensor([[2000]])
    tables = [
        rotary_table(positions, rotary_dims=16, base=10000.0, dtype=torch.float32, angle_dtype=dtype) for dtype in (torch.float32, torch.float16)
    ]
    expected = (torch.tensor(2000.0).half() * rotary_frequencies(16, base=10000.0).half()).cos().float()
    torch.testing.assert_close(tables[1][0][0, 0, :8], expected, rtol=0, atol=0)
    assert (tables[0][0] - tables[1][0]).abs().max() > 0.03


@pytest.mark.parametrize("heads", BIPE["alibi_slopes"])
def test_alibi_slopes_are_the_golden_ones(heads: str) -> None:
    torch.testing.assert_close(alibi_slopes(int(heads)), torch.tensor(BIPE["alibi_slopes"][heads]), rtol=1e-6, atol=0)


def test_sinusoids_have_sines_in_the_first_half_and_cosines_in_the_second() -> None:
    positions = torch.tensor([[0, 1, 7], [3, 0, 2000]])
    table = sinusoidal_table(positions, 6)
    assert table.shape == (2, 3, 6)
    for b in range(2):
        for t in range(3):
            angles = [int(positions[b, t]) * 10000.0 ** (-2 * pair / 6) for pair in range(3)]
            expected = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
            torch.testing.assert_close(table[b, t], expected, rtol=1e-4, atol=2e-4)

"""Norms against their formulas."""

from __future__ import annotations

import pytest
import torch

from megatron.model.norms import RMSNorm, ScaleNorm, make_norm

KINDS = ["layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm"]


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def test_layernorm_is_centred_and_scaled() -> None:
    norm = make_norm("layernorm", 6, epsilon=1e-5)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    x = torch.randn(3, 6)
    centred = x - x.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected)


def test_rmsnorm_divides_by_the_root_of_the_mean_square() -> None:
    norm = RMSNorm(6, epsilon=0.1)
    norm.scale.data.normal_()
    x = torch.randn(3, 6)
    torch.testing.assert_close(norm(x), x / ((x**2).mean(1, keepdim=True) + 0.1).sqrt() * norm.scale)


def test_scalenorm_gives_vectors_of_length_g() -> None:
    norm = ScaleNorm(6, epsilon=1e-5)
    norm.g.data.fill_(3.0)
    torch.testing.assert_close(norm(torch.randn(4, 6)).norm(dim=1), torch.full((4,), 3.0))
    assert norm(torch.zeros(1, 6)).isfinite().all()


def test_non_parametric_layernorm_has_no_parameters() -> None:
    norm = make_norm("non_parametric_layernorm", 6, epsilon=1e-5)
    assert not list(norm.parameters())
    out = norm(torch.randn(3, 6))
    torch.testing.assert_close(out.mean(1), torch.zeros(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_norm_over_two_axes_is_the_norm_of_the_flattened_axes(kind: str) -> None:
    x = torch.randn(2, 5, 4, 6)
    joint, flat = make_norm(kind, (4, 6), epsilon=1e-5), make_norm(kind, 24, epsilon=1e-5)
    torch.testing.assert_close(joint(x).flatten(2), flat(x.flatten(2)))


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_half_precision_inputs_do_not_overflow(kind: str) -> None:
    norm = make_norm(kind, 64, epsilon=1e-5)
    x = torch.randn(2, 64) * 1000
    out = norm.half()(x.half())
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), norm.float()(x), rtol=2e-3, atol=2e-3)

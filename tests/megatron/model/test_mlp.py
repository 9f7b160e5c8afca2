"""Activations of the MLP against their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from megatron.config.schema import ModelConfig
from megatron.model.mlp import APPROXIMATE, GATED, MLP, PLAIN

MakeConfig = Callable[..., ModelConfig]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "softsign": lambda x: x / (1 + x.abs()),
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
    "geglu": gelu,
    "reglu": lambda x: x.clamp(min=0),
    "swiglu": lambda x: x / (1 + torch.exp(-x)),
    "bilinear": lambda x: x,
    "glu": lambda x: 1 / (1 + torch.exp(-x)),
}


def test_every_activation_of_the_schema_is_built() -> None:
    assert set(get_args(ModelConfig.model_fields["activation"].annotation)) == set(PLAIN) | set(APPROXIMATE) | set(GATED) == set(FORMULAS)


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_mlp_is_its_formula(activation: str, has_bias: bool, make_config: MakeConfig) -> None:
    torch.manual_seed(0)
    config = make_config(activation=activation, use_bias_in_mlp=has_bias)
    mlp = MLP(config).double()
    x = torch.randn(2, 3, 48, dtype=torch.float64)
    wide = x @ mlp.linear1.weight.T + (mlp.linear1.bias if has_bias else 0)
    formula = FORMULAS[activation]
    inner = wide[..., :96] * formula(wide[..., 96:]) if activation in GATED else formula(wide)
    assert inner.shape[-1] == config.intermediate_size
    torch.testing.assert_close(mlp(x), inner @ mlp.linear2.weight.T + (mlp.linear2.bias if has_bias else 0))

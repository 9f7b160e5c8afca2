"""The feed-forward half of a block: linear1, activation, linear2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron.config.schema import ModelConfig
from megatron.parallel.linear import ColumnLinear, RowLinear
from megatron.parallel.regions import TensorParallel
from sepllm.ops.gelu import Approximate, bias_gelu, gelu_linear


def _gelu(x: Tensor) -> Tensor:
    return bias_gelu(x, None, approximate="none")


def _identity(x: Tensor) -> Tensor:
    return x


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "softsign": functional.softsign,
    "swish": functional.silu,
    "mish": functional.mish,
    "silu": functional.silu,
}
GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "geglu": _gelu,
    "reglu": functional.relu,
    "swiglu": functional.silu,
    "bilinear": _identity,
    "glu": torch.sigmoid,
}
"""Of a gated activation, what is applied to the gate (arXiv 2002.05202)."""


APPROXIMATE: dict[str, Approximate] = {"gelu": "none", "gelu_tanh": "tanh"}
"""Activations that linear2 computes itself, keeping their input alone for the backward pass."""


def linear1_rows(config: ModelConfig) -> int:
    """Rows of linear1: the width of the MLP, twice where half of it is the gate."""
    return config.intermediate_size * (2 if config.activation in GATED else 1)


class MLP(nn.Module):
    """``linear2(activation(linear1(x)))``. A gated linear1 holds ``[up ; gate]`` and yields ``up * activation(gate)``.

    Under the parallel residual the result is this shard's part, which the block sums with that of attention.
    """

    def __init__(self, config: ModelConfig, *, parallel: TensorParallel = TensorParallel()) -> None:
        super().__init__()
        self.is_gated = config.activation in GATED
        self.activation = (GATED if self.is_gated else PLAIN).get(config.activation, _identity)
        has_bias = config.use_bias_in_mlp
        self.linear1 = ColumnLinear(config.hidden_size, linear1_rows(config), bias=has_bias, parallel=parallel)
        kind = partial(GeluRowLinear, approximate=APPROXIMATE[config.activation]) if config.activation in APPROXIMATE else RowLinear
        self.linear2 = kind(config.intermediate_size, config.hidden_size, bias=has_bias, parallel=parallel, is_part=config.gpt_j_residual)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        wide = self.linear1(hidden_BTD)
        if self.is_gated:
            up, gate = wide.chunk(2, -1)
            return self.linear2(up * self.activation(gate))
        return self.linear2(self.activation(wide))


class GeluRowLinear(RowLinear):
    """`RowLinear` of ``gelu(x)``."""

    def __init__(self, in_features: int, out_features: int, *, approximate: Approximate, **how: Any) -> None:
        super().__init__(in_features, out_features, **how)
        self.approximate = approximate

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return gelu_linear(x, self.weight, bias, approximate=self.approximate)

"""The feed-forward half of a block: linear1, activation, linear2."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron.config.schema import ModelConfig
from megatron.parallel.linear import ColumnLinear, RowLinear
from megatron.parallel.regions import TensorParallel
from sepllm.ops.gelu import bias_gelu


def _gelu(x: Tensor) -> Tensor:
    return bias_gelu(x, None, approximate="none")


def _gelu_tanh(x: Tensor) -> Tensor:
    return bias_gelu(x, None, approximate="tanh")


def _identity(x: Tensor) -> Tensor:
    return x


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
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
        self.activation = GATED[config.activation] if self.is_gated else PLAIN[config.activation]
        has_bias = config.use_bias_in_mlp
        self.linear1 = ColumnLinear(config.hidden_size, linear1_rows(config), bias=has_bias, parallel=parallel)
        self.linear2 = RowLinear(config.intermediate_size, config.hidden_size, bias=has_bias, parallel=parallel, is_part=config.gpt_j_residual)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        wide = self.linear1(hidden_BTD)
        if self.is_gated:
            up, gate = wide.chunk(2, -1)
            return self.linear2(up * self.activation(gate))
        return self.linear2(self.activation(wide))

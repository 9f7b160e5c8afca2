"""Initial weights. Each parameter is drawn whole, in fp32 on the CPU, by a generator of its own that is seeded by the run's seed and
the parameter's name: the values depend on no parallel layout, no device, no dtype and no order of construction."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.model.names import weight_name
from megatron.parallel.mesh import Axis
from megatron.parallel.shards import split, whole_shape

Draw = Callable[[Tensor, ModelConfig, Generator], Tensor]


def _normal(std: Callable[[ModelConfig], float]) -> Draw:
    return lambda empty, config, generator: empty.normal_(0.0, std(config), generator=generator)


def _orthogonal(gain: Callable[[ModelConfig], float]) -> Draw:
    return lambda empty, config, generator: nn.init.orthogonal_(empty, gain(config), generator=generator)


METHODS: dict[str, Draw] = {
    "normal": _normal(lambda config: config.init_method_std),
    "scaled_normal": _normal(lambda config: config.init_method_std / math.sqrt(2 * config.num_layers)),
    "single_residual_scaled_normal": _normal(lambda config: config.init_method_std / math.sqrt(config.num_layers)),
    "small_init": _normal(lambda config: math.sqrt(2 / (5 * config.hidden_size))),
    "wang_init": _normal(lambda config: 2 / (config.num_layers * math.sqrt(config.hidden_size))),
    "xavier_uniform": lambda empty, config, generator: nn.init.xavier_uniform_(empty, generator=generator),
    "xavier_normal": lambda empty, config, generator: nn.init.xavier_normal_(empty, generator=generator),
    "orthogonal": _orthogonal(lambda config: math.sqrt(2)),
    "scaled_orthogonal": _orthogonal(lambda config: math.sqrt(2 / config.num_layers)),
}
"""How a matrix is drawn, by its name in the YAML. ``small_init`` is arXiv 1910.05895's, ``wang_init`` Mesh Transformer JAX's."""

RESIDUAL_OUTPUTS = ("attention.dense.weight", "mlp.linear2.weight")
"""Matrices that write to the residual stream: `output_layer_init_method`. All others: `init_method`."""


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, *, seed: int, shards: Axis = Axis()) -> None:
    """Give every parameter of ``model`` its initial value, cast to the parameter's dtype: its piece, where ``shards`` have one each."""
    for name, parameter in model.named_parameters():
        name = weight_name(name)
        value = initial_value(name, whole_shape(name, parameter, config, ranks=shards.size), config, seed=seed)
        parameter.copy_(split(name, value, config, ranks=shards.size)[shards.rank])


def initial_value(name: str, shape: Sequence[int], config: ModelConfig, *, seed: int) -> Tensor:
    """The initial value of the whole (unsharded) parameter ``name``, as in the model's state dict. fp32 on the CPU."""
    if name.endswith("bias"):
        return torch.zeros(*shape, device="cpu")
    if "norm." in name:
        return torch.ones(*shape, device="cpu")
    method = config.output_layer_init_method if name.endswith(RESIDUAL_OUTPUTS) else config.init_method
    if method not in METHODS:
        raise ValueError(f"init_method {method!r} is not known: use one of {', '.join(METHODS)}.")
    generator = Generator("cpu").manual_seed(parameter_seed(name, seed))
    return METHODS[method](torch.empty(*shape, device="cpu", dtype=torch.float32), config, generator)


def parameter_seed(name: str, seed: int) -> int:
    """A number below 2^63 that depends on both, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") >> 1

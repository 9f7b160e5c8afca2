from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megatron.config.schema import OptimizerConfig
from megatron.optim.build import build_optimizer, set_learning_rate
from megatron.optim.groups import ParameterGroup, parameter_groups

CPU = torch.device("cpu")


def one_weight(start: list[float], gradient: list[float]) -> nn.Parameter:
    weight = nn.Parameter(torch.tensor(start))
    weight.grad = torch.tensor(gradient)
    return weight


def stepped(config: OptimizerConfig, *, lr: float = 0.1, decay: float = 0.0, steps: int = 1) -> Tensor:
    weight = one_weight([1.0, -2.0], [0.5, -0.25])
    optimizer = build_optimizer([ParameterGroup(params=[weight], weight_decay=decay)], config, CPU)
    set_learning_rate(optimizer, lr)
    for _ in range(steps):
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("kind", ["adam", "adamw", "cpu_adam"])
def test_adam_decays_the_weights_beside_the_gradient(kind: str) -> None:
    moved = stepped(OptimizerConfig(type=kind), decay=0.5)
    assert torch.allclose(moved, torch.tensor([1.0, -2.0]) * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([1.0, -1.0]))


def test_adam_w_mode_false_decays_through_the_gradient() -> None:
    moved = stepped(OptimizerConfig(type="adam", params={"adam_w_mode": False}), decay=0.5)
    assert torch.allclose(moved, torch.tensor([1.0, -2.0]) - 0.1 * torch.tensor([1.0, -1.0]))


def test_lion_steps_by_the_sign_of_the_blended_momentum() -> None:
    betas, lr, decay = (0.9, 0.99), 0.1, 0.5
    weight, momentum, gradient = torch.tensor([1.0, -2.0]), torch.zeros(2), torch.tensor([0.5, -0.25])
    for _ in range(3):
        direction = (betas[0] * momentum + (1 - betas[0]) * gradient).sign()
        weight = weight * (1 - lr * decay) - lr * direction
        momentum = betas[1] * momentum + (1 - betas[1]) * gradient
    assert torch.allclose(stepped(OptimizerConfig(type="lion", betas=betas), lr=lr, decay=decay, steps=3), weight)


def test_sgd_follows_the_gradient() -> None:
    assert torch.allclose(stepped(OptimizerConfig(type="sgd")), torch.tensor([1.0, -2.0]) - 0.1 * torch.tensor([0.5, -0.25]))


def test_adagrad_is_torchs() -> None:
    weight = one_weight([1.0, -2.0], [0.5, -0.25])
    theirs = torch.optim.Adagrad([weight], lr=0.1, eps=1e-3, weight_decay=0.5)
    for _ in range(3):
        theirs.step()
    assert torch.allclose(stepped(OptimizerConfig(type="adagrad", eps=1e-3), decay=0.5, steps=3), weight.detach(), rtol=1e-6)


def test_the_rate_of_a_scaled_group_is_scaled() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = build_optimizer(parameter_groups(model, 0.0, mup_width_scale=2.0), OptimizerConfig(), CPU)
    set_learning_rate(optimizer, 0.1)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.05, 0.1]


def test_an_unknown_type_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="'sm3' is not one that this project builds: use one of adagrad, adam"):
        build_optimizer([], OptimizerConfig(type="sm3"), CPU)


def test_a_parameter_that_the_type_does_not_know_is_an_error() -> None:
    with pytest.raises(ValueError, match="nesterov mean nothing to type 'adam'"):
        build_optimizer([], OptimizerConfig(params={"nesterov": True}), CPU)

"""Initial weights: their distributions, and what they do not depend on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from megatron.config.schema import ModelConfig
from megatron.model.gpt import GPTModel
from megatron.model.init import initial_value, initialise

MakeConfig = Callable[..., ModelConfig]

MATRIX = "sequential.2.mlp.linear1.weight"
LAYERS, WIDTH = 8, 256
STANDARD_DEVIATIONS = {
    "normal": 0.02,
    "scaled_normal": 0.02 / math.sqrt(2 * LAYERS),
    "single_residual_scaled_normal": 0.02 / math.sqrt(LAYERS),
    "small_init": math.sqrt(2 / (5 * WIDTH)),
    "wang_init": 2 / (LAYERS * math.sqrt(WIDTH)),
    "xavier_uniform": math.sqrt(2 / (1024 + WIDTH)),
    "xavier_normal": math.sqrt(2 / (1024 + WIDTH)),
}


@pytest.mark.parametrize("method", STANDARD_DEVIATIONS)
def test_method_has_its_mean_and_standard_deviation(method: str, make_config: MakeConfig) -> None:
    config = make_config(num_layers=LAYERS, hidden_size=WIDTH, init_method=method)
    value = initial_value(MATRIX, (1024, WIDTH), config, seed=1)
    std = STANDARD_DEVIATIONS[method]
    assert abs(value.mean().item()) < 4 * std / math.sqrt(value.numel())
    assert value.std().item() == pytest.approx(std, rel=0.01)


def test_xavier_uniform_is_bounded(make_config: MakeConfig) -> None:
    value = initial_value(MATRIX, (1024, WIDTH), make_config(init_method="xavier_uniform"), seed=1)
    assert value.abs().max().item() <= math.sqrt(6 / (1024 + WIDTH))


@pytest.mark.parametrize(("method", "gain"), [("orthogonal", math.sqrt(2)), ("scaled_orthogonal", math.sqrt(2 / LAYERS))])
def test_orthogonal_columns_have_the_gain_as_length(method: str, gain: float, make_config: MakeConfig) -> None:
    value = initial_value(MATRIX, (96, 32), make_config(num_layers=LAYERS, init_method=method), seed=1)
    torch.testing.assert_close(value.T @ value, gain**2 * torch.eye(32), rtol=0, atol=1e-5)


def test_output_method_serves_what_writes_to_the_residual_stream(make_config: MakeConfig) -> None:
    model = GPTModel(make_config(hidden_size=256, intermediate_size=1024, init_method="normal", output_layer_init_method="wang_init"))
    initialise(model, model.config, seed=3)
    stds = {name: parameter.std().item() for name, parameter in model.named_parameters() if parameter.ndim == 2}
    for name, std in stds.items():
        writes = name.endswith(("attention.dense.weight", "mlp.linear2.weight"))
        assert std == pytest.approx(2 / (2 * 16) if writes else 0.02, rel=0.02), name


def test_biases_are_zero_and_norms_do_nothing(make_config: MakeConfig) -> None:
    model = GPTModel(make_config(use_qk_layernorm=True))
    initialise(model, model.config, seed=3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm." in name:
            assert (parameter == 1).all(), name


def test_weights_depend_on_the_seed_and_the_name_only(make_config: MakeConfig) -> None:
    config = make_config()
    deep = GPTModel(make_config(num_layers=5, output_layer_init_method="normal"))
    shallow = GPTModel(make_config(num_layers=2, output_layer_init_method="normal"))
    torch.manual_seed(5)
    initialise(deep, deep.config, seed=3)
    torch.rand(7)
    initialise(shallow, shallow.config, seed=3)
    deep_weights = dict(deep.named_parameters())
    for name, parameter in shallow.named_parameters():
        if name.startswith(("sequential.0", "sequential.2", "sequential.3")):
            assert torch.equal(parameter, deep_weights[name]), name
    assert not torch.equal(initial_value(MATRIX, (96, 48), config, seed=3), initial_value(MATRIX, (96, 48), config, seed=4))


def test_two_parameters_never_share_their_numbers(make_config: MakeConfig) -> None:
    model = GPTModel(make_config(num_layers=6, num_attention_heads=4))
    initialise(model, model.config, seed=3)
    firsts = [parameter.flatten()[0].item() for parameter in model.parameters() if parameter.ndim == 2]
    assert len(set(firsts)) == len(firsts)


def test_initialising_leaves_the_global_generator_alone(make_config: MakeConfig) -> None:
    model = GPTModel(make_config())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    initialise(model, model.config, seed=3)
    assert torch.equal(torch.rand(3), expected)


def test_more_padding_rows_leave_the_other_embeddings_as_they_are(make_config: MakeConfig) -> None:
    name = "sequential.0.word_embeddings.weight"
    small, large = (initial_value(name, (rows, 48), make_config(), seed=3) for rows in (96, 128))
    assert torch.equal(small, large[:96])


def test_half_precision_weights_are_the_fp32_draw_rounded(make_config: MakeConfig) -> None:
    config = make_config()
    full, half = GPTModel(config), GPTModel(config).to(torch.bfloat16)
    initialise(full, config, seed=3)
    initialise(half, config, seed=3)
    for (name, wide), narrow in zip(full.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(wide.bfloat16(), narrow), name


def test_unknown_method_is_refused_with_the_known_ones(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"'gaussian' is not known: use one of normal, scaled_normal"):
        initial_value(MATRIX, (4, 4), make_config(init_method="gaussian"), seed=1)

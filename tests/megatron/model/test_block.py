"""The three forms of a block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron.config.schema import ModelConfig
from megatron.model.block import Block
from megatron.model.passes import LayerPass
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern, Standard

MakeConfig = Callable[..., ModelConfig]
LAYOUT = TokenLayout.from_ids(torch.zeros(2, 6, dtype=torch.int64), AttentionPattern.full(2))
SHARED = LayerPass(ranges=LAYOUT.ranges(0), core="auto", softmax=Standard(), rotary=None, bias=None, cache=None)


def random_block(config: ModelConfig) -> Block:
    torch.manual_seed(0)
    block = Block(config, layer=0)
    for parameter in block.parameters():
        parameter.data.normal_(std=0.3)
    return block


def test_parallel_residual_adds_both_branches_of_the_input(make_config: MakeConfig) -> None:
    block, x = random_block(make_config()), torch.randn(2, 6, 48)
    expected = x + block.attention(block.input_layernorm(x), SHARED) + block.mlp(block.post_attention_layernorm(x))
    torch.testing.assert_close(block(x, SHARED), expected)


def test_fused_norms_are_the_two_norms(make_config: MakeConfig) -> None:
    fused, plain = random_block(make_config()), random_block(make_config(layernorm_fusion=False))
    x = torch.randn(2, 6, 48)
    torch.testing.assert_close(fused(x, SHARED), plain(x, SHARED))


def test_tied_parallel_residual_has_one_norm(make_config: MakeConfig) -> None:
    block, x = random_block(make_config(gpt_j_tied=True)), torch.randn(2, 6, 48)
    assert not [name for name in block.state_dict() if name.startswith("post_attention_layernorm")]
    normed = block.input_layernorm(x)
    torch.testing.assert_close(block(x, SHARED), x + block.attention(normed, SHARED) + block.mlp(normed))


@pytest.mark.parametrize("gpt_j_tied", [False, True])
def test_serial_residual_feeds_attention_to_the_mlp(gpt_j_tied: bool, make_config: MakeConfig) -> None:
    block, x = random_block(make_config(gpt_j_residual=False, gpt_j_tied=gpt_j_tied)), torch.randn(2, 6, 48)
    y = x + block.attention(block.input_layernorm(x), SHARED)
    torch.testing.assert_close(block(x, SHARED), y + block.mlp(block.post_attention_layernorm(y)))


@pytest.mark.parametrize("parallel", [True, False])
def test_dropout_falls_on_each_branch_after_its_bias(parallel: bool, make_config: MakeConfig) -> None:
    block, x = random_block(make_config(gpt_j_residual=parallel, hidden_dropout=0.5)), torch.zeros(2, 6, 48)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.fill_({"attention.dense.bias": 1.0, "mlp.linear2.bias": 10.0}.get(name, 0.0))
    values = set(block(x, SHARED).unique().tolist())
    assert values == {0.0, 2.0, 20.0, 22.0}
    assert set(block.eval()(x, SHARED).unique().tolist()) == {11.0}

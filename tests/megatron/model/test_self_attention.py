"""The packed projection, norms of queries and keys, and scaled scores of one attention layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.config.schema import ModelConfig
from megatron.model.passes import LayerPass
from megatron.model.self_attention import SelfAttention
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern

MakeConfig = Callable[..., ModelConfig]


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def random_attention(config: ModelConfig, **options: object) -> SelfAttention:
    attention = SelfAttention(config, **{"layer": 0} | options)
    for parameter in attention.parameters():
        parameter.data.normal_(std=0.3)
    return attention


def plain_pass(rows: int, length: int, pattern: AttentionPattern, *, core: str = "auto") -> LayerPass:
    layout = TokenLayout.from_ids(torch.randint(0, 9, (rows, length)), pattern)
    return LayerPass(ranges=layout.ranges(0), core=core, softmax=pattern.softmax, rotary=None, bias=None, cache=None)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head of one row, ``[T, H]``."""
    scores = (q @ k.T / math.sqrt(q.shape[1])).masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)
    return scores.softmax(1) @ v


def test_rows_of_the_projection_are_q_k_v_of_each_head(make_config: MakeConfig) -> None:
    config = make_config()
    attention = random_attention(config)
    x = torch.randn(1, 7, 48)
    packed = attention.query_key_value(x)[0]
    heads = []
    for head in range(4):
        q, k, v = (packed[:, start : start + 12] for start in (36 * head, 36 * head + 12, 36 * head + 24))
        heads.append(causal(q, k, v))
    expected = attention.dense(torch.cat(heads, 1))
    torch.testing.assert_close(attention(x, plain_pass(1, 7, AttentionPattern.full(2)))[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_rows_of_a_grouped_projection_are_all_q_then_all_k_then_all_v(num_kv_heads: int, make_config: MakeConfig) -> None:
    config = make_config(num_kv_heads=num_kv_heads)
    attention = random_attention(config)
    assert attention.query_key_value.out_features == (4 + 2 * num_kv_heads) * 12
    x = torch.randn(1, 7, 48)
    packed = attention.query_key_value(x)[0]
    heads = []
    for head in range(4):
        shared = head * num_kv_heads // 4
        k_start, v_start = 48 + 12 * shared, 48 + 12 * (num_kv_heads + shared)
        heads.append(causal(packed[:, 12 * head : 12 * head + 12], packed[:, k_start : k_start + 12], packed[:, v_start : v_start + 12]))
    expected = attention.dense(torch.cat(heads, 1))
    torch.testing.assert_close(attention(x, plain_pass(1, 7, AttentionPattern.full(2)))[0], expected, rtol=1e-5, atol=1e-5)


def test_query_key_layer_scaling_changes_no_result(make_config: MakeConfig) -> None:
    plain = random_attention(make_config(), layer=5)
    scaled = random_attention(make_config(apply_query_key_layer_scaling=True), layer=5)
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(2, 9, 48)
    for pattern in (AttentionPattern.full(6), AttentionPattern(windows=(3,) * 6)):
        shared = plain_pass(2, 9, pattern)
        torch.testing.assert_close(scaled(x, shared), plain(x, shared), rtol=1e-5, atol=1e-5)


def test_query_key_layer_scaling_keeps_large_scores_finite_in_fp16(make_config: MakeConfig) -> None:
    attention = random_attention(make_config(apply_query_key_layer_scaling=True, use_bias_in_attn_linear=False), layer=31)
    x = torch.randn(1, 9, 48) * 60
    shared = plain_pass(1, 9, AttentionPattern(windows=(4,) * 32), core="dense")
    q, k, _ = attention._heads(attention.query_key_value(x), None)
    assert torch.einsum("btnh,bsnh->bnts", q, k).abs().max() > torch.finfo(torch.float16).max
    assert attention.half()(x.half(), shared).isfinite().all()


def test_qk_layernorm_is_one_norm_over_all_heads(make_config: MakeConfig) -> None:
    config = make_config(use_qk_layernorm=True)
    attention = random_attention(config)
    assert attention.qk_layernorm is not None
    assert attention.qk_layernorm.weight.shape == (4, 12)
    x = torch.randn(2, 7, 48)
    shared = plain_pass(2, 7, AttentionPattern.full(2))
    before = attention(x, shared)
    with torch.no_grad():
        parts = attention.query_key_value.weight.view(4, 3, 12, 48)
        parts[:, :2] *= 5
        attention.query_key_value.bias.view(4, 3, 12)[:, :2] *= 5
    torch.testing.assert_close(attention(x, shared), before, rtol=1e-4, atol=1e-4)


def test_qk_layernorm_with_grouped_heads_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="4 heads and num_kv_heads is 2"):
        SelfAttention(make_config(use_qk_layernorm=True, num_kv_heads=2), layer=0)


def test_dropout_of_attention_weights_acts_in_training_only(make_config: MakeConfig) -> None:
    attention = random_attention(make_config(attention_dropout=0.5))
    x, shared = torch.randn(1, 9, 48), plain_pass(1, 9, AttentionPattern.full(2))
    assert not torch.equal(attention(x, shared), attention(x, shared))
    attention.eval()
    assert torch.equal(attention(x, shared), attention(x, shared))


def test_core_that_cannot_compute_the_layer_is_refused_with_its_reason(make_config: MakeConfig) -> None:
    attention = random_attention(make_config())
    with pytest.raises(ValueError, match="sdpa: only for layers that read every earlier key"):
        attention(torch.randn(1, 9, 48), plain_pass(1, 9, AttentionPattern(windows=(3, 3)), core="sdpa"))

"""Cutting and joining are inverses, and a rank's pieces compute that rank's share."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from megatron.config.schema import ModelConfig
from megatron.model.gpt import GPTModel
from megatron.model.mlp import MLP
from megatron.parallel.shards import cut_of, joined, parts_of_groups, split, whole_shape

HEAD = 4


def model_config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "num_layers": 1,
        "hidden_size": 12 * HEAD,
        "num_attention_heads": 12,
        "num_kv_heads": 12,
        "intermediate_size": 24,
        "seq_length": 8,
        "max_position_embeddings": 8,
        "no_weight_tying": True,
        "gpt_j_residual": True,
        "padded_vocab_size": 36,
    }
    return ModelConfig(**values | changes)


MODELS = {
    "gpt-neox": model_config(),
    "one residual after the other, learned positions": model_config(gpt_j_residual=False, pos_emb="learned"),
    "llama": model_config(norm="rmsnorm", activation="swiglu", num_kv_heads=6, gpt_j_residual=False, use_bias_in_mlp=False, no_weight_tying=False),
    "grouped and gated with biases": model_config(activation="geglu", num_kv_heads=6),
    "q and k norms": model_config(use_qk_layernorm=True),
}


def random_state(config: ModelConfig) -> dict[str, Tensor]:
    """Of every weight of the model, zeros of both signs among them."""
    with torch.device("meta"):
        model = GPTModel(config)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(value.shape, generator=generator) for name, value in model.named_parameters()}
    for value in state.values():
        value.view(-1)[:2] = torch.tensor([0.0, -0.0])
    return state


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
@pytest.mark.parametrize("model", list(MODELS.values()), ids=list(MODELS))
def test_pieces_join_to_the_same_bits(model: ModelConfig, ranks: int, dtype: torch.dtype) -> None:
    for name, value in random_state(model).items():
        whole = value.to(dtype)
        pieces = split(name, whole, model, ranks=ranks)
        assert len(pieces) == ranks
        assert len({piece.shape for piece in pieces}) == 1
        assert same_bits(joined(name, pieces, model), whole), name


@pytest.mark.parametrize("is_parallel", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_ranks_shares_of_an_mlp_add_up_to_it(activation: str, is_parallel: bool) -> None:
    config = model_config(activation=activation, gpt_j_residual=is_parallel)
    whole = MLP(config)
    state = {name: torch.randn_like(value) for name, value in whole.named_parameters()}
    whole.load_state_dict(state)
    x = torch.randn(2, 5, config.hidden_size)
    total = torch.zeros(())
    for rank in range(3):
        one = MLP(config.model_copy(update={"intermediate_size": config.intermediate_size // 3}))
        one.load_state_dict({name: split(f"sequential.2.mlp.{name}", value, config, ranks=3)[rank] for name, value in state.items()})
        if not is_parallel and rank > 0:  # the bias is added once, after the reduction
            one.linear2.bias.data.zero_()
        total = total + one(x)
    torch.testing.assert_close(total, whole(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [12, 6])
def test_a_rank_holds_whole_heads_with_their_keys_and_values(kv_heads: int) -> None:
    config = model_config(num_kv_heads=kv_heads)
    if kv_heads == 12:
        rows = [("qkv"[part], head) for head in range(12) for part in range(3) for _ in range(HEAD)]
    else:
        rows = [(kind, head) for kind, count in (("q", 12), ("k", 6), ("v", 6)) for head in range(count) for _ in range(HEAD)]
    pieces = split("sequential.2.attention.query_key_value.bias", torch.arange(len(rows)), config, ranks=3)
    for rank, piece in enumerate(pieces):
        held = {rows[row] for row in piece.tolist()}
        share = {"q": 4, "k": kv_heads // 3, "v": kv_heads // 3}
        assert held == {(kind, head) for kind, count in share.items() for head in range(rank * count, (rank + 1) * count)}


def test_norms_that_drifted_apart_are_averaged_and_equal_ones_are_kept() -> None:
    name, config = "sequential.2.input_layernorm.weight", model_config()
    third = torch.tensor([1 / 3, 0.1])
    assert same_bits(joined(name, [third] * 3, config), third)
    torch.testing.assert_close(joined(name, [third, third + 3, third], config), third + 1)


def test_rows_of_old_groups_are_put_in_todays_order() -> None:
    config = model_config(num_kv_heads=6)
    old = [(kind, place) for group in range(6) for kind, place in (("q", 2 * group), ("q", 2 * group + 1), ("k", group), ("v", group))]
    today = [(kind, place) for kind, count in (("q", 12), ("k", 6), ("v", 6)) for place in range(count)]
    rows = torch.tensor([today.index(row) * HEAD + inner for row, inner in product(old, range(HEAD))])
    assert parts_of_groups(rows, config).tolist() == list(range(len(rows)))
    assert parts_of_groups(rows.float()[:, None].expand(-1, 3), config).shape == (24 * HEAD, 3)


def test_what_cannot_be_shared_equally_is_refused() -> None:
    with pytest.raises(ValueError, match="has 12 heads or rows to share, which 5 tensor-parallel ranks do not divide"):
        split("sequential.2.attention.dense.weight", torch.ones(48, 48), model_config(), ranks=5)
    with pytest.raises(ValueError, match="has no rule"):
        cut_of("sequential.2.attention.unheard_of.weight", model_config())


def test_row_biases_of_other_programs_may_be_copies() -> None:
    bias = torch.tensor([0.5, -1.0])
    name = "sequential.2.mlp.linear2.bias"
    assert torch.equal(joined(name, [bias, bias], MODELS["gpt-neox"]), 2 * bias)
    assert torch.equal(joined(name, [bias, bias], MODELS["gpt-neox"], row_biases="copied"), bias)


@pytest.mark.parametrize("model", list(MODELS.values()), ids=list(MODELS))
def test_the_whole_shape_is_told_from_a_piece(model: ModelConfig) -> None:
    for name, value in random_state(model).items():
        for piece in split(name, value, model, ranks=3):
            assert whole_shape(name, piece, model, ranks=3) == list(value.shape), name

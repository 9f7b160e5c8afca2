"""Checkpoints of every layout, written by hand, come out as one state dict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import Tensor

from megatron.config.schema import ModelConfig
from megatron.training.weights import load_into, read_weights

LAYERS, WIDTH, ROWS = 2, 8, 12


def model_config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "num_layers": LAYERS,
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "num_kv_heads": 4,
        "intermediate_size": 16,
        "seq_length": 8,
        "max_position_embeddings": 8,
        "no_weight_tying": True,
        "gpt_j_residual": True,
    }
    return ModelConfig(**values | changes)


def whole_state(*, qkv_rows: int = 3 * WIDTH, linear1_rows: int = 16) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"sequential.0.word_embeddings.weight": (ROWS, WIDTH), "sequential.0.position_embeddings.weight": (8, WIDTH)}
    for place in range(2, 2 + LAYERS):
        for name in ("input_layernorm.weight", "input_layernorm.bias", "post_attention_layernorm.weight", "post_attention_layernorm.bias"):
            shapes[f"sequential.{place}.{name}"] = (WIDTH,)
        for name, (out, into) in {
            "attention.query_key_value": (qkv_rows, WIDTH),
            "attention.dense": (WIDTH, WIDTH),
            "mlp.linear1": (linear1_rows, WIDTH),
            "mlp.linear2": (WIDTH, 16),
        }.items():
            shapes |= {f"sequential.{place}.{name}.weight": (out, into), f"sequential.{place}.{name}.bias": (out,)}
    shapes |= {f"sequential.{LAYERS + 3}.norm.weight": (WIDTH,), f"sequential.{LAYERS + 3}.norm.bias": (WIDTH,)}
    shapes[f"sequential.{LAYERS + 4}.final_linear.weight"] = (ROWS, WIDTH)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def shard(name: str, value: Tensor, rank: int, *, is_parallel: bool) -> Tensor:
    """Half of the tensor as rank 0 or 1 of two stores it, gated and grouped parts aside."""
    if name.endswith(("attention.dense.weight", "mlp.linear2.weight")):
        return value.chunk(2, 1)[rank]
    if name.endswith(("attention.dense.bias", "mlp.linear2.bias")):
        return value * (0.25, 0.75)[rank] if is_parallel else value
    if "norm" in name:
        return value + (0.5, -0.5)[rank]
    return value if "position" in name else value.chunk(2, 0)[rank]


def write_layers(folder: Path, state: dict[str, Tensor], *, rank: int | None) -> None:
    for place in {name.split(".")[1] for name in state}:
        prefix = f"sequential.{place}."
        layer = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        suffix = "" if rank is None else f"-model_{rank:02}"
        torch.save(layer, folder / f"layer_{int(place):02}{suffix}-model_states.pt")
    torch.save({"module": None, "iteration": 3}, folder / f"mp_rank_{rank or 0:02}_model_states.pt")


def write_engine(folder: Path, state: dict[str, Tensor], *, rank: int) -> None:
    extras = {"iteration": 3, "np_rng_state": np.random.RandomState(0).get_state(), "args": {"num_layers": 2}, "optimizer": None}
    torch.save({"module": state, **extras}, folder / f"mp_rank_{rank:02}_model_states.pt")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_an_engine_file_is_read_with_its_configuration_through_latest(tmp_path: Path) -> None:
    step = tmp_path / "global_step3"
    (step / "configs").mkdir(parents=True)
    (step / "configs" / "b.yml").write_text("{}")
    (step / "configs" / "a.yml").write_text("{}")
    (tmp_path / "latest").write_text("global_step3\n")
    write_engine(step, whole_state(), rank=0)
    weights = read_weights(tmp_path)
    assert_same(weights.state, whole_state())
    assert [path.name for path in weights.config_files] == ["a.yml", "b.yml"]


@pytest.mark.parametrize("rank", [None, 0])
def test_layer_files_are_read_in_place_of_the_engine_file(tmp_path: Path, rank: int | None) -> None:
    write_layers(tmp_path, whole_state(), rank=rank)
    assert_same(read_weights(tmp_path).state, whole_state())


def test_legacy_names_are_renamed_and_frequencies_and_second_embeddings_dropped(tmp_path: Path) -> None:
    legacy = {name.replace("linear1", "dense_h_to_4h").replace("linear2", "dense_4h_to_h"): value for name, value in whole_state().items()}
    legacy |= {"sequential.2.attention.rotary_emb.inv_freq": torch.ones(2), "sequential.6.word_embeddings.weight": torch.ones(1)}
    write_layers(tmp_path, legacy, rank=0)
    assert_same(read_weights(tmp_path).state, whole_state())


@pytest.mark.parametrize("is_parallel", [True, False])
@pytest.mark.parametrize("write", [write_layers, write_engine])
def test_tensor_parallel_pieces_are_joined(tmp_path: Path, is_parallel: bool, write: type(write_layers)) -> None:
    for rank in range(2):
        write(tmp_path, {name: shard(name, value, rank, is_parallel=is_parallel) for name, value in whole_state().items()}, rank=rank)
    assert_same(read_weights(tmp_path, model=model_config(gpt_j_residual=is_parallel)).state, whole_state())
    with pytest.raises(ValueError, match="2 tensor-parallel pieces: give the model's configuration"):
        read_weights(tmp_path)


def test_gated_and_grouped_pieces_are_joined_part_by_part(tmp_path: Path) -> None:
    whole = whole_state(qkv_rows=WIDTH + 2 * 4, linear1_rows=32)
    for rank in range(2):
        pieces = {name: shard(name, value, rank, is_parallel=True) for name, value in whole.items()}
        for name, value in whole.items():
            if "linear1" in name:
                pieces[name] = torch.cat([part.chunk(2)[rank] for part in value.chunk(2)])
            if "query_key_value" in name:
                pieces[name] = torch.cat([part.chunk(2)[rank] for part in value.split([WIDTH, 4, 4])])
        write_engine(tmp_path, pieces, rank=rank)
    assert_same(read_weights(tmp_path, model=model_config(num_kv_heads=2, activation="swiglu")).state, whole)


@pytest.mark.parametrize("ranks", [1, 2])
def test_grouped_heads_in_the_order_before_1315_are_read_where_that_is_said(tmp_path: Path, ranks: int) -> None:
    model = model_config(num_kv_heads=2)
    whole = whole_state(qkv_rows=WIDTH + 2 * 4)
    for rank in range(ranks):
        pieces = {}
        for name, value in whole.items():
            if "query_key_value" in name:
                q, k, v = value.unflatten(0, (-1, 2)).split([4, 2, 2])
                value = torch.cat(
                    [torch.cat([q[2 * group : 2 * group + 2], k[group : group + 1], v[group : group + 1]]) for group in range(2)]
                ).flatten(0, 1)
                pieces[name] = value.chunk(ranks)[rank]
            else:
                pieces[name] = value if ranks == 1 else shard(name, value, rank, is_parallel=True)
        write_engine(tmp_path, pieces, rank=rank)
    assert_same(read_weights(tmp_path, model=model, groups_qkv=True).state, whole)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_three_matrices_of_the_former_llama_mlp_become_two(tmp_path: Path, ranks: int) -> None:
    whole = {name: value for name, value in whole_state(linear1_rows=32).items() if ".mlp." not in name or name.endswith("weight")}
    for rank in range(ranks):
        pieces = {}
        for name, value in whole.items():
            if name.endswith("mlp.linear1.weight"):
                up, gate = (part.chunk(ranks)[rank] for part in value.chunk(2))
                pieces |= {name.replace("linear1", "w3"): up, name.replace("linear1", "w1"): gate}
            elif ranks == 2 and "mlp" not in name:
                pieces[name] = shard(name, value, rank, is_parallel=True)
            else:
                pieces[name.replace("linear2", "w2")] = value.chunk(ranks, 1)[rank] if "linear2" in name else value
        write_layers(tmp_path, pieces, rank=rank)
    assert_same(read_weights(tmp_path, model=model_config(activation="swiglu")).state, whole)


def test_what_is_no_whole_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a directory"):
        read_weights(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="it is not a GPT-NeoX or DeepSpeed checkpoint"):
        read_weights(tmp_path)
    (tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    with pytest.raises(ValueError, match="ZeRO stage 3"):
        read_weights(tmp_path)
    torch.save({"module": None}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        read_weights(tmp_path)
    for rank in range(2):
        write_layers(tmp_path, whole_state(), rank=rank)
    (tmp_path / "layer_03-model_01-model_states.pt").unlink()
    with pytest.raises(ValueError, match="lacks pieces of layer 3"):
        read_weights(tmp_path, model=model_config())


class RunsCode:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("code of the checkpoint runs",))


def test_pickles_that_could_run_code_are_refused_unless_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaler = DynamicLossScaler(4.0, 2.0, 10, 1.0, 1, False, dtype=torch.float16)
    torch.save({"module": whole_state(), "optimizer": {"loss_scaler": scaler}}, tmp_path / "mp_rank_00_model_states.pt")
    assert_same(read_weights(tmp_path).state, whole_state())
    torch.save({"module": whole_state(), "extra": RunsCode()}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match="which could run code"):
        read_weights(tmp_path)
    assert capsys.readouterr().out == ""
    assert_same(read_weights(tmp_path, trust=True).state, whole_state())


def test_weights_of_another_model_are_refused_with_both_shapes() -> None:
    model = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"a/b is of another shape: it lacks bias; it also has scale; weight is \(4, 2\) there and \(3, 2\)"):
        load_into(model, {"weight": torch.zeros(4, 2), "scale": torch.zeros(1)}, source=Path("a/b"))


def test_the_second_norm_of_gpt_neox_s_tied_blocks_is_left_out() -> None:
    model = torch.nn.Linear(2, 2, bias=False)
    state = {"weight": torch.ones(2, 2), "sequential.2.post_attention_layernorm.weight": torch.ones(2)}
    load_into(model, state, source=Path("a"))
    assert torch.equal(model.weight, torch.ones(2, 2))


def test_weights_are_put_into_a_meta_model_in_another_dtype() -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2, bias=False)
    load_into(model, {"weight": torch.ones(2, 2)}, source=Path("a"), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert torch.equal(model.weight, torch.ones(2, 2, dtype=torch.bfloat16))

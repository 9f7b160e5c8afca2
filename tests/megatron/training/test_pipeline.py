"""Pipelines of two and four stages on processes of this machine, against the same run in one process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config.schema import Config
from megatron.data.tokenizer import build_tokenizer
from megatron.parallel.mesh import Mesh
from megatron.training.batches import RunData
from megatron.training.engine import _check_groups
from megatron.training.trainer import train
from sepllm.pattern import UNBOUNDED, AttentionPattern
from tests.megatron.training.running import figures, losses_of, metrics_of, same_weights, tiny_config, train_on, weights_of, without_launcher
from tests.megatron.training.test_modes import MODES, resolved
from tools.ckpts.convert_neox_to_hf import convert
from tools.ckpts.saved_config import run_config

PATTERN = AttentionPattern(initial_tokens=2, separator_ids=frozenset({44, 46}), windows=(8, UNBOUNDED, 8, 16))
COMPARED = ("train/lm_loss", "train/grad_norm", "validation/lm_loss", "test/lm_loss")
UNTIED, TIED = {"num_layers": 4, "hidden_dropout": 0.0}, {"num_layers": 4, "hidden_dropout": 0.0, "no_weight_tying": False}
NOISE = "attention.query_key_value.bias"
"""Of keys: it moves no attention weight, its gradient is nothing but rounding, and Adam makes whole steps of that."""
MODES_ALONG: dict[str, dict[str, object]] = {
    "H and T layers, packed documents, bilevel ALiBi": {**MODES["HT"], **MODES["bilevel alibi"], "reset_attention_mask": True},
    "a grid for each layer, padding, learned positions, tied": {
        **MODES["fixllm"],
        "BATCH_ADAPTIVE_INIT_POS": True,
        "PADDING_ID": 40,
        "pos-emb": "learned",
        "no-weight-tying": False,
    },
    "self-adjust softmax by causal extremes": MODES["self-adjust over separators"],
}

RUNS: dict[str, dict[str, Any]] = {
    "fp32": {
        "model": UNTIED,
        "checkpoint": {"checkpoint_validation_with_forward_pass": True},
        "logging": {"log_interval": 2, "log_param_norm": True, "log_grad_norm": True, "char_level_ppl": True},
    },
    "fp32, ZeRO 1, tied": {"zero_stage": 1, "model": TIED, "parallel": {"pipe_partition_method": "parameters"}},
    "fp32, tied, recomputed": {
        "model": TIED,
        "parallel": {"pipe_partition_method": "uniform"},
        "training": {"train_iters": 3, "checkpoint_activations": True, "recompute_granularity": "selective"},
    },
    "bfloat16, ZeRO 1, tied": {"precision": "bfloat16", "zero_stage": 1, "model": TIED, "training": {"train_iters": 3}},
}
WITH_DROPOUT: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bfloat16": {"precision": "bfloat16", "zero_stage": 1},
    "tied": {"zero_stage": 1, "model": TIED},
}


def on_stages(config: Config, stages: int, folder: Path, *, replicas: int = 1, shards: int = 1) -> Config:
    """The same run cut into stages, saving below ``folder``."""
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update={"pipe_parallel_size": stages, "model_parallel_size": shards}),
            "runtime": config.runtime.model_copy(update={"world_size": stages * replicas * shards}),
            "checkpoint": config.checkpoint.model_copy(update={"save": str(folder)}),
        }
    )


def with_attention(changes: dict[str, Any]) -> dict[str, Any]:
    return {"attention": {"prefill": PATTERN, "decode": PATTERN}} | changes


def going_on(config: Config, folder: Path, **checkpoint: Any) -> Config:
    """The same run from the checkpoint after its third step on, saving elsewhere."""
    changes = {"load": config.checkpoint.save, "iteration": 3, "save": str(folder), **checkpoint}
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update=changes)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    alone: Config
    staged: Config


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoStages:
    runs: dict[str, Pair]
    modes: dict[str, Pair]
    whole: dict[str, Config]
    second_half: dict[str, Config]
    growing: Pair
    finetuned: Pair
    said: str


@pytest.fixture(scope="module")
def two_stages(token_prefix: str, tmp_path_factory: pytest.TempPathFactory) -> TwoStages:
    """All runs on two stages, in one start of two processes, and the same in this process."""
    folder = tmp_path_factory.mktemp("stages")
    alone = partial(tiny_config, token_prefix)

    def pair(name: str, config: Config) -> Pair:
        return Pair(alone=config, staged=on_stages(config, 2, folder / f"{name}, staged"))

    runs = {name: pair(name, alone(folder / name, **with_attention(changes))) for name, changes in RUNS.items()}
    modes = {name: pair(name, mode(keys, folder / f"mode {name}", token_prefix)) for name, keys in MODES_ALONG.items()}
    whole = {name: on_stages(alone(folder / name, **with_attention(changes)), 2, folder / f"whole {name}") for name, changes in WITH_DROPOUT.items()}
    second_half = {name: going_on(config, folder / f"second {name}") for name, config in whole.items()}
    growing = pair("growing", growing_lists(alone, folder / "growing"))
    finetuned = pair("finetuned", going_on(runs["fp32"].alone, folder / "finetuned", finetune=True))
    pairs = [*runs.values(), *modes.values(), growing, finetuned]
    with without_launcher():
        for config in (each.alone for each in pairs):
            train(config)
    said = train_on([*(each.staged for each in pairs), *whole.values(), *second_half.values()], ranks=2, folder=folder)
    return TwoStages(runs=runs, modes=modes, whole=whole, second_half=second_half, growing=growing, finetuned=finetuned, said=said)


def mode(keys: dict[str, object], folder: Path, prefix: str) -> Config:
    """Three steps, resolved as two devices of a pipeline resolve them."""
    return resolved({**keys, "hidden-dropout": 0, "train-iters": 3, "lr-decay-iters": 3, "checkpoint-factor": 3}, folder, prefix)


def growing_lists(alone: partial[Config], folder: Path) -> Config:
    """A run of one row a micro-batch, whose rows have about as many far keys as fit into the shortest list."""
    pattern = AttentionPattern(initial_tokens=1, separator_ids=frozenset(range(32, 52)), windows=(8,) * 4)
    return alone(
        folder,
        model={**UNTIED, "seq_length": 256, "max_position_embeddings": 256},
        attention={"prefill": pattern, "decode": pattern},
        batch={"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1},
    )


def assert_same_run(pair: Pair, *, rel: float, weights: float) -> None:
    last = len(losses_of(pair.alone))
    for name in COMPARED:
        assert figures(pair.staged, name) == pytest.approx(figures(pair.alone, name), rel=rel), name
    found, expected = weights_of(pair.staged, last), weights_of(pair.alone, last)
    assert found.keys() == expected.keys()
    for name in expected.keys() - {name for name in expected if name.endswith(NOISE)}:
        assert float((found[name].float() - expected[name].float()).abs().max()) < weights, name


@pytest.mark.parametrize("name", [name for name in RUNS if "fp32" in name])
def test_two_stages_compute_what_one_process_does(two_stages: TwoStages, name: str) -> None:
    """Gradients of several thousandths clipped to a norm of 1, ZeRO and tied embeddings included."""
    assert_same_run(two_stages.runs[name], rel=2e-6, weights=2e-5)


@pytest.mark.parametrize("name", [name for name in RUNS if "bfloat16" in name])
def test_two_stages_compute_what_one_process_does_in_bfloat16(two_stages: TwoStages, name: str) -> None:
    assert_same_run(two_stages.runs[name], rel=2e-3, weights=0.02)


def test_gradients_are_clipped_by_the_norm_of_all_stages(two_stages: TwoStages) -> None:
    """Otherwise the comparisons above would prove nothing."""
    for pair in two_stages.runs.values():
        assert max(figures(pair.alone, "train/grad_norm")) > 1.5


@pytest.mark.parametrize("name", list(MODES_ALONG))
def test_every_mode_reaches_the_last_stage(two_stages: TwoStages, name: str) -> None:
    assert_same_run(two_stages.modes[name], rel=2e-6, weights=2e-5)


def test_a_longer_list_of_far_keys_makes_the_stages_exchange_shapes_anew(two_stages: TwoStages) -> None:
    config = two_stages.growing.alone
    data = RunData.open(config, Mesh.start(config), build_tokenizer(config.tokenizer))
    batches = data.training(consumed_samples=0)
    capacities = [next(batches).layout.far_capacity for _ in range(12)]
    assert capacities[:2] == [64, 64]
    assert max(capacities) == 128, "no list grows in this run"
    assert_same_run(two_stages.growing, rel=2e-6, weights=2e-5)


@pytest.mark.parametrize("name", list(WITH_DROPOUT))
def test_a_resumed_pipeline_equals_an_uninterrupted_one_bit_for_bit(two_stages: TwoStages, name: str) -> None:
    whole, second_half = two_stages.whole[name], two_stages.second_half[name]
    assert losses_of(second_half) == losses_of(whole)[3:]
    assert same_weights(weights_of(second_half, 6), weights_of(whole, 6))


def test_stages_drop_elements_of_their_own(two_stages: TwoStages) -> None:
    states = torch.load(Path(str(two_stages.whole["fp32"].checkpoint.save)) / "global_step6" / "random_states.pt", weights_only=True)
    assert not torch.equal(states[0]["torch"], states[1]["torch"])


def test_a_pipeline_takes_the_weights_of_one_process(two_stages: TwoStages) -> None:
    assert_same_run(two_stages.finetuned, rel=2e-6, weights=2e-5)


def test_one_process_takes_the_weights_of_a_pipeline(two_stages: TwoStages, tmp_path: Path) -> None:
    """And computes its logits (`checkpoint_validation_with_forward_pass`)."""
    pair = two_stages.runs["fp32"]
    config = going_on(pair.alone, tmp_path, load=pair.staged.checkpoint.save, no_load_optim=True)
    train(config)
    assert len(losses_of(config)) == 3


def test_checkpoints_have_gpt_neoxs_layer_files(two_stages: TwoStages) -> None:
    for name, places in {"fp32": [0, 2, 3, 4, 5, 7, 8], "fp32, ZeRO 1, tied": [0, 2, 3, 4, 5, 7]}.items():
        folder = Path(str(two_stages.runs[name].staged.checkpoint.save)) / "global_step3"
        assert sorted(path.name for path in folder.glob("layer_*")) == [f"layer_{place:02d}-model_00-model_states.pt" for place in places]
        assert {path.name for path in folder.glob("mp_rank_*")} == {"mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"}
        block = torch.load(folder / "layer_02-model_00-model_states.pt", weights_only=True)
        assert "attention.query_key_value.weight" in block


def test_it_converts_to_the_same_transformers_model(two_stages: TwoStages, tmp_path: Path) -> None:
    states = []
    pair = two_stages.modes["self-adjust softmax by causal extremes"]
    for name, config in {"alone": pair.alone, "staged": pair.staged}.items():
        save = Path(str(config.checkpoint.save))
        if name == "staged":
            say_two_stages(config, save / "global_step3" / "configs")
        converted = convert(run_config(save), input_dir=save, output_dir=tmp_path / name, save_tokenizer=False)
        assert converted.largest_difference is not None
        assert converted.largest_difference < 1e-5
        states.append(read_safetensors(tmp_path / name))
    assert states[0].keys() == states[1].keys()
    for key, value in ((key, value) for key, value in states[0].items() if not key.endswith(NOISE)):
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=2e-5)


def say_two_stages(config: Config, folder: Path) -> None:
    """Says in the saved file what its author would have: two stages."""
    content = json.loads(config.files[0].text)
    (folder / config.files[0].name).write_text(json.dumps(content | {"pipe-parallel-size": 2}))


def read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_norms_are_reported_of_all_stages_under_the_names_of_one_process(two_stages: TwoStages) -> None:
    pair = two_stages.runs["fp32"]
    for staged, alone in zip(metrics_of(pair.staged), metrics_of(pair.alone), strict=True):
        names = [name for name in alone if name.startswith(("parameter_norms/", "gradient_norms/"))]
        assert {name for name in staged if "_norms/" in name} == set(names)
        assert [staged[name] for name in names] == pytest.approx([alone[name] for name in names], rel=1e-4, abs=1e-6)
    assert figures(pair.staged, "validation/lm_loss_char_lvl_ppl") == pytest.approx(figures(pair.alone, "validation/lm_loss_char_lvl_ppl"), rel=1e-5)


def test_the_kept_ratio_is_that_of_one_process(two_stages: TwoStages) -> None:
    for pair in (two_stages.runs["fp32"], *two_stages.modes.values()):
        assert figures(pair.staged, "runtime/kv_ratio") == figures(pair.alone, "runtime/kv_ratio")


def test_the_cores_of_all_layers_are_named_once(two_stages: TwoStages) -> None:
    first = two_stages.said.split("iteration        2/")[0]
    assert first.count(" attention: ") == 1
    assert " in all layers" in first or "layers 2-3" in first


@dataclass(frozen=True, slots=True, kw_only=True)
class FourProcesses:
    four_stages: Config
    two_replicas: Config
    two_replicas_resumed: Config
    two_shards: Config


@pytest.fixture(scope="module")
def four_processes(token_prefix: str, tmp_path_factory: pytest.TempPathFactory) -> FourProcesses:
    folder = tmp_path_factory.mktemp("four")
    config = tiny_config(token_prefix, folder / "unused", **with_attention(RUNS["fp32"]))
    four = on_stages(config, 4, folder / "four")
    replicas = tiny_config(token_prefix, folder / "unused", world_size=2, zero_stage=1, **with_attention({"model": TIED}))
    two = on_stages(replicas, 2, folder / "two", replicas=2)
    resumed = going_on(two, folder / "resumed")
    shards = on_stages(tiny_config(token_prefix, folder / "unused", **with_attention({"model": TIED})), 2, folder / "shards", shards=2)
    train_on([four, two, resumed, shards], ranks=4, folder=folder)
    return FourProcesses(four_stages=four, two_replicas=two, two_replicas_resumed=resumed, two_shards=shards)


def test_four_stages_compute_what_one_process_does(four_processes: FourProcesses, two_stages: TwoStages) -> None:
    assert_same_run(Pair(alone=two_stages.runs["fp32"].alone, staged=four_processes.four_stages), rel=2e-6, weights=2e-5)


def test_two_stages_of_two_replicas_compute_what_one_process_does(four_processes: FourProcesses, two_stages: TwoStages) -> None:
    assert_same_run(Pair(alone=two_stages.runs["fp32, ZeRO 1, tied"].alone, staged=four_processes.two_replicas), rel=1e-5, weights=1e-4)


def test_two_stages_of_two_shards_compute_what_one_process_does(four_processes: FourProcesses, two_stages: TwoStages) -> None:
    """Tied embeddings, each shard's on two stages, clipped in fp32 without ZeRO."""
    alone, sharded = two_stages.runs["fp32, ZeRO 1, tied"].alone, four_processes.two_shards
    for name in COMPARED:
        assert figures(sharded, name) == pytest.approx(figures(alone, name), rel=1e-5), name


def test_two_stages_of_two_replicas_resume_bit_for_bit(four_processes: FourProcesses) -> None:
    assert losses_of(four_processes.two_replicas_resumed) == losses_of(four_processes.two_replicas)[3:]
    assert same_weights(weights_of(four_processes.two_replicas_resumed, 6), weights_of(four_processes.two_replicas, 6))


def test_stages_whose_weights_fall_into_different_groups_are_refused_before_zero_waits_for_ever(token_prefix: str, tmp_path: Path) -> None:
    sharded, plain = (tiny_config(token_prefix, tmp_path, zero_stage=stage) for stage in (1, 0))
    _check_groups([1, 2, 2], plain)
    _check_groups([2, 2, 2], sharded)
    with pytest.raises(ValueError, match="gives stage 0 only weights that decay"):
        _check_groups([1, 2, 2], sharded)

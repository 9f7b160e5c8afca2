"""The estimate of memory, against the tensors that a run on one process holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from megatron.config.schema import Config
from megatron.data.indexed import IndexedDatasetWriter
from megatron.launch.memory import MemoryEstimate, memory_estimate
from sepllm.pattern import AttentionPattern
from tests.megatron.training.running import tiny_config, without_launcher
from tests.tools.plan.measuring import Account, accounts

TOLERANCE = 0.10
PATTERN = AttentionPattern(initial_tokens=2, separator_ids=(44, 46), windows=(8,) * 4)
RECOMPUTE = {"checkpoint_activations": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    zero_stage: int = 0
    precision: str = "fp32"
    training: dict[str, object] = field(default_factory=dict)


CASES = (
    Case(name="all activations"),
    Case(name="full recompute", training=RECOMPUTE),
    Case(name="selective recompute", training=RECOMPUTE | {"recompute_granularity": "selective"}),
    Case(name="ZeRO 1", zero_stage=1),
    Case(name="ZeRO 2, full recompute", zero_stage=2, training=RECOMPUTE),
    Case(name="ZeRO 3", zero_stage=3),
    Case(name="bf16, ZeRO 1", zero_stage=1, precision="bfloat16"),
)


def config_of(case: Case, prefix: str) -> Config:
    """A model whose weights, activations and logits are all of a size that shows."""
    return tiny_config(
        prefix,
        Path("unused"),
        precision=case.precision,
        model={
            "num_layers": 4,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "seq_length": 256,
            "max_position_embeddings": 256,
            "padded_vocab_size": 2048,
            "hidden_dropout": 0.0,
        },
        attention={"prefill": PATTERN, "decode": PATTERN},
        batch={"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4},
        parallel={"zero_stage": case.zero_stage, "zero_optimization": {"reduce_bucket_size": 2_000_000}},
        training={"train_iters": 2, "eval_iters": 0, "eval_interval": 100} | case.training,
        checkpoint={"save": None, "checkpoint_factor": None},
        data={"split": "1000,0,0"},
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Account]:
    folder = tmp_path_factory.mktemp("measured")
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "bytes", np.uint16) as writer:
        for _ in range(40):
            writer.add_document(random.integers(32, 127, 200).tolist())
    with without_launcher():
        of_cases = accounts([config_of(case, str(folder / "bytes")) for case in CASES], ranks=1, folder=folder)
    return {case.name: account for case, (account,) in zip(CASES, of_cases, strict=True)}


def estimated(config: Config) -> MemoryEstimate:
    estimate = memory_estimate(config)
    assert estimate is not None
    return estimate


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_holds_what_the_estimate_says(case: Case, measured: dict[str, Account]) -> None:
    assert estimated(config_of(case, "unused")).total_bytes == pytest.approx(measured[case.name].peak_bytes, rel=TOLERANCE)


def with_layout(config: Config, *, data: int = 1, **parallel: object) -> Config:
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=parallel),
            "batch": config.batch.model_copy(update={"data_parallel_size": data}),
        }
    )


def part(config: Config, name: str) -> int:
    return sum(part.num_bytes for part in estimated(config).parts if part.name == name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stages_of_zero_share_one_thing_after_another(stage: int) -> None:
    alone = config_of(Case(name="", zero_stage=stage, precision="bfloat16"), "unused")
    for place, name in enumerate(("optimizer", "gradients", "weights")):
        assert part(with_layout(alone, data=4), name) == part(alone, name) // (4 if place < stage else 1)


@pytest.mark.parametrize(("block", "is_on_the_device"), [({"device": "cpu"}, False), ({"device": "none"}, True), ({}, True)])
def test_an_optimizer_is_on_the_device_unless_it_is_offloaded_somewhere(block: dict[str, str], is_on_the_device: bool) -> None:
    config = config_of(Case(name="ZeRO 2", zero_stage=2), "unused")
    parallel = config.parallel.model_copy(update={"zero_optimization": {"offload_optimizer": block}})
    assert (part(config.model_copy(update={"parallel": parallel}), "optimizer") > 0) == is_on_the_device


def test_a_first_stage_holds_the_activations_of_as_many_micro_batches_as_there_are_stages() -> None:
    config = config_of(CASES[0], "unused")
    piped = with_layout(config, pipe_parallel_size=2)
    piped = piped.model_copy(update={"batch": piped.batch.model_copy(update={"gradient_accumulation_steps": 8})})
    assert part(piped, "activations") == part(config, "activations")


def test_tensor_shards_with_a_cut_sequence_divide_all_activations() -> None:
    config = config_of(CASES[0], "unused")
    assert part(with_layout(config, model_parallel_size=2, sequence_parallel=True), "activations") == part(config, "activations") // 2
    assert part(with_layout(config, model_parallel_size=2), "activations") > part(config, "activations") // 2


def test_pieces_of_a_sequence_divide_activations_and_logits_and_no_weights() -> None:
    """In half precision: in fp32 the logits of a few hundred tokens exist at once, however many there are."""
    config = config_of(CASES[-1], "unused")
    pieces = with_layout(config, context_parallel_size=2)
    assert [part(pieces, name) for name in ("weights", "activations", "logits")] == [
        part(config, "weights"),
        part(config, "activations") // 2,
        part(config, "logits") // 2,
    ]

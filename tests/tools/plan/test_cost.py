"""The cost model, against what was measured here and what others have published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.config.loader import load_config
from megatron.config.schema import Config
from tools.plan.communication import Traffic
from tools.plan.cost import Estimate, Text, estimate, message_s
from tools.plan.hardware import PUBLISHED, Hardware, cpu_of
from tools.plan.layout import Layout, Recompute

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = ("2026-11-22-amd-epyc-train-step-160m-fp32-deepspeed-s2048.json",)
PROCESS_BYTES = 0.35 * 2**30
"""Resident in a process before it has any tensor: Python, torch, DeepSpeed."""
FULL = Text(share=0.0, kept_ratio=1.0)


def pythia(size: str, *, method: str = "full", device: str = "cuda", **overrides: object) -> Config:
    paths = [ROOT / "configs" / f"{name}.yml" for name in (f"size/{size}", f"method/{method}", "run/pile")]
    changes = {"train_micro_batch_size_per_gpu": 1} | overrides
    return load_config(paths, world_size=1, vocab_size=50277, device="cpu" if device == "cpu" else "cuda", overrides=changes)


def measured_rows() -> list[tuple[str, int, dict[str, object]]]:
    """Name, rate of a large product and row of each result that this project's own layers and cores gave."""
    results = {name: json.loads((RESULTS / name).read_text()) for name in MEASURED}
    ours = ("full", "full_auto", "sepllm")
    return [(name, result["header"]["gemm_tflops"]["fp32"], row) for name, result in results.items() for row in result["rows"] if row["arm"] in ours]


def of_row(tflops: float, row: dict[str, object]) -> Estimate:
    length = row["seq_length"]
    config = pythia(
        "160m",
        method="full" if row["kept_ratio"] == 1 else "sepllm-n64",
        device="cpu",
        seq_length=length,
        max_position_embeddings=length,
        train_batch_size=1,
        checkpoint_activations=False,
        **{"fp16.enabled": False, "precision": "fp32", "zero_optimization.stage": 0},
    )
    machine = cpu_of(peak_tflops=tflops, memory_gb=24, memory_gb_s=20)
    return estimate(config, machine, Text(share=float(row["density"]), kept_ratio=float(row["kept_ratio"])))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "tflops", "row"), measured_rows(), ids=lambda value: f"{value['arm']} {value['seq_length']}" if isinstance(value, dict) else ""
)
def test_committed_training_steps_are_foreseen(name: str, tflops: float, row: dict[str, float]) -> None:
    foreseen = of_row(tflops, row)  # type: ignore[arg-type]
    assert 1e3 * foreseen.time.total == pytest.approx(row["step_ms"], rel=0.3)
    assert foreseen.memory.total_bytes + PROCESS_BYTES == pytest.approx(row["peak_bytes"], rel=0.15)


@pytest.mark.parametrize(
    ("size", "hardware", "micro_batch", "tokens_per_s"),
    [("160m", "a100-80", 16, 142_830), ("410m", "a100-80", 16, 58_782), ("1.4b", "a100-80", 8, 20_513), ("1.4b", "h100", 16, 45_455)],
)
def test_published_runs_of_others_are_foreseen(size: str, hardware: str, micro_batch: int, tokens_per_s: float) -> None:
    """llm-foundry's table of 125M, 350M and 1.3B models of 2048 tokens on 8 devices, sharded like ZeRO 3. The rates were chosen by these."""
    layout = Layout(data=8, zero_stage=3, micro_batch=micro_batch)
    foreseen = estimate(layout.applied_to(pythia(size)), PUBLISHED[hardware], FULL)
    assert foreseen.tokens_per_s / 8 == pytest.approx(tokens_per_s, rel=0.15)


def in_layout(recompute: Recompute = "none", **sizes: int) -> Estimate:
    return estimate(Layout(recompute=recompute, **sizes).applied_to(pythia("1.4b")), PUBLISHED["h100"], FULL)


@pytest.mark.parametrize("stages", [2, 4])
def test_the_bubble_is_the_share_of_a_pipeline_that_fills_and_drains(stages: int) -> None:
    found = in_layout(pipe=stages, data=64)
    micro_batches = 1024 // 64
    busy = found.time.products + found.time.attention + found.time.movement + found.time.launch
    assert found.time.bubble / (busy + found.time.bubble) == pytest.approx((stages - 1) / (micro_batches + stages - 1))


def test_full_recompute_adds_a_third_of_the_products_and_selective_hardly_anything() -> None:
    none, selective, full = (in_layout(recompute, data=8) for recompute in ("none", "selective", "full"))
    assert full.time.recompute > 0.25 * none.time.products
    assert 0 < selective.time.recompute < 0.1 * none.time.total
    assert none.memory.total_bytes > selective.memory.total_bytes > full.memory.total_bytes


def test_utilisation_does_not_count_what_is_computed_again() -> None:
    none, full = in_layout("none", data=8), in_layout("full", data=8)
    assert full.mfu == pytest.approx(none.mfu * none.time.total / full.time.total)


def traffic(size: int, stride: int, num_bytes: int = 10**9) -> Traffic:
    return Traffic(group="data", operation="all_reduce", what="gradients", size=size, calls=1, message_bytes=num_bytes, stride=stride)


def test_a_group_that_leaves_the_node_shares_its_members_adapters() -> None:
    hardware: Hardware = PUBLISHED["h100"]
    within, across, alone = (message_s(one, hardware) for one in (traffic(8, 1), traffic(16, 1), traffic(16, 8)))
    assert within < across < alone
    assert alone / across == pytest.approx(8, rel=0.05)

"""Every operator of a step goes to a part by a rule, and the parts add up to the step."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._C._autograd import DeviceType

from tools.bench import profile_step
from tools.bench.arms import ALL_ARMS, config_of
from tools.bench.profile_step import PARTS, Event, Profile, part_of, profile_of, summed

CASES = {
    ("aten::mm", "MmBackward0"): "matrix products",
    ("aten::addmm", "torch/nn/modules/linear.py(130): forward", "nn.Module: MLP_0"): "matrix products",
    ("aten::bmm", "sepllm/attention/dense.py(30): _attention"): "attention",
    ("aten::_scaled_dot_product_flash_attention_for_cpu",): "attention",
    ("aten::mul", "sepllm/positions.py(71): apply_rotary", "megatron/model/self_attention.py(60): forward"): "rotary",
    ("aten::cat", "transformers/models/gpt_neox/modeling_gpt_neox.py(100): rotate_half", "(120): apply_rotary_pos_emb"): "rotary",
    ("aten::cat", "litgpt/model.py(1144): apply_rope"): "rotary",
    ("aten::native_layer_norm_backward", "NativeLayerNormBackward0"): "norms",
    ("aten::gelu", "megatron/model/mlp.py(14): _gelu_tanh"): "activation",
    ("aten::copy_", "aten::to", "megatron/model/gpt.py(200): cross_entropy"): "cross-entropy",
    ("aten::_log_softmax",): "cross-entropy",
    ("aten::_fused_adamw_", "torch/optim/adamw.py(50): step"): "optimizer",
    ("aten::copy_", "tools/bench/arms.py(250): apply"): "optimizer",
    ("aten::linalg_vector_norm", "torch/nn/utils/clip_grad.py(20): clip_grad_norm_"): "optimizer",
    ("aten::cumsum", "sepllm/layout.py(80): from_ids", "megatron/data/batch.py(30): from_rows"): "layout",
    ("sepllm::rotate_packed_backward",): "rotary",
    ("sepllm::layer_norms",): "norms",
    ("sepllm::cross_entropy_write_gradient",): "cross-entropy",
    ("sepllm::bias_gelu",): "activation",
    ("sepllm::sep_attention_backward",): "attention",
    ("aten::add", "functools.py(995): cached_property"): "rest",
    ("aten::embedding_dense_backward",): "embedding",
    ("aten::copy_", "aten::clone", "megatron/model/self_attention.py(89): _split"): "copies",
    ("aten::add", "megatron/model/block.py(34): forward"): "rest",
}


@pytest.mark.parametrize(("names", "part"), CASES.items(), ids=lambda value: value if isinstance(value, str) else value[0])
def test_operator_belongs_to_the_part_whose_work_it_does(names: tuple[str, ...], part: str) -> None:
    assert part_of(names) == part


@dataclass
class Recorded:
    name: str
    self_cpu_time_total: float
    self_device_time_total: float = 0.0
    device_type: DeviceType = DeviceType.CPU
    sequence_nr: int = -1
    scope: int = 0
    stack: list[str] = field(default_factory=list)
    cpu_parent: Event | None = None


def test_backward_of_an_operator_belongs_to_the_part_of_its_forward() -> None:
    forward = Recorded("aten::mul", 10.0, sequence_nr=7, stack=["sepllm/positions.py(71): apply_rotary"])
    node = Recorded("MulBackward0", 2.0, sequence_nr=7, scope=1)
    inside = Recorded("aten::mul", 5.0, sequence_nr=9, cpu_parent=node)
    elsewhere = Recorded("aten::mul", 1.0, sequence_nr=8, stack=["megatron/model/block.py(34): forward"])
    found = {(operator.name, operator.part): operator.ms for operator in summed([forward, elsewhere, node, inside], steps=1)}
    assert found == {("aten::mul", "rotary"): 0.015, ("MulBackward0", "rotary"): 0.002, ("aten::mul", "rest"): 0.001}


def test_kernels_of_a_gpu_count_once_with_the_operator_that_started_them() -> None:
    """The profiler lists each of them too, as an event of the device."""
    product = Recorded("aten::mm", 3.0, self_device_time_total=40.0)
    kernel = Recorded("sm90_xmma_gemm_bf16", 0.0, self_device_time_total=40.0, device_type=DeviceType.CUDA)
    (found,) = summed([product, kernel], steps=1, is_cuda=True)
    assert (found.name, found.part, found.ms) == ("aten::mm", "matrix products", 0.04)


@pytest.mark.parametrize("arm", ["sepllm", "full", "transformers"])
def test_parts_of_a_real_step_are_all_there_and_add_up(arm: str) -> None:
    config = config_of("14m", length=64, window=8, batch=1, dtype="fp32", separator_ids=(1, 2), vocab_size=200)
    text = torch.randint(0, 12, (1, 65), generator=torch.Generator().manual_seed(0))
    found = profile_of(ALL_ARMS[arm], config, text, torch.device("cpu"), steps=2)
    parts = found.parts()
    assert sum(parts.values()) == pytest.approx(found.traced_ms)
    wanted = {"optimizer", "attention", "rotary", "cross-entropy", "norms", "activation", "embedding", "matrix products"}
    assert {part for part in wanted if parts[part] > 0} == wanted
    products = [operator for operator in found.operators if operator.name in ("aten::mm", "aten::addmm", "aten::addmm_")]
    assert {operator.part for operator in products} == {"matrix products"}
    assert sum(operator.calls for operator in products) == 3 * (4 * config.model.num_layers + 1)  # forward, and two in the backward
    assert [operator.ms for operator in found.operators] == sorted((operator.ms for operator in found.operators), reverse=True)


def test_run_leaves_a_table_of_parts_beside_one_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens, out = tmp_path / "tokens.npy", tmp_path / "out.json"
    np.save(tokens, np.random.default_rng(0).integers(0, 12, 2000))
    text = ("--tokens", str(tokens), "--separator-ids", "1", "2")
    flags = ["--model", "14m", "--seq-length", "32", "--threads", "1", "--steps", "1", "--arms", "full", "sepllm", *text]
    assert profile_step.main([*flags, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["arm"] for row in rows] == ["full", "sepllm"]
    assert all(set(row["parts"]) == set(PARTS) for row in rows)
    assert "full: the most expensive operators." in capsys.readouterr().out


def test_share_of_a_part_is_of_what_was_traced() -> None:
    operators = (profile_step.Operator(name="aten::mm", part="matrix products", ms=30, calls=1),)
    found = Profile(arm="full", step_ms=35, traced_ms=40, operators=operators)
    assert ("matrix products", "", "30.0", "75.0%") in profile_step.parts_table([found]).rows

"""The configuration that DeepSpeed gets, checked by DeepSpeed itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from megatron.config.deepspeed import deepspeed_config
from megatron.config.loader import LoadedConfig
from megatron.launch.memory import reduce_bucket_size

Resolve = Callable[..., LoadedConfig]
Mistakes = Callable[..., tuple[str, ...]]

PARAMETERS = 4 * (4 * 64 * 64 + 4 * 64 + 8 * 64 * 64 + 5 * 64 + 4 * 64) + 512 * 64 + 2 * 64
"""Of the fixtures' model: four layers of attention, MLP and two norms; tied embeddings; the last norm."""
FP16: dict[str, object] = {
    "fp16": {
        "fp16": True,
        "type": "fp16",
        "enabled": True,
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 12,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "zero_optimization": {"stage": 1, "allgather_bucket_size": "5e8", "overlap_comm": True, "cpu_offload": False},
    "partition-activations": True,
    "synchronize-each-layer": True,
    "zero_allow_untested_optimizer": False,
}
BF16: dict[str, object] = {
    "bf16": {"enabled": True, "check_grad_overflow": False},
    "zero_optimization": {"stage": 2, "cpu_offload": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "deepspeed_extra_args": {"flops_profiler": {"enabled": True}, "torch_autocast": {"enabled": False}},
    "fp32_allreduce": True,
}


def test_fp16_blocks_lose_the_members_that_deepspeed_refuses(resolve: Resolve) -> None:
    config = deepspeed_config(resolve(FP16, world_size=2).config)
    assert config["fp16"] == {
        "enabled": True,
        "loss_scale": 0.0,
        "loss_scale_window": 1000,
        "initial_scale_power": 12,
        "hysteresis": 2,
        "min_loss_scale": 1,
    }
    assert config["zero_optimization"] == {"stage": 1, "allgather_bucket_size": 500000000, "overlap_comm": True, "reduce_bucket_size": PARAMETERS}
    assert config["activation_checkpointing"] == {"partition_activations": True, "synchronize_checkpoint_boundary": True}
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (4, 2, 1)
    assert config["zero_allow_untested_optimizer"] is True
    assert not {"optimizer", "scheduler", "bf16"} & set(config)


def test_bf16_offload_and_extra_arguments_pass_through(resolve: Resolve) -> None:
    config = deepspeed_config(resolve(BF16).config)
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert config["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": PARAMETERS}
    assert config["flops_profiler"] == {"enabled": True}
    assert config["communication_data_type"] == "fp32"
    assert "fp16" not in config


@pytest.mark.parametrize(
    ("hidden_size", "given", "bucket"),
    [(64, {}, PARAMETERS), (4096, {}, 500_000_000), (64, {"reduce_bucket_size": 1000}, 1000)],
)
def test_buckets_are_no_larger_than_the_model_unless_the_file_says_so(resolve: Resolve, hidden_size: int, given: dict[str, int], bucket: int) -> None:
    loaded = resolve({"hidden-size": hidden_size, "zero_optimization": {"stage": 2, **given}})
    assert deepspeed_config(loaded.config)["zero_optimization"] == {"stage": 2, "reduce_bucket_size": bucket}
    assert reduce_bucket_size(loaded.config) == bucket


def test_fp32_has_no_precision_block(resolve: Resolve) -> None:
    assert not {"fp16", "bf16"} & set(deepspeed_config(resolve({"gradient_clipping": 0}).config))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"curriculum_learning": {"enabled": True}}, "DeepSpeed 0.19 has removed it"),
        ({"train_batch_size": 4}, "set train_batch_size at the top level"),
        ({"fp16": {"enabled": True}}, "set fp16 at the top level"),
        ({"flops_profilr": {}}, "did you mean flops_profiler?"),
        ({"nothing_like_it": 1}, "DeepSpeed knows no such block"),
    ],
)
def test_extra_arguments_are_checked_by_name(extra: dict[str, object], words: str, mistakes: Mistakes) -> None:
    (mistake,) = mistakes({"deepspeed_extra_args": extra})
    assert words in mistake


def test_deepspeed_takes_the_configurations(resolve: Resolve) -> None:
    configs = [deepspeed_config(resolve(keys).config) for keys in ({}, FP16, BF16, {"zero_optimization": {"stage": 3}})]
    code = (
        "import json, sys\nfrom deepspeed.runtime.config import DeepSpeedConfig\n"
        "for config in json.load(sys.stdin): DeepSpeedConfig(config)\nprint('taken')"
    )
    environment = {"DS_ACCELERATOR": "cpu", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], input=json.dumps(configs), capture_output=True, text=True, env=environment, check=False)
    assert result.stdout.splitlines()[-1:] == ["taken"], result.stderr[-2000:]

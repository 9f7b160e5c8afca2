"""The contenders of the training-step benchmark: one model of this project under different patterns and attention cores.

All arms share one set of weights and one optimizer, whose learning rate is 0: every update does its work and changes nothing, so that each
step of each arm starts from the same weights, the losses of arms that compute the same function must agree, and memory is paid once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from megatron.config.loader import load_config
from megatron.config.schema import Config
from megatron.data.batch import Batch
from megatron.model.gpt import build_model
from megatron.model.self_attention import SelfAttention
from megatron.optim.build import build_optimizer, set_learning_rate
from megatron.optim.groups import parameter_groups
from sepllm.pattern import AttentionPattern
from tools.bench.machine import ROOT
from tools.bench.measure import clock_s

PYTHIA_VOCAB = 50277
PRECISIONS = {"fp32": "fp32", "bf16": "bfloat16"}
"""Names of dtypes in a configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    name: str
    pattern: Literal["full", "sepllm"]
    core: str
    """Which attention core computes."""
    executes: Literal["causal", "square", "kept"]
    """Which pairs its attention computes: those up to the query, all, or those that the pattern keeps."""


ARMS = (
    Arm(name="full", pattern="full", core="sdpa", executes="causal"),
    Arm(name="reference", pattern="sepllm", core="dense", executes="square"),
    Arm(name="sepllm", pattern="sepllm", core="auto", executes="kept"),
)
"""Full attention through torch's flash; the reference's way without a kernel, masked softmax over S x S; ours."""
ONE_CORE_ARMS = tuple(Arm(name=core, pattern="sepllm", core=core, executes="kept") for core in ("fused_triton", "flex", "chunked"))
"""SepLLM by one core, whatever `auto` would take: for devices that nobody has measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    forward_s: float
    """The layout of the new rows, the model, the loss."""
    backward_s: float
    update_s: float
    """Norm, clipping, AdamW."""
    loss: float

    @property
    def total_s(self) -> float:
        return self.forward_s + self.backward_s + self.update_s


def config_of(
    size: str, *, length: int, window: int, batch: int, dtype: str, separator_ids: Sequence[int], vocab_size: int = PYTHIA_VOCAB, device: str = "cpu"
) -> Config:
    """A size of configs/ under SepLLM's method, at this length and for these separators."""
    overrides = {
        "fp16.enabled": False,
        "precision": PRECISIONS[dtype],
        "seq_length": length,
        "max_position_embeddings": length,
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch,
        "train_iters": 1,
        "checkpoint_activations": False,
        "separator_token_ids": list(separator_ids),
        "prefill_local_window_size": window,
        "generate_local_window_size": window,
    }
    paths = [ROOT / "configs" / "size" / f"{size}.yml", ROOT / "configs" / "method" / "sepllm-n64.yml"]
    return load_config(paths, overrides=overrides, world_size=1, device="cuda" if device == "cuda" else "cpu", vocab_size=vocab_size)


class Training:
    """The model and optimizer that the arms share, and one step of one of them."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model = build_model(config, device=device).train()
        self.update = Update(self.model, config, device)

    def pattern(self, arm: Arm) -> AttentionPattern:
        return self.config.attention.prefill if arm.pattern == "sepllm" else AttentionPattern.full(self.config.model.num_layers)

    def step(self, arm: Arm, text: Tensor, *, lr: float = 0.0) -> StepTime:
        """One training step on the rows ``text [B, S + 1]`` int64."""
        start = clock_s(self.device)
        loss = self._loss(arm, text)
        computed = clock_s(self.device)
        loss.backward()
        differentiated = clock_s(self.device)
        self.update.step(lr)
        end = clock_s(self.device)
        return StepTime(forward_s=computed - start, backward_s=differentiated - computed, update_s=end - differentiated, loss=loss.item())

    def disagreement(self, arm: Arm, text: Tensor) -> float:
        """Distance of the arm's gradient of the first attention weights from what the portable core gives, over the latter's norm."""
        ours, wanted = self._gradient(arm, text), self._gradient(replace(arm, core="chunked"), text)
        return float((ours - wanted).norm() / wanted.norm())

    def _gradient(self, arm: Arm, text: Tensor) -> Tensor:
        (weight, *_) = (module.query_key_value.weight for module in self.model.modules() if isinstance(module, SelfAttention))
        self._loss(arm, text).backward()
        assert weight.grad is not None
        gradient = weight.grad.double()
        self.model.zero_grad(set_to_none=True)
        return gradient

    def _loss(self, arm: Arm, text: Tensor) -> Tensor:
        self.model.core = arm.core
        return self.model.loss(Batch.from_rows(text, self.pattern(arm)).to(self.device))


class Update:
    """Clipping and AdamW. A half precision model has masters in float32, as in mixed precision training."""

    def __init__(self, model: nn.Module, config: Config, device: torch.device) -> None:
        self.parameters: list[Tensor] = list(model.parameters())
        self.clip = config.optimizer.gradient_clipping
        groups = parameter_groups(model, config.optimizer.weight_decay)
        self.masters = self.parameters
        if config.precision.precision != "fp32":
            master_of = {parameter: nn.Parameter(parameter.detach().float()) for parameter in self.parameters}
            for group in groups:
                group["params"] = [master_of[parameter] for parameter in group["params"]]
            self.masters = list(master_of.values())
        self.optimizer = build_optimizer(groups, config.optimizer, device)

    def step(self, lr: float) -> None:
        set_learning_rate(self.optimizer, lr)
        has_masters = self.masters is not self.parameters
        if has_masters:
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, self.clip)
        self.optimizer.step()
        if has_masters:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)
        self.optimizer.zero_grad(set_to_none=True)


def refusal(arm: Arm, config: Config, *, batch: int, memory_bytes: int) -> str | None:
    """Why the arm cannot run in this much memory; None where it can, as far as can be said ahead."""
    if arm.executes != "square":
        return None
    model = config.model
    square = batch * model.num_attention_heads * model.seq_length**2 * 4
    wanted = (2 * model.num_layers + 3) * square  # each layer keeps its softmax, with and without the rows that read nothing
    if wanted < 0.8 * memory_bytes:
        return None
    return (
        f"its masked softmax keeps about {wanted / 2**30:.0f} GiB of float32 weights for the backward, and the device has {memory_bytes / 2**30:.0f}"
    )

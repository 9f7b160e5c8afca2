"""The contenders of the training-step benchmark: this project's model under different patterns and attention cores, and other frameworks'.

All arms start from the same weights and their optimizers have the learning rate 0: every update does its work and changes nothing, so
that each step of each arm starts from the same weights and the losses of arms that compute the same function must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from megatron.config.loader import load_config
from megatron.config.schema import Config
from megatron.data.batch import Batch
from megatron.model.gpt import GPTModel, build_model
from megatron.model.self_attention import SelfAttention
from megatron.optim.build import build_optimizer, set_learning_rate
from megatron.optim.groups import parameter_groups
from sepllm.pattern import AttentionPattern
from tools.bench.machine import ROOT
from tools.bench.measure import clock_s

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

PYTHIA_VOCAB = 50277
PRECISIONS = {"fp32": "fp32", "bf16": "bfloat16"}
"""Names of dtypes in a configuration."""
Framework = Literal["ours", "transformers", "litgpt"]
Engine = Literal["plain", "deepspeed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    name: str
    pattern: Literal["full", "sepllm"]
    core: str
    """Which attention core computes. Other frameworks take torch's `sdpa`."""
    executes: Literal["causal", "square", "kept"]
    """Which pairs its attention computes: those up to the query, all, or those that the pattern keeps."""
    framework: Framework = "ours"
    is_unfused: bool = False
    """Everything around attention, and the softmax in it, is plain torch, as in the reference implementation."""
    is_native: bool = False
    """Everything around attention is the compiled operators of the device, also where `auto` does not take them (yet)."""
    is_autocast: bool = False
    """bf16 by `torch.autocast` over float32 weights, instead of bf16 weights with float32 masters."""
    is_compiled: bool = False
    """By `torch.compile`: this project's blocks (`compile: true`), another framework's whole model."""

    @property
    def is_peer(self) -> bool:
        return self.framework != "ours"


ARMS = (
    Arm(name="full", pattern="full", core="sdpa", executes="causal"),
    Arm(name="reference", pattern="sepllm", core="dense", executes="square", is_unfused=True),
    Arm(name="sepllm", pattern="sepllm", core="auto", executes="kept"),
)
"""Full attention through torch's flash; the reference's way without a kernel, masked softmax over S x S; ours."""
ONE_CORE_ARMS = tuple(Arm(name=core, pattern="sepllm", core=core, executes="kept") for core in ("fused_triton", "flex", "chunked"))
"""SepLLM by one core, whatever `auto` would take: for devices that nobody has measured."""
FULL_AUTO = Arm(name="full_auto", pattern="full", core="auto", executes="causal")
"""Full attention by the core that this project takes for it: on a CPU its own kernel."""
COMPILED_ARMS = (
    Arm(name="full_compiled", pattern="full", core="auto", executes="causal", is_compiled=True),
    Arm(name="sepllm_compiled", pattern="sepllm", core="auto", executes="kept", is_compiled=True),
    Arm(name="fused_triton_compiled", pattern="sepllm", core="fused_triton", executes="kept", is_compiled=True),
)
NATIVE_ARMS = (
    Arm(name="full_native", pattern="full", core="sdpa", executes="causal", is_native=True),
    Arm(name="fused_triton_native", pattern="sepllm", core="fused_triton", executes="kept", is_native=True),
)
PEER_ARMS = tuple(
    Arm(name=name + suffix, pattern="full", core="sdpa", executes="causal", framework=name, is_autocast=is_autocast, is_compiled=is_compiled)
    for name in cast(tuple[Framework, ...], ("transformers", "litgpt"))
    for suffix, is_autocast, is_compiled in (("", False, False), ("_autocast", True, False), ("_compiled", False, True))
)
"""Other frameworks: with the dtypes that ours has, in their own usual bf16, and compiled."""
ALL_ARMS = {arm.name: arm for arm in (*ARMS, *ONE_CORE_ARMS, FULL_AUTO, *COMPILED_ARMS, *NATIVE_ARMS, *PEER_ARMS)}


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


def pattern_of(arm: Arm, config: Config) -> AttentionPattern:
    return config.attention.prefill if arm.pattern == "sepllm" else AttentionPattern.full(config.model.num_layers)


class Contender(Protocol):
    """One arm's model and how its framework computes a loss."""

    @property
    def module(self) -> nn.Module: ...

    def loss(self, run: nn.Module, text: Tensor) -> Tensor:
        """Mean loss of the rows ``text [B, S + 1]`` int64. ``run``: the module, or the engine around it."""
        ...

    def attention_gradient(self) -> Tensor:
        """Gradient of the first attention weights, rows per head ``q k v``, ``[3 D, D]``."""
        ...


class Ours:
    """This project's model."""

    def __init__(self, arm: Arm, config: Config, device: torch.device) -> None:
        self.module = build_model(config, device=device).train()
        self.module.core = arm.core
        if arm.is_compiled:
            self.module.compile_blocks()
        self.pattern = pattern_of(arm, config)

    def loss(self, run: nn.Module, text: Tensor) -> Tensor:
        from megatron.training.step import batch_loss

        batch = Batch.from_rows(text, self.pattern).to(next(self.module.parameters()).device)
        return self.module.loss(batch) if run is self.module else batch_loss(cast("DeepSpeedEngine", run), batch)

    def attention_gradient(self) -> Tensor:
        (weight, *_) = (module.query_key_value.weight for module in self.module.modules() if isinstance(module, SelfAttention))
        assert weight.grad is not None
        return weight.grad


class Trainee:
    """One arm's model and optimizer, and one step of it."""

    def __init__(self, arm: Arm, config: Config, device: torch.device, *, engine: Engine = "plain") -> None:
        self.arm, self.config, self.device = arm, _in_precision_of(arm, config), device
        self.engine = engine
        self.contender: Contender = self._peer() if arm.is_peer else Ours(arm, self.config, device)
        self._update: Update | None = None
        self._engine: DeepSpeedEngine | None = None
        if arm.is_compiled and arm.is_peer:
            self.contender.module.compile()

    def _peer(self) -> Contender:
        from tools.bench.peers import build_peer

        return build_peer(self.arm, self.config, self.device)

    def check(self, text: Tensor) -> tuple[float, Tensor]:
        """Loss of the rows ``text [B, S + 1]`` and the gradient of the first attention weights, float64 on the CPU. Before any step."""
        assert self._update is None, "the optimizer is there"
        assert self._engine is None, "the engine is there"
        module = self.contender.module
        with self._autocast():
            loss = self.contender.loss(module, text)
        loss.backward()
        gradient = self.contender.attention_gradient().to("cpu", torch.float64)
        module.zero_grad(set_to_none=True)
        return loss.item(), gradient

    def step(self, text: Tensor, *, lr: float = 0.0) -> StepTime:
        """One training step on the rows ``text [B, S + 1]`` int64."""
        return self._engine_step(text, lr) if self.engine == "deepspeed" else self._plain_step(text, lr)

    def _plain_step(self, text: Tensor, lr: float) -> StepTime:
        if self._update is None:
            self._update = Update(self.contender.module, self.config, self.device)
        start = clock_s(self.device)
        with self._autocast():
            loss = self.contender.loss(self.contender.module, text)
        computed = clock_s(self.device)
        loss.backward()
        differentiated = clock_s(self.device)
        self._update.apply(lr)
        end = clock_s(self.device)
        return StepTime(forward_s=computed - start, backward_s=differentiated - computed, update_s=end - differentiated, loss=loss.item())

    def _engine_step(self, text: Tensor, lr: float) -> StepTime:
        if self._engine is None:
            self._engine = self._started_engine()
        set_learning_rate(self._engine.optimizer, lr)
        start = clock_s(self.device)
        loss = self.contender.loss(cast(nn.Module, self._engine), text)
        computed = clock_s(self.device)
        self._engine.backward(loss)
        differentiated = clock_s(self.device)
        self._engine.step()
        end = clock_s(self.device)
        return StepTime(forward_s=computed - start, backward_s=differentiated - computed, update_s=end - differentiated, loss=loss.item())

    def _started_engine(self) -> DeepSpeedEngine:
        from megatron.parallel.mesh import Mesh
        from megatron.training.engine import build_engine

        mesh = Mesh.start(self.config)
        config = self.config
        if self.arm.is_autocast:
            config = config.model_copy(update={"deepspeed": {**config.deepspeed, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}})
        engine = build_engine(cast(GPTModel, self.contender.module), config, mesh)
        engine.train()
        return engine

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.arm.is_autocast else nullcontext()


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

    def apply(self, lr: float) -> None:
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
    """Why the arm cannot run here or in this much memory; None where it can, as far as can be said ahead."""
    if arm.is_autocast and config.precision.precision == "fp32":
        return "autocast is a way to compute in bf16, and this run is in fp32"
    if arm.is_peer:
        from tools.bench.peers import absence

        return absence(arm.framework)
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


def _in_precision_of(arm: Arm, config: Config) -> Config:
    """Under autocast the weights are float32."""
    if not arm.is_autocast:
        return config
    return config.model_copy(update={"precision": config.precision.model_copy(update={"precision": "fp32"})})

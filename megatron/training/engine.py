"""The model and its optimizer inside a DeepSpeed engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron.config.deepspeed import deepspeed_config
from megatron.config.schema import Config
from megatron.model.gpt import GPTModel
from megatron.optim.build import build_optimizer, parameter_groups
from megatron.parallel.collectives import gather_stages
from megatron.parallel.mesh import Mesh
from megatron.parallel.mpu import ModelParallelUnit
from megatron.training.loss_scale import grow_after_steps

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from megatron.model.pipeline import GPTPipeline


def build_engine(model: GPTModel | GPTPipeline, config: Config, mesh: Mesh) -> DeepSpeedEngine:
    """The engine that reduces, clips and steps. The learning rate is set before every step, so it gets no scheduler."""
    import deepspeed  # after `Mesh.start`, which decides on the accelerator

    scale = config.model.mup_width_scale if config.model.use_mup else 1.0
    groups = parameter_groups(model, config.optimizer.weight_decay, mup_width_scale=scale)
    _check_groups(gather_stages(len(groups), mesh), config)
    optimizer = build_optimizer(groups, config.optimizer, mesh.device)
    mpu = ModelParallelUnit(mesh) if mesh.tensor.size > 1 and mesh.pipe.size == 1 else None  # a pipeline brings its own
    deepspeed.utils.groups.mpu = mpu  # it keeps that of an earlier engine of this process
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config), mpu=mpu, dist_init_required=False)
    _forget_dry_step(optimizer)
    grow_after_steps(engine)
    if mesh.world_size == 1 and not engine.zero_optimization():
        engine.enable_backward_allreduce = False  # it would copy all gradients into one piece and back, for nobody
    return engine


def _check_groups(counts: list[int], config: Config) -> None:
    """Raises a sentence where stages have different ``counts`` of parameter groups: ZeRO sums the norms of all stages group by group, and would wait
    for ever."""
    if config.parallel.zero_stage > 0 and len(set(counts)) > 1:
        stage = counts.index(min(counts))
        raise ValueError(
            f"pipe_partition_method {config.parallel.pipe_partition_method!r} gives stage {stage} only weights that decay, or none that do (the "
            "embedding alone, say), which ZeRO cannot clip together with the others: use another method, fewer stages, or weight_decay 0."
        )


def _forget_dry_step(optimizer: torch.optim.Optimizer) -> None:
    """Without ZeRO, DeepSpeed's fp16 and bf16 wrappers take a step over gradients of zero to allocate the optimizer's state. Adam would
    count it, and correct its first averages as if they were of two steps; and weight decay that joins the gradient would stay in them."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()

"""Batch sizes: samples of a step = samples of a device's micro-batch x micro-batches accumulated x data-parallel devices.

GPT-NeoX's table, except that an absent `gradient_accumulation_steps` is unset and not 1.
"""

from __future__ import annotations

from megatron.config.schema import BatchConfig


def data_parallel_size(*, world_size: int, pipe_parallel_size: int, model_parallel_size: int, context_parallel_size: int = 1) -> int:
    """Copies of the model that ``world_size`` devices hold. Raises ValueError when the devices do not divide into whole models."""
    devices = max(pipe_parallel_size, 1) * model_parallel_size * context_parallel_size
    if world_size % devices:
        factors = {
            "pipe_parallel_size": pipe_parallel_size,
            "model_parallel_size": model_parallel_size,
            "context_parallel_size": context_parallel_size,
        }
        product = " x ".join(f"{name} ({size})" for name, size in factors.items() if size > 1)
        raise ValueError(f"{product} needs a multiple of {devices} devices and there are {world_size}: change the number of devices, or these sizes.")
    return world_size // devices


def resolve_batch(
    *,
    train_batch_size: int | None,
    train_micro_batch_size_per_gpu: int | None,
    gradient_accumulation_steps: int | None,
    data_parallel_size: int,
) -> BatchConfig:
    """The triple, with what is unset worked out. Raises ValueError when it does not multiply out."""
    total, micro, steps, devices = train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps, data_parallel_size
    if total is None:
        if micro is None:
            raise ValueError("train_batch_size and train_micro_batch_size_per_gpu are both missing: give at least one of them.")
        steps = steps or 1
        total = micro * steps * devices
    elif micro is None:
        steps = steps or 1
        micro = total // (devices * steps)
    elif steps is None:
        steps = total // (micro * devices)
    if micro < 1 or steps < 1 or micro * steps * devices != total:
        raise ValueError(
            _does_not_multiply_out(total=total, micro=train_micro_batch_size_per_gpu, steps=gradient_accumulation_steps, devices=devices)
        )
    return BatchConfig(train_batch_size=total, train_micro_batch_size_per_gpu=micro, gradient_accumulation_steps=steps, data_parallel_size=devices)


def _does_not_multiply_out(*, total: int, micro: int | None, steps: int | None, devices: int) -> str:
    factors = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": steps}
    named = [f"{name} ({value})" for name, value in factors.items() if value is not None]
    unit = (micro or 1) * (steps or 1) * devices
    product = " x ".join([*named, f"{devices} data-parallel devices"])
    if micro is not None and steps is not None:
        return f"train_batch_size ({total}) is not {product} = {unit}: {_remedies(total, micro=micro, steps=steps, devices=devices)}"
    below = total // unit * unit
    works = f"{below} or {below + unit}" if below else f"{unit}"
    return f"train_batch_size ({total}) is not a multiple of {product} = {unit}: use train_batch_size {works}, or leave train_batch_size out."


def _remedies(total: int, *, micro: int, steps: int, devices: int) -> str:
    works = [f"train_batch_size {micro * steps * devices}"]
    if total % (micro * devices) == 0:
        works.append(f"gradient_accumulation_steps {total // (micro * devices)}")
    if total % (steps * devices) == 0:
        works.append(f"train_micro_batch_size_per_gpu {total // (steps * devices)}")
    return f"use {' or '.join(works)}, or leave one of the three out."

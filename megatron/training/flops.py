"""Floating-point operations of a training step: GPT-NeoX's formula, and what sparse attention really executes of it."""

from __future__ import annotations

from megatron.config.schema import ModelConfig


def step_flops(model: ModelConfig, *, samples: int, recomputes: bool, kept_ratio: float | None = None) -> float:
    """Operations of one step on ``samples`` sequences, over all devices.

    Three passes' worth, or four where the forward is run again in the backward (``recomputes``). By default this is
    GPT-NeoX's dense-equivalent count, whose attention is the full S x S square. With ``kept_ratio`` (kept pairs over causal
    pairs) the attention counts only the pairs that are computed.
    """
    length, width, layers = model.seq_length, model.hidden_size, model.num_layers
    passes = 4 if recomputes else 3
    attention = length / (6 * width)
    if kept_ratio is not None:
        attention *= kept_ratio * (length + 1) / (2 * length)
    vocabulary = (model.padded_vocab_size or 0) / (16 * layers * width)
    return 24 * passes * samples * length * layers * width**2 * (1 + attention + vocabulary)


def runtime_metrics(
    model: ModelConfig, *, samples: int, elapsed_s: float, world_size: int, recomputes: bool, kept_ratio: float, peak_tflops: float | None
) -> dict[str, float]:
    """The ``runtime/*`` figures of a step that took ``elapsed_s`` seconds.

    Names without ``executed`` count dense-equivalent work, as GPT-NeoX does, and are comparable between patterns; those with it
    count the attention pairs that were computed. Utilisation needs ``peak_tflops``, of one device.
    """
    per_device_s = elapsed_s * world_size
    metrics = {
        "runtime/samples_per_sec": samples / elapsed_s,
        "runtime/iteration_time": elapsed_s,
        "runtime/steps_per_sec": 1 / elapsed_s,
        "runtime/tokens_per_sec": samples * model.seq_length / elapsed_s,
        "runtime/kept_ratio": kept_ratio,
    }
    for label, ratio in (("", None), ("executed_", kept_ratio)):
        hardware = step_flops(model, samples=samples, recomputes=recomputes, kept_ratio=ratio) / per_device_s
        metrics[f"runtime/{label}flops_per_sec_per_gpu"] = hardware
        if peak_tflops is not None:
            useful = step_flops(model, samples=samples, recomputes=False, kept_ratio=ratio) / per_device_s
            metrics[f"runtime/{label}model_flops_utilization"] = useful / (peak_tflops * 1e12)
            metrics[f"runtime/{label}hardware_flops_utilization"] = hardware / (peak_tflops * 1e12)
    return metrics

"""The fastest layouts that fit, of all that make sense; and why the next one is slower."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from megatron.config.schema import Config
from tools.plan.cost import Estimate, StepTime, Text, estimate
from tools.plan.hardware import Hardware
from tools.plan.layout import Layout, Recompute

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
MOST_STAGES, SHORTEST_PIECE = 32, 1024
"""Pieces of a sequence below so many tokens are not worth what they send."""
ALIKE = 1.03
"""Times closer than this are not told apart."""
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    layout: Layout
    estimate: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Layouts of one run on so many devices."""

    fitting: tuple[Found, ...]
    """The fastest of each shape (pipe, tensor, context) and stage of ZeRO: the suggestion, then the others, the fastest first."""
    too_large: Found | None
    """The fastest of those that do not fit, where it is faster than the suggestion."""
    tried: int


def search(config: Config, hardware: Hardware, text: Text, *, devices: int) -> Search:
    """The layouts of ``config`` on so many ``devices``. Suggested is the simplest of those within `ALIKE` of the fastest."""
    found: dict[tuple[object, ...], Found] = {}
    too_large: Found | None = None
    tried = 0
    for layout in layouts(config, devices=devices, devices_per_node=hardware.devices_per_node):
        for recompute in RECOMPUTES:
            tried += 1
            chosen = replace(layout, recompute=recompute)
            candidate = Found(layout=chosen, estimate=estimate(chosen.applied_to(config), hardware, text))
            if candidate.estimate.memory.total_bytes <= hardware.usable_bytes:
                kind = (layout.shape, layout.zero_stage)
                found[kind] = _faster(found.get(kind), candidate)
                break  # computing more again only takes longer
            too_large = _faster(too_large, candidate)
    ranked = sorted(found.values(), key=_seconds)
    if ranked:
        suggested = min((one for one in ranked if _seconds(one) <= ALIKE * _seconds(ranked[0])), key=lambda one: one.layout.complexity)
        ranked = [suggested, *(one for one in ranked if one is not suggested)]
        too_large = too_large if too_large is not None and ALIKE * _seconds(too_large) < _seconds(suggested) else None
    return Search(fitting=tuple(ranked), too_large=too_large, tried=tried)


def _seconds(found: Found) -> float:
    return found.estimate.time.total


def _faster(first: Found | None, second: Found) -> Found:
    return second if first is None or _seconds(second) < _seconds(first) else first


def layouts(config: Config, *, devices: int, devices_per_node: int) -> Iterator[Layout]:
    """Layouts into which the model, its sequence and the batch divide.

    Tensor shards stay within a node. A pipeline goes with ZeRO 0 and 1 and one piece of a sequence, pieces with ZeRO up to 2, ZeRO 3 with
    neither shards nor stages.
    """
    model = config.model
    for pipe in _powers(min(model.num_layers, MOST_STAGES)):
        for tensor in _powers(min(devices_per_node, model.num_kv_heads)):
            for context in _powers(max(1, model.seq_length // SHORTEST_PIECE)):
                shape = pipe * tensor * context
                is_possible = model.num_kv_heads % tensor == 0 and (context == 1 or (pipe == 1 and model.seq_length % (2 * context) == 0))
                if not is_possible or devices % shape:
                    continue
                data = devices // shape
                is_cut = pipe > 1 or tensor > 1
                least = int(is_cut and config.precision.precision != "fp32")  # DeepSpeed's fp16 and bf16 need ZeRO to count every part's norm once
                most = 1 if pipe > 1 or data * context == 1 else 2 if shape > 1 else 3
                for micro_batch in MICRO_BATCHES:
                    if config.batch.train_batch_size % (micro_batch * data):
                        continue
                    for zero_stage in range(least, most + 1):
                        yield Layout(pipe=pipe, tensor=tensor, context=context, data=data, zero_stage=zero_stage, micro_batch=micro_batch)


def _powers(most: int) -> list[int]:
    """Powers of two up to ``most``."""
    return [2**power for power in range(most.bit_length())]


def why_not(other: Found, suggested: Found) -> str:
    """What the other layout costs more than the suggested one, or that it is not simpler for what it gains."""
    loser, winner = other.estimate.time, suggested.estimate.time
    if loser.total <= winner.total:
        return f"{winner.total / loser.total - 1:.1%} faster, less than an estimate can tell, and less simple"
    more = {part.name: getattr(loser, part.name) - getattr(winner, part.name) for part in fields(StepTime)}
    worst = sorted((name for name in more if more[name] > 0.1 * (loser.total - winner.total)), key=lambda name: -more[name])[:2]
    parts = ", ".join(f"{name} {1e3 * getattr(winner, name):,.1f} -> {1e3 * getattr(loser, name):,.1f} ms" for name in worst)
    return f"{loser.total / winner.total - 1:.1%} slower: {parts}"

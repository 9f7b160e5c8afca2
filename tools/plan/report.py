"""Plans as text, and many of them as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields

from megatron.config.checks import NOT_BUILT_YET
from megatron.config.schema import Config
from tools.plan.communication import step_traffic
from tools.plan.cost import Estimate, StepTime, Text
from tools.plan.hardware import Hardware
from tools.plan.layout import Layout
from tools.plan.search import Found, Search, why_not

OTHERS = 3
"""Layouts shown beside the suggested one."""
WITHIN_S = 0.0005
"""Parts of a step below this share of it are not listed."""


def heading(hardware: Hardware, text: Text) -> Iterator[str]:
    products, attention = f"{hardware.matrix_rate:.0%} of the peak in products", f"{hardware.attention_rate:.0%} in attention"
    yield f"{hardware.name}: {hardware.source}"
    yield (
        f"  {hardware.peak_tflops:.4g} TFLOP/s, {hardware.memory_gb:.4g} GB at {hardware.memory_gb_s:.4g} GB/s, "
        f"{hardware.node_gb_s:.4g} GB/s in a node of {hardware.devices_per_node}, {hardware.network_gb_s:.4g} GB/s between nodes"
    )
    yield f"  assumed to be reached: {products}, {attention}; {hardware.memory_rate:.0%} of the memory's rate, {hardware.link_rate:.0%} of the links'"
    yield f"  text: {text.share:.1%} separators, with which {text.kept_ratio:.1%} of the causal pairs are computed"
    yield "Everything below is an estimate; nothing of it was measured on these devices."


def plan(estimate: Estimate, hardware: Hardware, text: Text) -> Iterator[str]:
    """Memory, communication and time of one layout."""
    yield from _memory(estimate, hardware)
    yield from _traffic(estimate, text)
    yield from _time(estimate)


def _memory(estimate: Estimate, hardware: Hardware) -> Iterator[str]:
    total = estimate.memory.total_bytes
    verdict = "fits" if total <= hardware.usable_bytes else "DOES NOT FIT"
    yield f"  memory of a device {_gib(total)}, of {_gib(hardware.usable_bytes)} that can be used: {verdict}"
    for part in sorted(estimate.memory.parts, key=lambda part: -part.num_bytes):
        if part.num_bytes:
            yield f"    {_gib(part.num_bytes):>12}  {part.text}"


def _traffic(estimate: Estimate, text: Text) -> Iterator[str]:
    if not estimate.traffic:
        yield "  one device sends nothing"
        return
    yield f"  one device sends {_gib(sum(t.sent_bytes for t in estimate.traffic))} a step"
    for traffic in estimate.traffic:
        what = f"{traffic.group} x {traffic.size}: {traffic.calls:,.0f} {traffic.operation} of {_mib(traffic.message_bytes)}, {traffic.what}"
        yield f"    {_gib(traffic.sent_bytes):>12}  {what}"
    yield from _instead_of_all_keys(estimate, text)


def _instead_of_all_keys(estimate: Estimate, text: Text) -> Iterator[str]:
    """What pieces of a sequence would send if every layer read every key."""
    config = estimate.config
    ours = sum(traffic.sent_bytes for traffic in estimate.traffic if traffic.group == "context")
    if not ours:
        return
    pattern = config.attention.prefill.full(config.model.num_layers)
    full = config.model_copy(update={"attention": config.attention.model_copy(update={"prefill": pattern})})
    theirs = sum(traffic.sent_bytes for traffic in step_traffic(full, share=text.share) if traffic.group == "context")
    yield f"    {_gib(theirs):>12}  would be sent for all keys and values instead, {theirs / ours:.1f} times as much"


def _time(estimate: Estimate) -> Iterator[str]:
    time, rate = estimate.time, estimate.tokens_per_s
    per_device = rate / estimate.config.runtime.world_size
    yield f"  a step takes {_ms(time.total)}: {rate:,.0f} tokens/s, {per_device:,.0f} a device, MFU {estimate.mfu:.1%}"
    for part in fields(StepTime):
        seconds = getattr(time, part.name)
        if seconds > WITHIN_S * time.total:
            yield f"    {_ms(seconds):>12}  {part.name}"


def suggestion(found: Search, config: Config, hardware: Hardware, text: Text) -> Iterator[str]:
    """The suggested layout in full, then why the others are not it."""
    if not found.fitting:
        need = "" if found.too_large is None else f": {found.too_large.layout.text()} takes {_gib(found.too_large.estimate.memory.total_bytes)}"
        yield f"no layout fits ({found.tried} tried){need}"
        return
    suggested, *others = found.fitting
    yield f"suggested of {found.tried} layouts tried: {suggested.layout.text()}"
    yield "  " + " ".join(f"--set {key}={str(value).lower()}" for key, value in changed_keys(suggested.layout, config).items())
    for missing in not_built_yet(suggested.estimate.config):
        yield f"  {missing}"
    yield from plan(suggested.estimate, hardware, text)
    for other in others[:OTHERS]:
        yield f"  not {other.layout.text()}: {why_not(other, suggested)}"
    if found.too_large is not None:
        yield f"  not {found.too_large.layout.text()}: faster, but takes {_gib(found.too_large.estimate.memory.total_bytes)}"


def changed_keys(layout: Layout, config: Config) -> dict[str, object]:
    """The keys by which the layout differs from the configuration's."""
    given = Layout.of(config).keys(config)
    return {key: value for key, value in layout.keys(config).items() if value != given[key] or key == "train_micro_batch_size_per_gpu"}


def not_built_yet(config: Config) -> list[str]:
    """Why this version could not start it."""
    return [sentence for is_asked_for, sentence in NOT_BUILT_YET if is_asked_for(config)]


TABLE_HEAD = (
    "| model | devices | layout | GiB | sent GiB a step | step | tokens/s | tokens/s a device | MFU |",
    "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
)


def table_row(name: str, devices: int, found: Search) -> str:
    if not found.fitting:
        return f"| {name} | {devices} | nothing fits | | | | | | |"
    best: Found = found.fitting[0]
    estimate = best.estimate
    cells: Sequence[str] = (
        name,
        str(devices),
        best.layout.text(),
        f"{estimate.memory.total_bytes / 2**30:.1f}",
        f"{sum(traffic.sent_bytes for traffic in estimate.traffic) / 2**30:.2f}",
        _ms(estimate.time.total),
        f"{estimate.tokens_per_s:,.0f}",
        f"{estimate.tokens_per_s / devices:,.0f}",
        f"{estimate.mfu:.1%}",
    )
    return f"| {' | '.join(cells)} |"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**27 else _mib(num_bytes)


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.2f} MiB"


def _ms(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 10 else f"{1e3 * seconds:,.1f} ms"

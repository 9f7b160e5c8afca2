"""Where the time of a training step goes: by part of the model, and by operator.

    python -m tools.bench.profile_step --model 160m --seq-length 2048 --arms sepllm full transformers --save

Each arm trains a few steps under PyTorch's profiler. An operator's own time, without that of the operators it calls, goes to one part, by the
operator's name and by the Python functions around it (`part_of`); in the backward, by those around the forward operator too. What fits no
part is "rest". Tracing slows Python down: the step without it is in the table's title.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from statistics import median
from typing import Protocol, cast

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megatron.config.schema import Config
from tools.bench import report
from tools.bench.arms import ALL_ARMS, PRECISIONS, PYTHIA_VOCAB, Arm, Trainee, config_of, refusal
from tools.bench.machine import describe, memory_bytes
from tools.bench.text import add_text_flags, chosen_stream, usual_rows
from tools.command import exit_status

RULES = (
    ("optimizer", r"bench/arms\.py\(\d+\): apply|torch/optim/|clip_grad|_fused_adam"),
    ("layout", r"sepllm/layout\.py|data/batch\.py|\): _?prepare"),
    ("attention", r"sepllm/attention/|sep_attention|scaled_dot_product|flex_attention|sdpa_attention|masked_softmax"),
    ("rotary", r"rotary|rotate_|_rope|rope_"),
    ("matrix products", r"^aten::(mm|addmm_?|bmm|baddbmm|matmul|linear|_addmm_activation|mkldnn_linear.*)$|^mkldnn::|^(Addmm|Mm|Bmm)Backward"),
    ("cross-entropy", r"cross_?entropy|CausalLMLoss|log_?softmax|nll_?loss"),
    ("norms", r"layer_?norm|rms_?norm|norms\.py"),
    ("activation", r"gelu|silu|activations\.py"),
    ("embedding", r"embedding"),
    ("copies", r"^aten::(copy_|clone|contiguous|cat|_to_copy|to|narrow_copy)$"),
)
"""A part, and what the names around an operator look like that belongs to it. The first that matches counts, so a product inside of attention is
attention, and a copy is one of "copies" only where it serves no other part."""
REST = "rest"
PARTS = (*(part for part, _ in RULES), REST)
MOST_EXPENSIVE = 10
WARM_UP = 2


class Event(Protocol):
    """What is read of a profiler's event: an operator, a node of the backward, or a Python function."""

    name: str
    device_type: DeviceType
    """CPU, except for a kernel or a copy of a GPU, whose time the operator that started it has too."""
    sequence_nr: int
    """Ties a node of the backward to the forward operator that made it; below 0: neither."""
    scope: int
    """1 in nodes of the backward."""
    stack: list[str]
    """Python functions around an operator, innermost first."""
    cpu_parent: Event | None
    self_cpu_time_total: float
    """Microseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """All calls of one operator for one part."""

    name: str
    part: str
    ms: float
    """Of a step, without the operators it calls."""
    calls: float
    """In a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    arm: str
    step_ms: float
    """Median without the profiler."""
    traced_ms: float
    """All that was traced in a step: more, because of the tracing."""
    operators: tuple[Operator, ...]
    """The most expensive first."""

    def parts(self) -> dict[str, float]:
        """Milliseconds of each of `PARTS` in a step."""
        totals = dict.fromkeys(PARTS, 0.0)
        for operator in self.operators:
            totals[operator.part] += operator.ms
        return totals


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    return exit_status(lambda: report.deliver(run(arguments), arguments, "profile", arguments.model, arguments.dtype, f"s{arguments.seq_length}"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="tools.bench.profile_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", default="160m", help="a size of configs/size/ (default: %(default)s)")
    flags.add_argument("--seq-length", type=int, default=2048, metavar="S")
    flags.add_argument("--batch", type=int, help="rows of a step (default: 1; on a GPU as many as make 16384 tokens)")
    flags.add_argument("--window", type=int, default=64, help="n, the nearest keys that a query reads (default: %(default)s)")
    flags.add_argument("--dtype", choices=PRECISIONS, default="fp32", help="(default: %(default)s)")
    flags.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    flags.add_argument("--threads", type=int, default=2, help="of a CPU (default: %(default)s)")
    names = [name for name, arm in ALL_ARMS.items() if not (arm.is_compiled or arm.is_native)]
    flags.add_argument("--arms", nargs="+", choices=names, default=["sepllm", "full"], help="(default: %(default)s)")
    flags.add_argument("--steps", type=int, default=3, help="traced steps of each arm (default: %(default)s)")
    add_text_flags(flags)
    return report.parsed(flags, argv)


def run(arguments: argparse.Namespace) -> report.Result:
    device = torch.device(arguments.device)
    machine, stream = describe(device), chosen_stream(arguments)
    batch = arguments.batch or usual_rows(arguments.seq_length, arguments.device)
    config = config_of(
        arguments.model,
        length=arguments.seq_length,
        window=arguments.window,
        batch=batch,
        dtype=arguments.dtype,
        separator_ids=stream.separator_ids,
        vocab_size=PYTHIA_VOCAB,
        device=arguments.device,
    )
    text = stream.rows(batch, arguments.seq_length + 1, target=arguments.density_target)
    profiles, notes = [], []
    for arm in (ALL_ARMS[name] for name in arguments.arms):
        reason = refusal(arm, config, batch=batch, memory_bytes=memory_bytes(device))
        if reason is None:
            profiles.append(profile_of(arm, config, text, device, steps=arguments.steps))
        else:
            notes.append(f"{arm.name} does not run: {reason}")
    if not profiles:
        raise ValueError("\n".join(notes))
    title = f"A training step by part, {arguments.model} at S = {arguments.seq_length} in {arguments.dtype}: {machine.title()}"
    tables = [parts_table(profiles), *(operators_table(found) for found in profiles)]
    print(f"{title}\n", *(f"{table.text()}\n" for table in tables), *notes, sep="\n", flush=True)
    return report.Result(
        header={**machine.as_dict(), "command": arguments.command, "text": stream.name, "steps": arguments.steps},
        body={"rows": [{**asdict(found), "parts": found.parts()} for found in profiles]},
        tables=tables,
        notes=notes,
        title=title,
        picture=None,
    )


def profile_of(arm: Arm, config: Config, text: Tensor, device: torch.device, *, steps: int) -> Profile:
    """Times of ``steps`` steps of one arm."""
    trainee = Trainee(arm, config, device)
    for _ in range(WARM_UP):
        trainee.step(text)
    untraced_ms = median(trainee.step(text).total_s for _ in range(steps)) * 1e3
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    stacks = torch._C._profiler._ExperimentalConfig(verbose=True)  # else no event knows the functions around it
    with profile(activities=activities, with_stack=True, experimental_config=stacks) as trace:
        for _ in range(steps):
            trainee.step(text)
    operators = summed(cast(Iterable[Event], trace.events()), steps=steps, is_cuda=device.type == "cuda")
    return Profile(arm=arm.name, step_ms=untraced_ms, traced_ms=sum(operator.ms for operator in operators), operators=operators)


def summed(events: Iterable[Event], *, steps: int, is_cuda: bool = False) -> tuple[Operator, ...]:
    """Own time of every operator, by part, the most expensive first. On a GPU it is that of the kernels it started."""
    events = [event for event in events if event.device_type == DeviceType.CPU and not _is_outermost(event)]
    made_by = {event.sequence_nr: event for event in events if event.sequence_nr >= 0 and not _is_node(event)}  # the last one made the node
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        own_us = cast(float, getattr(event, "self_device_time_total" if is_cuda else "self_cpu_time_total"))
        times[_label(event.name), part_of(_around(event, made_by))].append(own_us)
    found = [Operator(name=name, part=part, ms=sum(us) / 1e3 / steps, calls=len(us) / steps) for (name, part), us in times.items()]
    return tuple(sorted(found, key=lambda operator: operator.ms, reverse=True))


def part_of(names: Sequence[str]) -> str:
    """The part of `PARTS` that an operator works for, by its own name, which is the first of ``names``, and those around it."""
    return PARTS[min(_place(name) for name in names)]


@cache
def _place(name: str) -> int:
    """Of the first rule that the name matches; that of the rest where there is none."""
    return next((place for place, (_, pattern) in enumerate(RULES) if re.search(pattern, name, flags=re.IGNORECASE)), len(RULES))


def parts_table(profiles: Sequence[Profile]) -> report.Table:
    steps = ", ".join(f"{found.arm} {found.step_ms:.0f} ms ({found.traced_ms:.0f} traced)" for found in profiles)
    totals = [found.parts() for found in profiles]
    columns = [cell for found in profiles for cell in (f"{found.arm} ms", "share")]
    rows = [
        (part, "", *(cell for of_arm, found in zip(totals, profiles, strict=True) for cell in _cells(of_arm[part], found.traced_ms)))
        for part in sorted(PARTS, key=lambda part: -totals[0][part])
    ]
    return report.Table(title=f"Time of a step by part; without tracing: {steps}.", columns=("part", "", *columns), rows=rows)


def operators_table(found: Profile) -> report.Table:
    return report.Table(
        title=f"{found.arm}: the most expensive operators.",
        columns=("operator", "part", "ms", "share", "calls"),
        rows=[
            (operator.name, operator.part, *_cells(operator.ms, found.traced_ms), f"{operator.calls:.0f}")
            for operator in found.operators[:MOST_EXPENSIVE]
        ],
    )


def _cells(ms: float, total_ms: float) -> tuple[str, str]:
    return f"{ms:.1f}", f"{ms / total_ms:.1%}"


def _around(event: Event, made_by: Mapping[int, Event]) -> list[str]:
    """Names of the operator, of what is around it, and in the backward of what was around the forward operator."""
    names = [event.name, *event.stack]
    parent = event.cpu_parent
    node = event if _is_node(event) else None
    while parent is not None:
        names.append(parent.name)
        node = parent if node is None and _is_node(parent) else node
        parent = parent.cpu_parent
    made = None if node is None else made_by.get(node.sequence_nr)
    return names if made is None else [*names, made.name, *made.stack]


def _is_node(event: Event) -> bool:
    return event.scope == 1 or event.name.startswith("autograd::engine")


def _is_outermost(event: Event) -> bool:
    return event.name.startswith(("ProfilerStep", "PyTorch Profiler"))


def _label(name: str) -> str:
    """Python functions of all kinds are one row; an operator keeps its name."""
    return name if "::" in name or re.fullmatch(r"\w+Backward\d*", name) else "Python"


if __name__ == "__main__":
    sys.exit(main())

"""From the seconds of interleaved training steps to the rows of the training-step benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from megatron.config.schema import Config
from megatron.training.flops import step_flops
from sepllm.layout import TokenLayout
from tools.bench.arms import ALL_ARMS, Arm, Engine, StepTime, pattern_of
from tools.bench.measure import Ratio
from tools.bench.report import Curve, Panel, Table

FULL = ("full", "full_auto")
"""This project's arms with full attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    arm: str
    engine: Engine
    model: str
    dtype: str
    seq_length: int
    batch: int
    step_ms: float
    """Median, as are the three that make it up."""
    forward_ms: float
    backward_ms: float
    update_ms: float
    ratio: float
    """How much faster than ``baseline``: median over the rounds."""
    ratio_low: float
    ratio_high: float
    """10 and 90 % of the rounds."""
    baseline: str
    spread_low: float
    spread_high: float
    """10 and 90 % of the ratios of this arm's steps to its own next ones."""
    fastest_peer: str | None
    """The other framework's arm with the shortest step in this run; None where there is none."""
    peer_ratio: float | None
    """How much faster than ``fastest_peer``: median over the rounds."""
    peer_ratio_low: float | None
    peer_ratio_high: float | None
    tokens_per_s: float
    peak_bytes: int
    """On a CPU the resident memory of a process that trains this arm alone, Python and torch included; on a GPU what torch allocated."""
    mfu_executed: float
    """Of the operations that are executed, by the rate of a large matrix product in the same run."""
    mfu_dense_equivalent: float
    """The same by GPT-NeoX's count, whose attention is the whole square: comparable between arms, but not a utilisation."""
    kept_ratio: float
    """Pairs that attention computes over causal pairs."""
    density: float
    steps: int
    loss: float
    """Of the untrained model on the first rows."""


def row_of(
    config: Config,
    arm: Arm,
    times: dict[str, list[StepTime]],
    text: Tensor,
    *,
    size: str,
    dtype: str,
    baseline: Arm,
    peak_bytes: int,
    gemm_tflops: float,
    density: float,
    engine: Engine = "plain",
) -> Row:
    """``size`` is the model's name, ``text [B, S + 1]`` the rows that every step took, ``times`` those of all arms."""
    mine = times[arm.name]
    totals = [time.total_s for time in mine]
    ratio = _ratio(times, baseline.name, arm.name)
    spread = Ratio.of(totals[:-1], totals[1:]) if len(totals) > 1 else Ratio(median=1, low=1, high=1)
    peer = fastest_peer(times)
    to_peer = None if peer is None else _ratio(times, peer, arm.name)
    model, step_s = config.model, median(totals)
    kept = TokenLayout.from_ids(text[:, :-1], pattern_of(arm, config)).attention_map_ratio()
    executed = step_flops(model, samples=len(text), recomputes=False, kept_ratio=None if arm.executes == "square" else kept)
    dense_equivalent = step_flops(model, samples=len(text), recomputes=False)
    return Row(
        arm=arm.name,
        engine=engine,
        model=size,
        dtype=dtype,
        seq_length=model.seq_length,
        batch=len(text),
        step_ms=step_s * 1e3,
        forward_ms=median(time.forward_s for time in mine) * 1e3,
        backward_ms=median(time.backward_s for time in mine) * 1e3,
        update_ms=median(time.update_s for time in mine) * 1e3,
        ratio=ratio.median,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        baseline=baseline.name,
        spread_low=spread.low,
        spread_high=spread.high,
        fastest_peer=peer,
        peer_ratio=None if to_peer is None else to_peer.median,
        peer_ratio_low=None if to_peer is None else to_peer.low,
        peer_ratio_high=None if to_peer is None else to_peer.high,
        tokens_per_s=len(text) * model.seq_length / step_s,
        peak_bytes=peak_bytes,
        mfu_executed=executed / step_s / gemm_tflops / 1e12,
        mfu_dense_equivalent=dense_equivalent / step_s / gemm_tflops / 1e12,
        kept_ratio=kept,
        density=density,
        steps=len(mine),
        loss=mine[0].loss,
    )


def fastest_peer(times: Mapping[str, Sequence[StepTime]]) -> str | None:
    """The arm of another framework whose median step is the shortest; None where only this project's ran."""
    peers = [name for name in times if name in ALL_ARMS and ALL_ARMS[name].is_peer]
    return min(peers, key=lambda name: median(time.total_s for time in times[name]), default=None)


def _ratio(times: Mapping[str, Sequence[StepTime]], slower: str, faster: str) -> Ratio:
    return Ratio.of(*([time.total_s for time in times[name]] for name in (slower, faster)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """What a run must reach: how many times faster one arm is than another, or how many times less memory it takes."""

    faster: str
    than: str
    """An arm, or ``peer``: the fastest of the other frameworks."""
    least: float
    seq_length: int | None = None
    """None: every length."""
    is_memory: bool = False


BARS = (
    *(Bar(faster=full, than="peer", least=1.15) for full in FULL),
    *(Bar(faster="sepllm", than=full, least=1.12, seq_length=2048) for full in FULL),
    *(Bar(faster="sepllm", than=full, least=1.45, seq_length=8192) for full in FULL),
    *(Bar(faster=full, than="transformers", least=1 / 0.8, is_memory=True) for full in FULL),
)
"""Of a 160m model on a CPU, for both of this project's full attentions."""


def reached(rows: Sequence[Row]) -> list[str]:
    """A sentence for each of `BARS` that these rows of one length can answer: what was found, and whether it is enough."""
    by_arm = {row.arm: row for row in rows}
    sentences = []
    for bar in BARS:
        row = by_arm.get(bar.faster)
        if row is None or bar.seq_length not in (None, row.seq_length) or row.model != "160m":
            continue
        found = _found(bar, row, by_arm)
        if found is not None:
            what = f"{bar.faster} takes {found:.2f}x less memory than" if bar.is_memory else f"{bar.faster} is {found:.2f}x as fast as"
            than = row.fastest_peer if bar.than == "peer" else bar.than
            sentences.append(f"{what} {than}, {bar.least:.2f}x is wanted: {'' if found >= bar.least else 'NOT '}reached")
    return sentences


def _found(bar: Bar, row: Row, by_arm: Mapping[str, Row]) -> float | None:
    if bar.than == "peer":
        return row.peer_ratio
    other = by_arm.get(bar.than)
    if other is None:
        return None
    if bar.is_memory:
        return other.peak_bytes / row.peak_bytes
    return row.ratio if row.baseline == other.arm else other.step_ms / row.step_ms


def table_of(rows: Sequence[Row]) -> Table:
    first = rows[0]
    return Table(
        title=(
            f"S = {first.seq_length}: {first.model}, {first.batch} row{'s' if first.batch > 1 else ''} in {first.dtype}, "
            f"separators {first.density:.3f} of the tokens. Ratios to {first.baseline}"
            f"{'' if first.fastest_peer is None else f' and to the fastest peer, {first.fastest_peer}'}, {first.steps} steps each."
        ),
        columns=(
            *("arm", "pairs kept", "step ms", "forward", "backward", "update", "ratio", "10-90 %", "own spread", "to peer", "tokens/s", "peak GiB"),
            *("MFU executed", "dense-equivalent", "loss"),
        ),
        rows=[
            (
                row.arm,
                f"{row.kept_ratio:.1%}",
                *(f"{ms:.0f}" for ms in (row.step_ms, row.forward_ms, row.backward_ms, row.update_ms)),
                f"{row.ratio:.2f}",
                f"{row.ratio_low:.2f}-{row.ratio_high:.2f}",
                f"{row.spread_low:.2f}-{row.spread_high:.2f}",
                "-" if row.peer_ratio is None else f"{row.peer_ratio:.2f}",
                f"{row.tokens_per_s:,.0f}",
                f"{row.peak_bytes / 2**30:.2f}",
                f"{row.mfu_executed:.0%}",
                f"{row.mfu_dense_equivalent:.0%}",
                f"{row.loss:.4f}",
            )
            for row in rows
        ],
    )


def panels_of(rows: Sequence[Row]) -> list[Panel]:
    """Time and memory against the length."""
    arms = list(dict.fromkeys(row.arm for row in rows))

    def panel(title: str, unit: str, figures: dict[tuple[str, int], float]) -> Panel:
        curves = [
            Curve(label=arm, family=arm, points=_points(figures, arm), line="--" if arm == arms[0] else "-", is_baseline=arm == arms[0])
            for arm in arms
        ]
        return Panel(title=title, unit=unit, curves=curves)

    return [
        panel("time of a step", "ms per token", {(row.arm, row.seq_length): 1e3 / row.tokens_per_s for row in rows}),
        panel("peak memory", "GiB", {(row.arm, row.seq_length): row.peak_bytes / 2**30 for row in rows}),
    ]


def _points(figures: dict[tuple[str, int], float], arm: str) -> dict[int, float]:
    return {length: figure for (name, length), figure in figures.items() if name == arm}

"""From the seconds of interleaved training steps to the rows of the training-step benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from megatron.training.flops import step_flops
from sepllm.layout import TokenLayout
from tools.bench.arms import Arm, StepTime, Training
from tools.bench.measure import Ratio
from tools.bench.report import Curve, Panel, Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    arm: str
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
    training: Training,
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
) -> Row:
    """``size`` is the model's name, ``text [B, S + 1]`` the rows that every step took."""
    mine = times[arm.name]
    totals = [time.total_s for time in mine]
    ratio = Ratio.of([time.total_s for time in times[baseline.name]], totals)
    spread = Ratio.of(totals[:-1], totals[1:]) if len(totals) > 1 else Ratio(median=1, low=1, high=1)
    model, step_s = training.config.model, median(totals)
    kept = TokenLayout.from_ids(text[:, :-1], training.pattern(arm)).attention_map_ratio()
    executed = step_flops(model, samples=len(text), recomputes=False, kept_ratio=None if arm.executes == "square" else kept)
    dense_equivalent = step_flops(model, samples=len(text), recomputes=False)
    return Row(
        arm=arm.name,
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
        tokens_per_s=len(text) * model.seq_length / step_s,
        peak_bytes=peak_bytes,
        mfu_executed=executed / step_s / gemm_tflops / 1e12,
        mfu_dense_equivalent=dense_equivalent / step_s / gemm_tflops / 1e12,
        kept_ratio=kept,
        density=density,
        steps=len(mine),
        loss=mine[0].loss,
    )


def table_of(rows: Sequence[Row]) -> Table:
    first = rows[0]
    return Table(
        title=(
            f"S = {first.seq_length}: {first.model}, {first.batch} row{'s' if first.batch > 1 else ''} in {first.dtype}, "
            f"separators {first.density:.3f} of the tokens. Ratios to {first.baseline}, {first.steps} steps each."
        ),
        columns=(
            *("arm", "pairs kept", "step ms", "forward", "backward", "update", "ratio", "10-90 %", "own spread", "tokens/s", "peak GiB"),
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

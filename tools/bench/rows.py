"""From the seconds of interleaved rounds to the rows of the attention benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Literal

from tools.bench.measure import Ratio
from tools.bench.problem import Problem
from tools.bench.report import Curve, Panel, Table

Pass = Literal["fwd", "fwd+bwd"]
LINES = {"fp32": "-", "bf16": ":", "fp16": "-."}
LINE_NAMES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dash-dotted"}
PASSES: tuple[Pass, ...] = ("fwd", "fwd+bwd")
FLOPS_PER_PAIR: dict[Pass, int] = {"fwd": 4, "fwd+bwd": 14}
"""Times the head size: two products forward, five backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Of one contender: one time a round, in seconds."""

    variant: str
    dtype: str
    is_causal: bool
    """Computes every causal pair."""
    is_baseline: bool
    forward_s: Sequence[float]
    total_s: Sequence[float] | None
    """Forward and backward. None: it has no backward here."""
    mask_s: float
    """What a new batch of tokens costs, for all layers together."""
    error: float
    """The largest of those of the output and the gradients."""

    @property
    def name(self) -> str:
        return f"{self.variant} {self.dtype}"

    def of(self, direction: Pass) -> Sequence[float] | None:
        return self.forward_s if direction == "fwd" else self.total_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """The rows that one length was measured on."""

    seq_length: int
    batch: int
    heads: int
    head_size: int
    window: int
    layers: int
    densities: Sequence[float]
    """Share of separators among the tokens of each row."""
    far_keys: Sequence[int]
    """Of each row."""
    kept_pairs: int
    causal_pairs: int

    @classmethod
    def of(cls, problem: Problem) -> Text:
        return cls(
            seq_length=problem.length,
            batch=problem.batch,
            heads=problem.heads,
            head_size=problem.head_size,
            window=problem.window,
            layers=problem.layers,
            densities=problem.densities,
            far_keys=problem.is_far.sum(1).tolist(),
            kept_pairs=problem.kept_pairs,
            causal_pairs=problem.causal_pairs,
        )

    @property
    def density(self) -> float:
        return sum(self.densities) / len(self.densities)

    def title(self) -> str:
        share = self.kept_pairs / self.causal_pairs
        rows, heads = (f"{count} {noun}{'s' if count > 1 else ''}" for count, noun in ((self.batch, "row"), (self.heads, "head")))
        return (
            f"S = {self.seq_length}: {rows}, {heads} of {self.head_size}, n = {self.window}.\n"
            f"Separators {self.density:.3f} ({min(self.densities):.3f} to {max(self.densities):.3f}) of the tokens, "
            f"far keys {min(self.far_keys)} to {max(self.far_keys)} a row, share of pairs kept {share:.3f}, limit {1 / share:.2f}x."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    variant: str
    seq_length: int
    direction: Pass
    """``pass`` in JSON."""
    dtype: str
    ms: float
    """Median."""
    ratio: float
    """How much faster than ``baseline``: median over the rounds."""
    ratio_low: float
    ratio_high: float
    """10 and 90 % of the rounds."""
    is_within_spread: bool
    """The ratio cannot be told from that of one contender run twice, and counts as 1."""
    baseline: str
    """The fastest dense causal attention of any dtype."""
    ratio_same_dtype: float | None
    """To the fastest dense causal attention of this dtype."""
    share: float
    """Kept over causal pairs; 1 where every causal pair is wanted."""
    limit: float
    """``1 / share``: the ratio of one who does nothing but the kept pairs, as fast as the baseline does its own."""
    reached: float
    """``ratio / limit``"""
    mask_ms: float
    """What a new batch of tokens costs, for all layers together."""
    ms_with_mask: float
    """``ms`` and one layer's part of that."""
    ratio_with_mask: float
    useful_tflops: float
    """Products of the pairs that are wanted, by ``ms``."""
    gemm_share: float
    """That over the rate of a large matrix product of this dtype in the same run."""
    density: float
    rounds: int
    error: float
    """Against float64, worst block of 64 rows of the output and, with a backward, the gradients."""

    def as_dict(self) -> dict[str, object]:
        """With ``pass`` for ``direction``, which Python keeps for itself."""
        return {"pass" if key == "direction" else key: value for key, value in asdict(self).items()}


def fastest_causal(timings: Sequence[Timings], direction: Pass, *, dtype: str | None = None) -> Timings | None:
    """By its median; of any dtype by default."""
    candidates = [timing for timing in timings if timing.is_baseline and timing.of(direction) and dtype in (None, timing.dtype)]
    return min(candidates, key=lambda timing: median(timing.of(direction) or ()), default=None)


def rows_of(text: Text, timings: Sequence[Timings], *, spreads: dict[Pass, Ratio], gemm_tflops: dict[str, float]) -> list[Row]:
    """A row for each contender and pass. ``spreads``: ratio of one contender to itself, run twice."""
    return [
        _row(text, timing, timings, direction, spread=spreads[direction], gemm_tflops=gemm_tflops[timing.dtype])
        for direction in PASSES
        for timing in timings
        if timing.of(direction) is not None
    ]


def _row(text: Text, timing: Timings, timings: Sequence[Timings], direction: Pass, *, spread: Ratio, gemm_tflops: float) -> Row:
    baseline, same = fastest_causal(timings, direction), fastest_causal(timings, direction, dtype=timing.dtype)
    seconds = timing.of(direction)
    assert seconds is not None
    assert baseline is not None, "a run always times dense causal attention"
    ratio = Ratio.of(baseline.of(direction) or (), seconds)
    elapsed_s = median(seconds)
    with_mask_s = elapsed_s + timing.mask_s / text.layers
    pairs = text.causal_pairs if timing.is_causal else text.kept_pairs
    share = pairs / text.causal_pairs
    tflops = FLOPS_PER_PAIR[direction] * text.head_size * text.heads * pairs / elapsed_s / 1e12
    return Row(
        variant=timing.variant,
        seq_length=text.seq_length,
        direction=direction,
        dtype=timing.dtype,
        ms=elapsed_s * 1e3,
        ratio=ratio.median,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        is_within_spread=timing is not baseline and ratio.is_within(spread),
        baseline=baseline.name,
        ratio_same_dtype=None if same is None else Ratio.of(same.of(direction) or (), seconds).median,
        share=share,
        limit=1 / share,
        reached=ratio.median * share,
        mask_ms=timing.mask_s * 1e3,
        ms_with_mask=with_mask_s * 1e3,
        ratio_with_mask=ratio.median * elapsed_s / with_mask_s,
        useful_tflops=tflops,
        gemm_share=tflops / gemm_tflops,
        density=text.density,
        rounds=len(seconds),
        error=timing.error,
    )


def table_of(text: Text, rows: Sequence[Row], *, spreads: dict[Pass, Ratio]) -> Table:
    """One length, forward rows first."""
    aa = ", ".join(f"{direction} {spread.low:.3f} to {spread.high:.3f}" for direction, spread in spreads.items())
    columns = (
        *("variant", "pass", "dtype", "ms", "ratio", "10-90 %", "same dtype", "reached", "mask ms", "ms with mask", "ratio with mask"),
        *("TFLOP/s", "of GEMM", "error"),
    )
    return Table(
        title=f"{text.title()}\nRatios to {' and '.join(dict.fromkeys(row.baseline for row in rows))}; the same contender twice: {aa}.",
        columns=columns,
        rows=[_cells(row) for row in rows],
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.variant,
        row.direction,
        row.dtype,
        f"{row.ms:.2f}",
        "1.0 (A/A)" if row.is_within_spread else f"{row.ratio:.2f}",
        f"{row.ratio_low:.2f}-{row.ratio_high:.2f}",
        "-" if row.ratio_same_dtype is None else f"{row.ratio_same_dtype:.2f}",
        f"{row.reached:.0%}",
        f"{row.mask_ms:.2f}",
        f"{row.ms_with_mask:.2f}",
        f"{row.ratio_with_mask:.2f}",
        f"{row.useful_tflops:.3g}",
        f"{row.gemm_share:.0%}",
        f"{row.error:.0e}",
    )


def panels_of(texts: Sequence[Text], rows: Sequence[Row]) -> list[Panel]:
    """A panel a pass: time of one head of one row against its length."""
    shapes = {text.seq_length: text.batch * text.heads for text in texts}
    panels = []
    for direction in PASSES:
        points: dict[tuple[str, str], dict[int, float]] = {}
        for row in rows:
            if row.direction == direction:
                points.setdefault((row.variant, row.dtype), {})[row.seq_length] = row.ms / shapes[row.seq_length]
        titles: dict[Pass, str] = {"fwd": "forward", "fwd+bwd": "forward and backward"}
        dtypes = list(dict.fromkeys(dtype for _, dtype in points))
        named = dict(reversed(points))  # a variant's name stands beside its first line
        curves = [
            Curve(
                label=variant if named[variant] == dtype else "",
                points=line,
                family=variant,
                line=LINES[dtype],
                is_baseline=variant.startswith("causal"),
            )
            for (variant, dtype), line in points.items()
        ]
        styles = ", ".join(f"{dtype} {LINE_NAMES[LINES[dtype]]}" for dtype in dtypes)
        if curves:
            panels.append(Panel(title=f"{titles[direction]} ({styles})", unit="ms per row and head", curves=curves))
    return panels

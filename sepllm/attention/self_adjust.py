"""The self-adjust softmax (arXiv 2502.18277) of a pattern, as the operators take it."""

from __future__ import annotations

from sepllm.layout import KeyRanges
from sepllm.ops.attention_reference import Adjustment
from sepllm.pattern import SelfAdjust, Softmax


def adjustment_of(softmax: Softmax, ranges: KeyRanges) -> Adjustment | None:
    """None for the ordinary softmax. Extremes over all causal keys take their bounds from ``ranges.extremes``."""
    if not isinstance(softmax, SelfAdjust):
        return None
    if softmax.extremes == "causal" and ranges.extremes is None and softmax.kind == "normalised":
        raise ValueError(
            "The softmax wants its extremes over all causal keys, but the ranges were made for another softmax: make the layout with its pattern."
        )
    return Adjustment(
        is_normalised=softmax.kind == "normalised",
        numerator_bias=softmax.numerator_bias,
        denominator_bias=softmax.denominator_bias,
        extremes=ranges.extremes if softmax.extremes == "causal" else None,
    )

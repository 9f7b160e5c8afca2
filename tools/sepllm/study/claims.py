"""What the SepLLM paper and its published logs say about these methods, and whether the study agrees. Nothing here knows a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tools.sepllm.study.results import Axis, RunResult
from tools.sepllm.study.statistics import BySeed, Interval, paired

Verdict = Literal["agrees", "not separated", "contrary"]
Runs = Mapping[str, Mapping[int, RunResult]]
"""By method and seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One method has the lower loss of two."""

    text: str
    source: str
    """Where it is said, with the figures there."""
    lower: str
    higher: str
    at: Literal["the end", "equal operations", "equal time"] = "the end"


CLAIMS = (
    Claim(
        text="Separators help: SepLLM n=64 is better than StreamingLLM n=64",
        source="Figure 5; Table 2, LAMBADA perplexity 40.08 to 44.03",
        lower="sepllm-n64",
        higher="streamingllm-n64",
    ),
    Claim(
        text="A wider window helps: n=128 is better than n=64",
        source="Figure 5; Table 2, 30.16 to 40.08",
        lower="sepllm-n128",
        higher="sepllm-n64",
    ),
    Claim(text="A full first layer helps: H is better than n=64", source="Table 2, 36.54 to 40.08", lower="sepllm-n64H", higher="sepllm-n64"),
    Claim(text="A full last layer helps too: HT is better than H", source="Table 2, 33.41 to 36.54", lower="sepllm-n64HT", higher="sepllm-n64H"),
    Claim(text="Full attention is better than StreamingLLM n=64", source="Table 2, 34.83 to 44.03", lower="full", higher="streamingllm-n64"),
    Claim(text="Full attention is better than SepLLM n=64", source="Table 2, 34.83 to 40.08", lower="full", higher="sepllm-n64"),
    Claim(text="SepLLM n=128 is better than full attention", source="Table 2, 30.16 to 34.83", lower="sepllm-n128", higher="full"),
    Claim(
        text="The standard softmax is better than SA-softmax",
        source="logs, Wikitext perplexity 33.66 (Pythia's) to 104.79",
        lower="full",
        higher="sa",
    ),
    Claim(
        text="HT is better without BiPE",
        source="logs, Wikitext perplexity 29.19 to 168.19",
        lower="sepllm-n64HT",
        higher="sepllm-n64HT-bipe-rotary",
    ),
    Claim(text="SepLLM n=64 is ahead of full attention", source="Figures 1 and 5", lower="sepllm-n64", higher="full", at="equal operations"),
    Claim(text="SepLLM n=64 is ahead of full attention", source="Figure 1", lower="sepllm-n64", higher="full", at="equal time"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    claim: Claim
    difference: Interval
    """Loss of the method that the paper has lower, less that of the other."""

    @property
    def verdict(self) -> Verdict:
        verdicts: dict[int, Verdict] = {-1: "agrees", 0: "not separated", 1: "contrary"}
        return verdicts[self.difference.sign]


def findings(runs: Runs, claims: Sequence[Claim] = CLAIMS) -> list[Finding]:
    """Every claim whose two methods ran."""
    return [
        Finding(claim=claim, difference=_difference(runs[claim.lower], runs[claim.higher], claim.at))
        for claim in claims
        if claim.lower in runs and claim.higher in runs
    ]


def equal_cost(first: RunResult, second: RunResult, axis: Axis) -> tuple[float, float]:
    """Validation losses of both at the most of ``axis`` that both have come to."""
    value = min(getattr(first.curve[-1], axis), getattr(second.curve[-1], axis))
    return first.loss_at(value, axis), second.loss_at(value, axis)


def _difference(first: Mapping[int, RunResult], second: Mapping[int, RunResult], at: str) -> Interval:
    if at == "the end":
        return paired(_test_losses(first), _test_losses(second))
    axis: Axis = "flops" if at == "equal operations" else "cpu_s"
    both = {seed: equal_cost(first[seed], second[seed], axis) for seed in first}
    return paired({seed: losses[0] for seed, losses in both.items()}, {seed: losses[1] for seed, losses in both.items()})


def _test_losses(of_seeds: Mapping[int, RunResult]) -> BySeed:
    return {seed: run.test_loss for seed, run in of_seeds.items()}

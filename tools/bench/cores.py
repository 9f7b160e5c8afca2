"""Which attention core is the fastest where: the measurement behind `auto` (`sepllm/attention/measured.py`).

    python -m tools.bench.cores --device cpu --threads 1 --save

Every core computes the same calls in turn: training steps and prompts of all lengths, windows small and near the length, one or a few tokens
over a cache, and the self-adjust softmax, whose usual form is that of `dense`. A case where `auto` takes a core more than a quarter
slower than the best one is marked and makes the exit status 1. On a GPU the time of decoding counts from the call and not from the first
kernel: there is nothing else for the device to do meanwhile.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from sepllm.attention import attend, choose_core, core_names, prepare, spec_of
from sepllm.layout import KeyRanges, TokenLayout
from sepllm.pattern import UNBOUNDED, AttentionPattern, SelfAdjust, Softmax, Standard
from tools.bench import report
from tools.bench.lineup import DTYPES
from tools.bench.machine import describe
from tools.bench.measure import Ratio, interleave
from tools.bench.problem import INITIAL_TOKENS, Inputs
from tools.bench.stopwatch import Elapsed, Stopwatch
from tools.bench.text import TokenStream, add_text_flags, chosen_stream
from tools.command import until_stopped

TOLERANCE = 1.25
"""`auto` may be this many times slower than the fastest core: cores closer than that change places from run to run."""
HEADS, HEAD_SIZE = 8, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kind of call."""

    batch: int
    queries: int
    keys: int
    window: int
    has_backward: bool = False
    softmax: Softmax = Standard()

    def __str__(self) -> str:
        kind = "training" if self.has_backward else "decoding" if self.is_decoding else "prompt"
        window = "full" if self.window == UNBOUNDED else f"n = {self.window}"
        softmax = f", {self.softmax_name} self-adjust" if isinstance(self.softmax, SelfAdjust) else ""
        return f"{kind}, {self.batch} x {self.queries} over {self.keys}, {window}{softmax}"

    @property
    def is_decoding(self) -> bool:
        """Over a cache: a few tokens, then whatever chooses the next ones."""
        return self.queries < self.keys

    @property
    def softmax_name(self) -> str:
        return self.softmax.kind if isinstance(self.softmax, SelfAdjust) else "standard"


CASES = (
    *(Case(batch=1, queries=length, keys=length, window=8, has_backward=True) for length in (16, 64)),
    *(Case(batch=1, queries=length, keys=length, window=64, has_backward=True) for length in (128, 512, 2048)),
    *(Case(batch=1, queries=length, keys=length, window=UNBOUNDED, has_backward=True) for length in (64, 512, 2048)),
    *(Case(batch=1, queries=1024, keys=1024, window=window, has_backward=True) for window in (256, 900)),
    *(Case(batch=1, queries=length, keys=length, window=64) for length in (33, 512, 2048)),
    *(Case(batch=batch, queries=1, keys=keys, window=64) for batch, keys in ((1, 128), (1, 2048), (8, 2048))),
    *(Case(batch=batch, queries=1, keys=keys, window=UNBOUNDED) for batch, keys in ((1, 128), (1, 2048), (8, 2048))),
    *(Case(batch=1, queries=queries, keys=2048, window=64) for queries in (4, 32, 128)),
    *(
        Case(batch=1, queries=length, keys=length, window=window, has_backward=True, softmax=SelfAdjust(kind=kind))
        for kind in ("normalised", "raw")
        for length in (512, 2048)
        for window in (64, UNBOUNDED)
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    case: Case
    dtype: str
    ms: dict[str, float]
    """Median time of each core that can compute the case."""
    chosen: str
    behind: Ratio
    """Time of the chosen core over that of the fastest, round by round."""
    failures: tuple[str, ...] = ()
    """Of cores that ought to compute the case."""

    @property
    def fastest(self) -> str:
        return min(self.ms, key=self.ms.__getitem__)

    @property
    def is_bad(self) -> bool:
        return self.behind.median > TOLERANCE

    def as_dict(self) -> dict[str, object]:
        names = ("batch", "queries", "keys", "window", "has_backward")
        ours = {
            "softmax": self.case.softmax_name,
            "dtype": self.dtype,
            "ms": self.ms,
            "chosen": self.chosen,
            "fastest": self.fastest,
            "behind": self.behind.median,
        }
        return {name: getattr(self.case, name) for name in names} | ours


def main(argv: Sequence[str] | None = None, *, cases: Sequence[Case] = CASES) -> int:
    arguments = parse(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no CUDA device here; use --device cpu.", file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    machine, text = describe(device), chosen_stream(arguments)
    verdicts = [judge(case, dtype, text, device, rounds=arguments.rounds, cores=arguments.cores) for dtype in arguments.dtype for case in cases]
    table, failures = table_of(verdicts, arguments.cores), [failure for verdict in verdicts for failure in verdict.failures]
    print(table.text(), *failures, sep="\n")
    title = f"Attention cores in {' and '.join(arguments.dtype)}: {machine.title()}"
    result = report.Result(
        header={**machine.as_dict(), "command": arguments.command, "text": text.name},
        body={"rows": [verdict.as_dict() for verdict in verdicts]},
        tables=[table],
        notes=[failure.partition("\n")[0] for failure in failures],
        title=title,
        picture=None,
    )
    report.deliver(result, arguments, "cores", *arguments.dtype)
    return 1 if failures or any(verdict.is_bad for verdict in verdicts) else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="tools.bench.cores", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    flags.add_argument("--threads", type=int, default=1, help="of a CPU (default: %(default)s)")
    flags.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    flags.add_argument("--cores", nargs="+", choices=core_names(), default=[name for name in core_names() if name not in ("flex", "fused_triton")])
    flags.add_argument("--rounds", type=int, default=15)
    add_text_flags(flags)
    return report.parsed(flags, argv)


def judge(case: Case, dtype: str, text: TokenStream, device: torch.device, *, rounds: int, cores: Sequence[str]) -> Verdict:
    """Times of the cores on one case, and how far behind the best one `auto` is."""
    ranges, inputs = ranges_of(case, text).to(device), inputs_of(case, DTYPES[dtype], device)
    spec = spec_of(inputs.q, ranges, softmax=case.softmax, needs_grad=case.has_backward)
    watch = Stopwatch(device, hides_launching=not case.is_decoding)
    calls: dict[str, Callable[[], Elapsed]] = {}
    failures: dict[str, str] = {}
    for core in cores:
        try:
            prepare(ranges, spec, core)
        except ValueError:  # the core says that it cannot compute this
            continue
        attention = partial(attend, ranges=ranges, scale=HEAD_SIZE**-0.5, softmax=case.softmax, core=core)
        call = partial(watch.time, attention, inputs, has_backward=case.has_backward)
        try:
            call()
        except Exception as error:  # whatever it raises is this core's failure, and the others go on
            failures[core] = f"{case}, {dtype}: {core} failed: {error}"
        else:
            calls[core] = call
    interleave(calls, rounds=1)
    seconds = {core: [one.total_s or one.forward_s for one in elapsed] for core, elapsed in interleave(calls, rounds=rounds).items()}
    ms = {core: 1e3 * sorted(times)[len(times) // 2] for core, times in seconds.items()}
    chosen = choose_core(spec)
    if chosen in failures:
        raise ValueError(f"auto takes a core that cannot run. {failures[chosen]}")
    behind = Ratio.of(seconds[chosen], seconds[min(ms, key=ms.__getitem__)])
    return Verdict(case=case, dtype=dtype, ms=ms, chosen=chosen, behind=behind, failures=tuple(failures.values()))


def ranges_of(case: Case, text: TokenStream) -> KeyRanges:
    pattern = AttentionPattern(
        initial_tokens=INITIAL_TOKENS, separator_ids=frozenset(text.separator_ids), windows=(case.window,), softmax=case.softmax
    )
    ids = text.rows(case.batch, case.keys, target=None)
    if case.queries == case.keys:
        return TokenLayout.from_ids(ids, pattern).ranges(0)
    return TokenLayout.from_ids(ids[:, : -case.queries], pattern).extend(ids[:, -case.queries :]).ranges(0)


def inputs_of(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    lengths = (case.queries, case.keys, case.keys, case.queries)
    tensors = (torch.randn(case.batch, length, HEADS, HEAD_SIZE, generator=generator).to(device, dtype) for length in lengths)
    return Inputs.leaves(*tensors)


def table_of(verdicts: Sequence[Verdict], cores: Sequence[str]) -> report.Table:
    def row(verdict: Verdict) -> tuple[str, ...]:
        times = (f"{verdict.ms[core]:.3f}" if core in verdict.ms else "" for core in cores)
        behind = f"{verdict.behind.median:.2f}" + (" BAD" if verdict.is_bad else "")
        return (str(verdict.case), verdict.dtype, *times, verdict.fastest, verdict.chosen, behind)

    title = f"Milliseconds of one call, {HEADS} heads of {HEAD_SIZE}; training is forward and backward. behind: auto's core over the fastest."
    return report.Table(title=title, columns=("case", "dtype", *cores, "fastest", "auto", "behind"), rows=[row(verdict) for verdict in verdicts])


if __name__ == "__main__":
    sys.exit(until_stopped(main))

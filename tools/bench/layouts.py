"""Whether a run comes out the same however it is spread over processes: its losses, gradient norms and weights beside one process's.

    python -m tools.bench.layouts --save

Every run trains the same small model on the same tokens from the same seed, through the trainer, on processes of this machine (gloo). Sums
in another order round differently, and training amplifies that: how far apart runs may be is measured by running one process twice more,
with all its samples in one micro-batch, and with its operators in plain torch. Another sample anywhere would show in the losses.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron.config.loader import config_from_json, config_to_json, load_config
from megatron.config.schema import Config
from megatron.data.indexed import IndexedDatasetWriter
from megatron.model.gpt import build_model
from megatron.training.metrics import metrics_path
from megatron.training.weights import read_weights
from tools.bench import report
from tools.bench.machine import ROOT, describe
from tools.command import until_stopped

BASE = ROOT / "configs" / "local" / "tiny.yml"
PAGE = ROOT / "docs" / "parallel.md"
MARKS = ("<!-- written by tools.bench.layouts -->", "<!-- end -->")
"""In the page, around its overview."""
SEPARATORS = [46, 44, 63, 33, 59, 58, 32, 9, 10]
"""As bytes, every eleventh token or so of the made-up text."""
SAMPLES = 8
"""Of a step."""
ALLOWED = 4.0
"""Times what the other runs of one process show, beyond which a layout counts as different."""
LEAST = {"fp32": 2e-6, "bfloat16": 4e-3}
"""Relative difference that those could have shown, where they show less."""
WINDOWS = {
    "prefill_local_window_size": 16,
    "generate_local_window_size": 16,
    "separator_token_ids": SEPARATORS,
    "init_tok_max_idx": 2,
}
BY_LAYER = {
    "USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS": True,
    "prefill_loc_win_size_list": [128, 16, 24, 128],
    "USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS": True,
    "generate_win_loc_size_list": [128, 16, 24, 128],
}
METHODS: dict[str, dict[str, object]] = {
    "sepllm": WINDOWS,
    "sepllm-HT": WINDOWS | BY_LAYER,
    "full": {"USE_ORIGINAL_FULL_ATTEN": True},
    "streaming": WINDOWS | {"streamingLLM": True, "separator_token_ids": [-1]},
    "sa": WINDOWS | {"USE_SA_SOFTMAX": True},
    "sa-no-denominator": WINDOWS | {"USE_SA_SOFTMAX_NO_DENO": True},
    "bipe-rotary": WINDOWS | BY_LAYER | {"USE_BiPE": True, "BiPE_seps": SEPARATORS},
    "bipe-alibi": WINDOWS | {"USE_BiPE": True, "BiPE_seps": SEPARATORS, "pos_emb": "alibi"},
    "tied": WINDOWS | {"no_weight_tying": False, "gpt_j_residual": False},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a run is spread. Written as ``dp2-tp2-zero1``; what is 1, or stage 0, is left out, and ``one`` is one process."""

    dp: int = 1
    tp: int = 1
    sp: bool = False
    """Megatron's sequence parallelism, inside the tensor-parallel group."""
    pp: int = 1
    cp: int = 1
    zero: int = 0

    @classmethod
    def parse(cls, text: str) -> Layout:
        """ValueError for a word that is none of a layout's."""
        sizes: dict[str, int | bool] = {}
        for word in text.split("-"):
            name = word.rstrip("0123456789")
            if word == "one":
                continue
            if name not in {field.name for field in fields(cls)} or (name == "sp") != (word == name):
                raise ValueError(f"{word} in layout {text} is unknown: write dp2, tp2, sp, pp2, cp2 or zero1, joined by hyphens, or one.")
            sizes[name] = True if name == "sp" else int(word[len(name) :])
        return cls(**sizes)  # type: ignore[arg-type]

    def __str__(self) -> str:
        words = [f"{name}{size}" for name in ("dp", "tp", "pp", "cp") if (size := getattr(self, name)) > 1]
        words += ["sp"] * self.sp + [f"zero{self.zero}"] * (self.zero > 0)
        return "-".join(words) or "one"

    @property
    def processes(self) -> int:
        return self.dp * self.tp * self.pp * self.cp

    def overrides(self) -> dict[str, object]:
        """The keys of the configuration that say so."""
        return {
            "model_parallel_size": self.tp,
            "sequence_parallel": self.sp,
            "pipe_parallel_size": self.pp if self.pp > 1 else 0,
            "context_parallel_size": self.cp,
            "zero_optimization": {"stage": self.zero},
        }


ONE = Layout()
LAYOUTS = (
    *("dp2", "dp4", "dp2-zero1", "dp2-zero2", "dp2-zero3"),
    *("tp2", "tp2-sp", "dp2-tp2-zero1"),
    *("pp2", "pp4", "dp2-pp2-zero1", "tp2-pp2", "tp2-pp2-sp"),
    *("cp2", "cp4", "dp2-cp2-zero1", "tp2-cp2"),
)
OF_EVERY_METHOD = ("tp2", "pp2", "tp2-pp2", "cp2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    method: str
    precision: str
    layout: Layout
    micro_batch: int = 1
    operators: str = "auto"
    """What the environment says of them: see `sepllm.ops.choice`."""

    @property
    def name(self) -> str:
        return f"{self.method}-{self.precision}-{self.layout}-micro{self.micro_batch}-{self.operators}"

    @property
    def again(self) -> tuple[Case, Case]:
        """Two other runs of one process, which differ from this one by rounding."""
        return replace(self, micro_batch=SAMPLES), replace(self, operators="reference")

    def config(self, folder: Path, *, steps: int) -> Config:
        """The run of this case, on the tokens of ``folder``, which keeps its checkpoint too."""
        own = {
            "num_layers": 4,
            "train_iters": steps,
            "lr_decay_iters": steps,
            "eval_interval": steps,
            "eval_iters": 1,
            "data_path": str(folder / "text"),
            "save": str(folder / self.name),
            "checkpoint_factor": steps,
            "precision": self.precision,
            "train_batch_size": SAMPLES,
            "train_micro_batch_size_per_gpu": self.micro_batch,
        }
        return load_config([BASE], overrides=own | METHODS[self.method] | self.layout.overrides(), world_size=self.layout.processes, device="cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    losses: list[float]
    norms: list[float]
    validation: list[float]
    weights: Mapping[str, Tensor]

    @classmethod
    def read(cls, config: Config, *, steps: int) -> Outcome:
        path = metrics_path(config)
        assert path is not None
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

        def all_of(name: str) -> list[float]:
            return [line[name] for line in lines if name in line]

        checkpoint = path.parent / f"global_step{steps}"
        return cls(
            losses=all_of("train/lm_loss"),
            norms=all_of("train/grad_norm"),
            validation=all_of("validation/lm_loss"),
            weights=read_weights(checkpoint, model=config.model, trust=True).state,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """Largest relative differences between two runs."""

    loss: float
    norm: float
    weights: float
    """Euclidean distance of all weights at the end, over the way that they have come."""

    @classmethod
    def between(cls, run: Outcome, other: Outcome, *, start: Mapping[str, Tensor]) -> Distance:
        if run.weights.keys() != other.weights.keys():
            raise ValueError("The two checkpoints hold different parameters.")
        apart, way = (
            math.sqrt(sum(float((run.weights[name].detach().double() - end[name].detach().double()).square().sum()) for name in run.weights))
            for end in (other.weights, start)
        )
        return cls(
            loss=_relative(run.losses + run.validation, other.losses + other.validation), norm=_relative(run.norms, other.norms), weights=apart / way
        )

    @classmethod
    def largest(cls, distances: Sequence[Distance]) -> Distance:
        return cls(**{field.name: max(getattr(distance, field.name) for distance in distances) for field in fields(cls)})

    def is_within(self, noise: Distance, *, least: float) -> bool:
        """Whether none is beyond what ``noise`` allows."""
        pairs = ((self.loss, noise.loss), (self.norm, noise.norm), (self.weights, noise.weights))
        return all(own <= ALLOWED * max(allowed, least) for own, allowed in pairs)


def _relative(values: Sequence[float], wanted: Sequence[float]) -> float:
    if len(values) != len(wanted):
        raise ValueError(f"One run reports {len(values)} values and the other {len(wanted)}.")
    return float(np.max(np.abs(np.subtract(values, wanted)) / np.abs(wanted)))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.worker:
        return train_all(arguments.worker)
    try:
        result, problems = run(arguments)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    report.deliver(result, arguments, "layouts")
    if arguments.save:
        PAGE.write_text(with_overview(PAGE.read_text(encoding="utf-8"), result.body["rows"]), encoding="utf-8")  # type: ignore[arg-type]
        print(f"wrote {PAGE}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="tools.bench.layouts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--layouts", nargs="+", default=LAYOUTS, help="of method sepllm (default: %(default)s)")
    flags.add_argument("--layouts-of-methods", nargs="+", default=OF_EVERY_METHOD, help="of the other methods (default: %(default)s)")
    flags.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="default: all")
    flags.add_argument("--precisions", nargs="+", default=list(LEAST), choices=list(LEAST), help="default: all")
    flags.add_argument("--steps", type=int, default=6)
    flags.add_argument("--worker", nargs="+", type=Path, help=argparse.SUPPRESS)
    return report.parsed(flags, argv)


def run(arguments: argparse.Namespace) -> tuple[report.Result, list[str]]:
    """Trains every case, those of one number of processes in one job, and compares."""
    cases = cases_of(arguments)
    with tempfile.TemporaryDirectory(prefix="layouts-") as scratch:
        folder = Path(scratch)
        write_text(folder / "text")
        configs = {case: case.config(folder, steps=arguments.steps) for case in cases}
        jobs: dict[tuple[int, str], list[Case]] = defaultdict(list)
        for case in cases:
            jobs[case.layout.processes, case.operators].append(case)
        for (processes, operators), together in sorted(jobs.items()):
            print(f"{len(together)} runs on {processes} process{'es' if processes > 1 else ''}", flush=True)
            train_on([configs[case] for case in together], processes=processes, operators=operators, folder=folder)
        outcomes = {case: Outcome.read(configs[case], steps=arguments.steps) for case in cases}
        starts = {case.method: build_model(configs[case], device="cpu", dtype=torch.float32).state_dict() for case in cases}
    rows = compare(outcomes, starts)
    for row in rows:
        print(row.line, flush=True)
    machine = describe(torch.device("cpu"))
    header = {**machine.as_dict(), "command": arguments.command, "steps": arguments.steps, "samples a step": SAMPLES}
    result = report.Result(
        header=header,
        body={"rows": [row.as_dict() for row in rows]},
        tables=[table(rows)],
        notes=[],
        title=f"Runs by layout: {machine.title()}",
        picture=None,
    )
    return result, [f"{row.case.name} is not the run of one process: {row.line}" for row in rows if not row.is_same]


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """One process three times for each method and precision, and its layouts."""
    cases = []
    for precision in arguments.precisions:
        for method in arguments.methods:
            layouts = arguments.layouts if method == "sepllm" else arguments.layouts_of_methods
            one = Case(method=method, precision=precision, layout=ONE)
            cases += [one, *one.again]
            cases += [Case(method=method, precision=precision, layout=_startable(Layout.parse(layout), precision)) for layout in layouts]
    return cases


def _startable(layout: Layout, precision: str) -> Layout:
    """With ZeRO 1 where DeepSpeed's bf16 optimizer alone would count a part of the gradients only."""
    is_cut = layout.tp > 1 or layout.pp > 1
    return replace(layout, zero=1) if is_cut and precision != "fp32" and layout.zero == 0 else layout


def write_text(prefix: Path) -> None:
    """Documents of random letters with separators among them, the same everywhere."""
    letters = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(64):
            ids = letters.integers(97, 123, size=200)
            ids[letters.random(200) < 0.09] = letters.choice(SEPARATORS)
            writer.add_document(ids)


def train_on(configs: Sequence[Config], *, processes: int, operators: str, folder: Path) -> None:
    """Trains one configuration after the other on so many processes of this machine. RuntimeError with what they printed where one fails."""
    paths = [folder / f"{processes}-{operators}-{place}.json" for place in range(len(configs))]
    for path, config in zip(paths, configs, strict=True):
        path.write_text(config_to_json(config), encoding="utf-8")
    shared = {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "SEPLLM_OPS": operators,
    }
    workers, logs = [], [folder / f"{processes}-rank{rank}.log" for rank in range(processes)]
    for rank, log in enumerate(logs):
        own = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)}
        with log.open("w") as output:
            command = [sys.executable, "-m", "tools.bench.layouts", "--worker", *map(str, paths)]
            workers.append(subprocess.Popen(command, env=own, stdout=output, stderr=subprocess.STDOUT, cwd=folder))
    try:
        statuses = [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    if any(statuses):
        raise RuntimeError(
            "\n".join(
                f"rank {rank}: status {status}\n{log.read_text()[-4000:]}" for rank, (status, log) in enumerate(zip(statuses, logs, strict=True))
            )
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train_all(paths: Sequence[Path]) -> int:
    """What one process of a job does."""
    from megatron.training.trainer import train

    for path in paths:
        train(config_from_json(path.read_text(encoding="utf-8")))
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    case: Case
    distance: Distance
    noise: Distance
    """Of one process, with another micro-batch or other operators."""

    @property
    def is_same(self) -> bool:
        return self.distance.is_within(self.noise, least=LEAST[self.case.precision])

    @property
    def cells(self) -> tuple[str, ...]:
        pairs = ((self.distance.loss, self.noise.loss), (self.distance.norm, self.noise.norm), (self.distance.weights, self.noise.weights))
        figures = [f"{value:.1e}" for pair in pairs for value in pair]
        return (self.case.method, str(self.case.layout), self.case.precision, *figures, "yes" if self.is_same else "NO")

    @property
    def line(self) -> str:
        return "  ".join(self.cells)

    def as_dict(self) -> dict[str, object]:
        return {
            "method": self.case.method,
            "layout": str(self.case.layout),
            "precision": self.case.precision,
            **{f"{name} difference": getattr(self.distance, name) for name in ("loss", "norm", "weights")},
            **{f"{name} difference of one process": getattr(self.noise, name) for name in ("loss", "norm", "weights")},
            "is_same": self.is_same,
        }


def compare(outcomes: Mapping[Case, Outcome], starts: Mapping[str, Mapping[str, Tensor]]) -> list[Row]:
    """Every case that is spread beside one process with the same micro-batch."""
    rows = []
    for case, outcome in outcomes.items():
        if case.layout == ONE:
            continue
        one = Case(method=case.method, precision=case.precision, layout=ONE)
        start = starts[case.method]
        noise = Distance.largest([Distance.between(outcomes[again], outcomes[one], start=start) for again in one.again])
        rows.append(Row(case=case, distance=Distance.between(outcome, outcomes[one], start=start), noise=noise))
    return rows


def table(rows: Sequence[Row]) -> report.Table:
    columns = ("method", "layout", "precision", "loss", "allowed by", "grad norm", "allowed by", "weights", "allowed by", "same")
    title = (
        "Largest relative difference to one process, and, under *allowed by*, that of one process to itself with another micro-batch or operators. "
        f"Same: at most {ALLOWED:g} times that, or times {LEAST['fp32']:g} (fp32) and {LEAST['bfloat16']:g} (bfloat16) where it is less."
    )
    return report.Table(title=title, columns=columns, rows=[row.cells for row in rows])


def with_overview(page: str, rows: Sequence[Mapping[str, object]]) -> str:
    """``page`` with the tables of these rows of a saved result between its marks."""
    before, _, rest = page.partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    if not mark:
        raise ValueError(f"{PAGE} has no lines {MARKS[0]} and {MARKS[1]}: put them back, the overview stands between them.")
    return "\n\n".join([before + MARKS[0], *(table.markdown() for table in overview(rows)), MARKS[1] + after])


def overview(rows: Sequence[Mapping[str, object]]) -> list[report.Table]:
    """SepLLM by layout and, of the other methods, the losses; what is not the same run is bold."""
    by_case = {(str(row["method"]), _asked_layout(row), str(row["precision"])): row for row in rows}
    methods, layouts = list(dict.fromkeys(method for method, _, _ in by_case)), list(dict.fromkeys(layout for _, layout, _ in by_case))
    first, *others = methods

    def figures(method: str, layout: str, *names: str) -> list[str]:
        return [_figure(by_case[method, layout, precision], name) for precision in LEAST for name in names if (method, layout, precision) in by_case]

    shared = [layout for layout in layouts if all((method, layout, precision) in by_case for method in methods for precision in LEAST)]
    names = ("loss", "norm", "weights")
    columns = ("layout", *(f"{precision}: {name}" for precision in LEAST for name in names))
    of_first = [(layout, *figures(first, layout, *names)) for layout in layouts]
    of_others = [(method, *(" and ".join(figures(method, layout, "loss")) for layout in shared)) for method in others]
    return [
        report.Table(title=f"{first}: largest relative difference to one process", columns=columns, rows=of_first),
        report.Table(title=f"Losses of the other methods, {' and '.join(LEAST)}", columns=("method", *shared), rows=of_others),
    ]


def _asked_layout(row: Mapping[str, object]) -> str:
    """Without the ZeRO 1 of `_startable`."""
    layout = str(row["layout"])
    return layout if layout in LAYOUTS else layout.removesuffix("-zero1")


def _figure(row: Mapping[str, object], name: str) -> str:
    text = f"{row[f'{name} difference']:.0e}"
    return text if row["is_same"] else f"**{text}**"


if __name__ == "__main__":
    sys.exit(until_stopped(main))

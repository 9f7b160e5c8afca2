"""The paper's attention patterns on one small model: which of them a few seeds can tell apart, and what each costs.

    python -m tools.sepllm.study                          # every default method, five seeds; half an hour on two quiet cores
    python -m tools.sepllm.study full sepllm-n256 my.yml  # others: names in configs/method, or paths of such files
    python -m tools.sepllm.study --save                   # and docs/study.md with its picture, and the points in benchmarks/results/

Every run is a file in --out, so the same command goes on where it was stopped, and shows the outcome again where all is done. A method is
its YAML file on the base's model, with the separators of the base's tokenizer. All methods of a seed have the same initial weights, data
in the same order, schedule and held-out rows.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from megatron.config.loader import load_config
from megatron.config.schema import Config
from megatron.data.tokenizer import build_tokenizer, find_separator_ids
from tools.bench.machine import describe
from tools.bench.report import RESULTS, base_name
from tools.command import until_stopped
from tools.datasets import demo_corpus
from tools.sepllm.study.document import Study
from tools.sepllm.study.figure import draw
from tools.sepllm.study.methods import BASE, TITLES, Method
from tools.sepllm.study.plan import ROOT, carry_out, tasks_of

TEXT = Path("data/study")
"""Where the base finds its text."""
VOCAB_SIZE = 1024
"""Of the text's tokenizer. With the demo's 8192 the short runs of a study would learn how often words occur, and little else."""
BASELINE = "full"
"""Differences are shown from this method, or from the first where it does not take part."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        study = run(arguments)
    except (ValueError, RuntimeError) as mistake:
        print(mistake, file=sys.stderr)
        return 1
    print(f"\n{study.summary()}")
    for path in write(study, arguments):
        print(f"wrote {path}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="tools.sepllm.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("methods", nargs="*", default=list(TITLES), metavar="METHOD", help=f"default: {' '.join(TITLES)}")
    flags.add_argument("--base", type=Path, default=BASE, metavar="YML", help="model, data and schedule (default: configs/local/study.yml)")
    flags.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="two at least (default: 1 to 5)")
    flags.add_argument("--steps", type=int, help="of every run (default: the base's train_iters)")
    flags.add_argument("--lr", type=float, help="the schedule's peak, its floor a tenth of that (default: the base's)")
    cores = len(os.sched_getaffinity(0))
    flags.add_argument("--processes", type=int, default=cores, help="runs at a time, of one thread each (default: %(default)s)")
    flags.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the runs and the picture (default: %(default)s)")
    flags.add_argument("--save", action="store_true", help="write docs/study.md, docs/study.png and benchmarks/results/DATE-DEVICE-study.json")
    words = list(sys.argv[1:] if argv is None else argv)
    return flags.parse_args(words, argparse.Namespace(command=shlex.join(["python", "-m", "tools.sepllm.study", *words])))


def run(arguments: argparse.Namespace) -> Study:
    """All runs, trained now or before; ValueError where what was asked for makes no study."""
    methods = [Method.find(word) for word in arguments.methods]
    names = [method.name for method in methods]
    if len(set(names)) < max(len(names), 2):
        raise ValueError(f"The methods are {', '.join(names)}: give at least two, each with a name of its own.")
    if len(set(arguments.seeds)) < 2:
        raise ValueError(f"The seeds are {arguments.seeds}: intervals need at least two different ones.")
    if arguments.base == BASE:
        make_text()
    separators = separators_of(arguments.base)
    machine = describe(torch.device("cpu"))
    overrides = {} if arguments.steps is None else {"train_iters": arguments.steps}
    if arguments.lr is not None:
        overrides |= {"optimizer.params.lr": arguments.lr, "min_lr": arguments.lr / 10}

    def config_of(method: Method, seed: int) -> Config:
        return method.config(arguments.base, separators=separators, overrides={**overrides, "seed": seed})

    tasks = tasks_of(methods, list(dict.fromkeys(arguments.seeds)), config_of, arguments.out)
    results = carry_out(tasks, processes=arguments.processes, say=lambda line: print(line, flush=True))
    baseline = BASELINE if BASELINE in names else names[0]
    return Study(
        runs={name: {result.seed: result for result in results if result.method == name} for name in names},
        titles={method.name: method.title for method in methods},
        baseline=baseline,
        config=next(task.config for task in tasks if task.method.name == baseline),
        machine=machine.as_dict(),
        command=arguments.command,
        processes=arguments.processes,
    )


def make_text() -> None:
    """The demo's text and splits in a smaller vocabulary, unless they are there."""
    if not (TEXT / "data.json").exists():
        print(f"Making {TEXT} ...", flush=True)
        demo_corpus.build([*demo_corpus.shakespeare(), *demo_corpus.king_james()], TEXT, vocab_size=VOCAB_SIZE)


def separators_of(base: Path) -> list[int]:
    """Ids of SepLLM's nine characters in the tokenizer of ``base``."""
    return find_separator_ids(build_tokenizer(load_config([base], world_size=1, device="cpu").tokenizer))


def write(study: Study, arguments: argparse.Namespace) -> list[Path]:
    """The picture into the folder of the runs; with --save the document, its picture and all points too."""
    title = f"{len(study.seeds)} seeds, {study.config.training.train_iters} steps of {study.config.model.seq_length} x "
    title += f"{study.config.batch.train_batch_size} tokens: means; {study.machine['device']}, {study.machine['date']}"
    picture = arguments.out / "study.png"
    draw(study.runs, study.titles, study.baseline, picture, title=title)
    if not arguments.save:
        return [picture]
    data = RESULTS / f"{base_name(str(study.machine['date']), str(study.machine['device']), 'study')}.json"
    document = ROOT / "docs" / "study.md"
    saved_picture = document.with_name("study.png")
    saved_picture.write_bytes(picture.read_bytes())
    document.write_text(study.markdown(picture=saved_picture.name, data=f"../{data.relative_to(ROOT)}"), encoding="utf-8")
    data.write_text(as_json(study), encoding="utf-8")
    return [picture, document, saved_picture, data]


def as_json(study: Study) -> str:
    """Every figure of every run, a line a run."""
    header = json.dumps({**study.machine, "command": study.command, "files": [file.text for file in study.config.files]})
    runs = ",\n".join(json.dumps(asdict(result)) for of_seeds in study.runs.values() for result in of_seeds.values())
    return f'{{"header": {header},\n"runs": [\n{runs}\n]}}\n'


if __name__ == "__main__":
    sys.exit(until_stopped(main))

"""Scores of a model of transformers that reads as SepLLM without training, method by method: a table like the paper's Table 1.

    python -m tools.bench.training_free --model models/mine --data data/eval --scores scores --save

Each method is scored on each task of configs/eval by lm-eval, through `sepllm.lm_eval`; ``--tasks`` says on how many of its first documents and
with how many shots. What was scored once stays in ``--scores``, so that a run that was interrupted goes on when the same command is given again.
SepCache concerns tokens that are generated; texts that are scored it reads token by token.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from sepllm.hf.separators import separators_of
from sepllm.lm_eval.versions import package_versions
from tools.bench import report
from tools.bench.machine import ROOT, describe
from tools.command import exit_status

KINDS = ("vanilla", "streamingllm", "sepllm", "fixllm", "sepcache")
INTERVAL = 5
"""Of FixLLM, in tokens: the paper's."""
RESAMPLES = 100
"""Of documents, for the error of a perplexity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    name: str
    """Of a file in configs/eval."""
    documents: int
    """The first ones of the task."""
    shots: int

    @classmethod
    def read(cls, words: str) -> Task:
        """``name:documents:shots``"""
        name, *numbers = words.split(":")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers) or numbers[0] == "0":
            raise argparse.ArgumentTypeError(f"{words}: give name:documents:shots, such as local_arc_easy:40:5")
        return cls(name=name, documents=int(numbers[0]), shots=int(numbers[1]))

    def __str__(self) -> str:
        return f"{self.name.removeprefix('local_')}, {self.documents} documents, {self.shots} shots"


TASKS = (
    Task(name="local_wikitext", documents=3, shots=0),
    Task(name="local_lambada", documents=150, shots=0),
    Task(name="local_arc_easy", documents=40, shots=5),
    Task(name="local_piqa", documents=40, shots=5),
    Task(name="local_gsm8k", documents=8, shots=5),
)
FROM_A_CACHE = ("local_wikitext", "local_gsm8k")
"""Tasks that a SepCache is scored on. With few shots the texts of the others are shorter than a cache, which then drops nothing."""
SHOWN = {
    "local_wikitext": ("word_perplexity",),
    "local_lambada": ("perplexity", "acc"),
    "local_arc_easy": ("acc", "acc_norm"),
    "local_piqa": ("acc", "acc_norm"),
    "local_gsm8k": ("strict", "flexible"),
}
"""Metrics of the table, by task; of other tasks all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    name: str
    keys: Mapping[str, object] | None
    """Of the reference's training-free YAML file. None: without one."""
    model_args: Mapping[str, object]
    tasks: tuple[str, ...] | None = None
    """The only ones that it is scored on. None: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What one method reached on one task."""

    method: str
    task: Task
    metrics: Mapping[str, float]
    errors: Mapping[str, float]
    """Standard errors, where lm-eval tells them."""
    kv_ratio: float
    """Mean over texts, as a fraction."""
    kv_texts: int


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: run(parse(argv)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(prog="tools.bench.training_free", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", required=True, metavar="FOLDER", help="of transformers, with its tokenizer")
    flags.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with the files that the tasks name (docs/evaluation.md)")
    flags.add_argument("--scores", type=Path, required=True, metavar="FOLDER", help="where each score is kept")
    flags.add_argument(
        "--tasks", type=Task.read, nargs="+", default=TASKS, metavar="NAME:DOCUMENTS:SHOTS", help=f"(default: {'; '.join(map(str, TASKS))})"
    )
    flags.add_argument("--methods", nargs="+", choices=KINDS, default=KINDS, help="(default: all)")
    flags.add_argument(
        "--windows", type=int, nargs="+", default=[64, 128, 256], metavar="N", help="of SepLLM; the last is StreamingLLM's and FixLLM's too"
    )
    flags.add_argument(
        "--cache", type=int, nargs=4, default=[4, 128, 256, 512], metavar=("A", "S", "W", "C"), help="SepCache's sizes (default: %(default)s)"
    )
    flags.add_argument(
        "--max-length", type=int, default=2048, help="longer texts are cut, or read in windows of so many tokens (default: %(default)s)"
    )
    flags.add_argument("--batch-size", type=int, default=2, help="(default: %(default)s)")
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    flags.add_argument("--threads", type=int, default=1, help="of a CPU (default: %(default)s)")
    flags.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    return report.parsed(flags, argv)


def run(arguments: argparse.Namespace) -> None:
    """Scores what is not scored yet, task by task, and writes the table."""
    torch.set_num_threads(arguments.threads)
    os.environ["SEPLLM_EVAL_DATA"] = str(arguments.data)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    num_layers = AutoConfig.from_pretrained(arguments.model).num_hidden_layers
    every = methods_of(arguments, AutoTokenizer.from_pretrained(arguments.model), num_layers)
    methods = [method for method in every if method.name.partition(" ")[0].lower() in arguments.methods]
    arguments.scores.mkdir(parents=True, exist_ok=True)
    scores = []
    for task in arguments.tasks:
        for method in methods:
            if method.tasks is None or task.name in method.tasks:
                scores.append(kept_or_made(method, task, arguments))
                print(f"{method.name} on {task}: {cell(scores[-1])}", flush=True)
    result = as_result(scores, methods, arguments)
    print("", *(table.text() for table in result.tables), sep="\n")
    report.deliver(result, arguments, "training-free", Path(arguments.model).name)


def methods_of(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, num_layers: int) -> Iterator[Method]:
    """The rows of the table. All but the first and the last keep three initial tokens."""
    separators = separators_of(tokenizer)
    largest = max(arguments.windows)

    def keys(window: int, **more: object) -> dict[str, object]:
        return {
            "separator_token_ids": list(separators.ids),
            "PADDING_ID": separators.padding_id,
            "init_tok_max_idx": 2,
            "prefill_local_window_size": window,
            "generate_local_window_size": window,
        } | more

    yield Method(name="vanilla", keys=keys(1, USE_ORIGINAL_FULL_ATTEN=True), model_args={})
    yield Method(name=f"StreamingLLM n={largest}", keys=keys(largest, streamingLLM=True), model_args={})
    for window in arguments.windows:
        yield Method(name=f"SepLLM n={window}", keys=keys(window), model_args={})
    intervals = {"USE_FIXED_SEP_INTERVALs": True, "fixed_sep_intervals_list": [INTERVAL] * num_layers}
    yield Method(name=f"FixLLM n={largest}", keys=keys(largest, **intervals), model_args={})
    sizes = dict(zip(("init_cache_size", "sep_cache_size", "local_size", "cache_size"), arguments.cache, strict=True))
    yield Method(
        name=f"SepCache {' '.join(map(str, arguments.cache))}",
        keys=None,
        model_args={"decode": "sepcache", "token_by_token": True, "USE_MAX_SEP_CACHE": True, **sizes},
        tasks=FROM_A_CACHE,
    )


def kept_or_made(method: Method, task: Task, arguments: argparse.Namespace) -> Score:
    """The score that the folder holds, or that of now. ValueError where the folder's is another model's or another task's."""
    made_with = {name: getattr(arguments, name) for name in ("model", "dtype", "max_length")} | {"keys": method.keys, "model_args": method.model_args}
    path = arguments.scores / f"{report.base_name(method.name, task.name)}.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if (found["made_with"], found["score"]["task"]) != (made_with, asdict(task)):
            raise ValueError(f"{path} was made with another model, method or number of documents: use another --scores folder, or delete it.")
        return Score(**found["score"] | {"task": task})
    score = scored(method, task, arguments)
    path.write_text(json.dumps({"made_with": made_with, "score": asdict(score)}, indent=1) + "\n", encoding="utf-8")
    return score


def scored(method: Method, task: Task, arguments: argparse.Namespace) -> Score:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from sepllm.lm_eval.model import SepLLMModel

    model_args: dict[str, Any] = dict(method.model_args)
    if method.keys is not None:
        path = arguments.scores / f"{report.base_name(method.name, 'sepllm')}.yml"
        path.write_text(yaml.safe_dump(dict(method.keys)), encoding="utf-8")
        model_args["sepllm_config"] = str(path)
    model = SepLLMModel(
        str(arguments.model),
        device=arguments.device,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        max_length=arguments.max_length,
        **model_args,
    )
    found = simple_evaluate(
        model=model,
        tasks=[task.name],
        limit=task.documents,
        num_fewshot=task.shots,
        task_manager=TaskManager(include_path=str(ROOT / "configs" / "eval"), include_defaults=False),
        bootstrap_iters=RESAMPLES,
    )["results"][task.name]
    numbers = {name.partition(",")[0]: value for name, value in found.items() if isinstance(value, float)}
    ratio = model.ratios.mean()
    assert ratio is not None
    return Score(
        method=method.name,
        task=task,
        metrics={name: value for name, value in numbers.items() if not name.endswith("_stderr")},
        errors={name.removesuffix("_stderr"): value for name, value in numbers.items() if name.endswith("_stderr")},
        kv_ratio=ratio,
        kv_texts=len(model.ratios),
    )


def as_result(scores: Sequence[Score], methods: Sequence[Method], arguments: argparse.Namespace) -> report.Result:
    """A table of the scores and one of r.KV, a row a method."""
    machine = describe(torch.device(arguments.device))
    tables = [
        table("Scores (percent, and perplexities), with standard errors.", scores, methods, cell, metrics_of),
        table(
            "r.KV: keys that the last token of a text reads, over its tokens; of SepCache, tokens stored over tokens seen. Mean over texts.",
            scores,
            methods,
            lambda score: f"{score.kv_ratio:.1%}",
            lambda score: (),
        ),
    ]
    return report.Result(
        header={
            **machine.as_dict(),
            "command": arguments.command,
            "model": Path(arguments.model).name,
            "tasks": "; ".join(map(str, arguments.tasks)),
            "dtype": arguments.dtype,
            "max_length": arguments.max_length,
            "versions": package_versions(),
        },
        body={"rows": [asdict(score) for score in scores], "methods": [asdict(method) for method in methods]},
        tables=tables,
        notes=[f"SepCache is scored on {' and '.join(FROM_A_CACHE)} only; it drops nothing from texts that fit into its cache."]
        if "sepcache" in arguments.methods
        else [],
        title=f"{Path(arguments.model).name} without training: {machine.title()}",
        picture=None,
    )


def table(
    title: str,
    scores: Sequence[Score],
    methods: Sequence[Method],
    show: Callable[[Score], str],
    measures: Callable[[Score], Sequence[str]],
) -> report.Table:
    """A row a method, a column a task, whose heading tells the measures."""
    of = {(score.method, score.task.name): score for score in scores}
    tasks = {score.task.name: score for score in scores}
    heads = [" ".join((name.removeprefix("local_"), ", ".join(measures(score)))).strip() for name, score in tasks.items()]
    rows = [(method.name, *(show(of[key]) if (key := (method.name, name)) in of else "" for name in tasks)) for method in methods]
    return report.Table(title=title, columns=("method", *heads), rows=rows)


def cell(score: Score) -> str:
    """``12.3 +- 0.4 / 56.7``: the metrics of a table."""
    return " / ".join(_number(name, score) for name in metrics_of(score))


def metrics_of(score: Score) -> Sequence[str]:
    return SHOWN.get(score.task.name) or sorted(score.metrics)


def _number(name: str, score: Score) -> str:
    value, error, factor = score.metrics[name], score.errors.get(name), 1 if "perplexity" in name or "bits" in name else 100
    return f"{factor * value:.1f}" + ("" if error is None else f" ± {factor * error:.1f}")


if __name__ == "__main__":
    sys.exit(main())

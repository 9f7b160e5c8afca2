"""Runs lm-eval's tasks on our model and keeps what came out: a table, a results file, dashboard metrics. Behind eval.py."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table
from pydantic import JsonValue

from megatron.config.schema import Config, EvaluationConfig
from megatron.data.tokenizer import build_tokenizer
from megatron.inference.lm_eval import GPTLanguageModel
from megatron.inference.loading import load_model
from megatron.parallel.mesh import Mesh
from megatron.training.metrics import MetricLogger
from sepllm.lm_eval.versions import package_versions

Results = dict[str, JsonValue]
"""lm-eval's own: `results` (task -> metric,filter -> value), `n-shot`, `n-samples`, `versions`, `configs`, ..."""

DEFAULT_TASKS = ("lambada", "piqa", "hellaswag", "winogrande", "mathqa", "pubmedqa", "triviaqa")
"""Where `eval_tasks` is not set: GPT-NeoX's. Their data come from the hub."""


NOTHING_LATER = 2**40
"""Where a logger starts that only adds: beyond every iteration, so that it drops none."""


def evaluate(config: Config) -> Results:
    """Results of the checkpoint that `load` names: printed, written to a file, and passed to the run's dashboards."""
    names = find_tasks(config.evaluation)
    tokenizer = build_tokenizer(config.tokenizer)
    mesh = Mesh.start(config)
    if not mesh.is_first:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # all processes say the same
    loaded = load_model(config, mesh.device)
    batch_size = config.evaluation.eval_batch_size or config.batch.train_micro_batch_size_per_gpu
    model = GPTLanguageModel(loaded.model, tokenizer, config.attention, batch_size=batch_size, mesh=mesh, seed=config.training.seed)
    results = run_tasks(model, names, config.evaluation)
    if mesh.is_first:
        path = write_results(results, config=config, model=model, checkpoint=loaded.folder, when=datetime.now())
        logger = MetricLogger.open(config, is_first=True, iteration=NOTHING_LATER)
        logger.write(loaded.iteration, dashboard_metrics(results))
        logger.close()
        print(f"{loaded.folder}, {config.precision.precision}, limit {config.evaluation.eval_limit}\n{table(results)}\n{path}", flush=True)
    return results


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    names: tuple[str, ...]
    manager: TaskManager
    """Can load them."""


def run_tasks(model: GPTLanguageModel, tasks: Tasks, evaluation: EvaluationConfig, *, bootstrap_iters: int = 100_000) -> Results:
    """Results of the tasks over all their documents, unless `eval_limit` is set.

    ``bootstrap_iters`` is lm-eval's: resamplings for the errors of metrics that have no formula for theirs; 0 leaves them out.
    """
    results = simple_evaluate(
        model=model,
        tasks=list(tasks.names),
        num_fewshot=evaluation.eval_num_fewshot,
        limit=evaluation.eval_limit,
        task_manager=tasks.manager,
        log_samples=False,
        bootstrap_iters=bootstrap_iters if model.mesh.is_first else 0,
    )
    return results or {}


def find_tasks(evaluation: EvaluationConfig) -> Tasks:
    """The tasks that the names and wildcards of `eval_tasks` stand for; ValueError for those that stand for none.

    lm-eval's own tasks, which take ten seconds to index, are looked at only if the folder `eval_task_path` does not have all.
    """
    patterns, folder = evaluation.eval_tasks or DEFAULT_TASKS, evaluation.eval_task_path
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"eval_task_path {folder} is not a folder: give one with task files (configs/eval holds some).")
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not all(manager.match_tasks([pattern]) for pattern in patterns):
        manager = TaskManager(include_path=folder)
    unknown = [pattern for pattern in patterns if not manager.match_tasks([pattern])]
    if unknown:
        raise ValueError("\n".join(_unknown_task(name, manager.all_tasks, folder) for name in unknown))
    return Tasks(names=tuple(dict.fromkeys(name for pattern in patterns for name in manager.match_tasks([pattern]))), manager=manager)


def table(results: Results) -> str:
    """The results as lm-eval prints them."""
    groups = [make_table(results, "groups")] if results.get("groups") else []
    return "\n".join([make_table(results), *groups])


def write_results(results: Results, *, config: Config, model: GPTLanguageModel, checkpoint: Path, when: datetime) -> Path:
    """The path of a new file that holds lm-eval's results and, under ``run``, what they depend on."""
    path = results_path(config.evaluation.eval_results_prefix, when)
    run = {
        "checkpoint": str(checkpoint),
        "dtype": str(next(model.model.parameters()).dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "max_length": model.max_length,
        "batch_size": model.batch_size,
        "processes": model.mesh.world_size,
        "device": str(model.mesh.device),
        "limit": config.evaluation.eval_limit,
        "num_fewshot": config.evaluation.eval_num_fewshot,
        "versions": package_versions(),
        "config_files": [file.name for file in config.files],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**results, "run": run}, indent=2, default=handle_non_serializable, ensure_ascii=False), encoding="utf-8")
    return path


def results_path(prefix: str, when: datetime) -> Path:
    """``[prefix_]eval_results_MM-DD-YYYY-HH-MM-SS.json``."""
    name = f"eval_results_{when:%m-%d-%Y-%H-%M-%S}.json"
    return Path(f"{prefix}_{name}" if prefix else name)


def dashboard_metrics(results: Results) -> dict[str, float]:
    """``eval/{task}_{metric}`` of every number, without their errors. A filter other than lm-eval's `none` follows the metric."""
    metrics = {}
    for task, values in _table_of(results).items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if isinstance(value, (int, float)) and filter_name and not metric.endswith("_stderr"):
                metrics[f"eval/{task}_{metric}" + ("" if filter_name == "none" else f"_{filter_name}")] = float(value)
    return metrics


def _table_of(results: Results) -> Mapping[str, Mapping[str, JsonValue]]:
    found = results["results"]
    assert isinstance(found, dict)
    return {task: values for task, values in found.items() if isinstance(values, dict)}


def _unknown_task(name: str, known: Sequence[str], task_path: str | None) -> str:
    near = difflib.get_close_matches(name, known, 3)
    where = f"lm-eval {version('lm_eval')}" + (f" and {task_path}" if task_path else " (eval_task_path can name a folder with more)")
    return f"eval_tasks: {name} is not a task of {where}." + (f" Did you mean {', '.join(near)}?" if near else "")

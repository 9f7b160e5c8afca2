"""A checkpoint scored by `evaluate`, and the folder converted from it scored by lm-eval itself."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import sepllm.hf  # noqa: F401  registers the architecture
from megatron.config.schema import Config, EvaluationConfig
from megatron.inference.loading import load_model
from megatron.inference.tasks import dashboard_metrics, evaluate, find_tasks, results_path
from megatron.model.gpt import build_model
from sepllm.pattern import AttentionPattern
from tools.ckpts.convert_neox_to_hf import convert
from tools.datasets.eval_tasks import make_eval_files

ROOT = Path(__file__).parents[3]
WORDS = "the a of to and in that it was his her with as had for not but at on all out one man sea ship old night day time hand head white great"
GENERATION = """
task: demo_goes_on
custom_dataset: !function local_data.load
dataset_kwargs: {file: next_sentence.jsonl, split: test}
output_type: generate_until
test_split: test
doc_to_text: context
doc_to_target: "{{choices[label]}}"
process_results: !function fingerprint.of_text
generation_kwargs: {until: [". ", "sea"], max_gen_toks: 12}
metric_list:
  - {metric: characters, aggregation: mean, higher_is_better: true}
  - {metric: checksum, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
FINGERPRINT = """
import zlib

def of_text(doc, results):
    return {"characters": len(results[0]), "checksum": zlib.crc32(results[0].encode()) % 1000}
"""


def story(seed: int, sentences: int) -> str:
    chance = random.Random(seed)
    made = [" ".join(chance.choices(WORDS.split(), k=chance.randint(6, 12))).capitalize() + chance.choice(".?!") for _ in range(sentences)]
    return " ".join(made)


@dataclass(frozen=True, kw_only=True)
class Run:
    config: Config
    task_path: Path
    folder: Path


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and the evaluation files, of text that no page holds."""
    folder = tmp_path_factory.mktemp("texts")
    documents = [story(seed, 12) for seed in range(4)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    make_eval_files(documents, folder, 0, num_questions=12)
    return folder


@pytest.fixture(scope="module")
def make_run(make_config: Callable[..., Config], text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """``make_run(prefill=..., decode=...)``: a checkpoint of a random model, and a folder of tasks."""

    def make(groups: Mapping[str, Mapping[str, object]] = {}, **changes: object) -> Run:
        folder = tmp_path_factory.mktemp("run")
        tokenizer = Tokenizer.from_file(str(text_folder / "tokenizer.json"))
        rows = tokenizer.get_vocab_size()
        config = make_config(
            vocab_size=rows,
            padded_vocab_size=rows + 8,
            groups={
                "tokenizer": {"tokenizer_type": "HFTokenizer", "vocab_file": str(text_folder / "tokenizer.json")},
                "checkpoint": {"load": str(folder / "checkpoints")},
                "evaluation": {"eval_tasks": ("demo_*",), "eval_task_path": str(folder / "tasks"), "eval_results_prefix": str(folder / "here")},
                **groups,
            },
            **{name: change(tokenizer) if callable(change) else change for name, change in changes.items()},
        )
        save(config, folder / "checkpoints" / "global_step7")
        (folder / "tasks").mkdir()
        for file in (ROOT / "configs" / "eval").iterdir():
            if file.is_file():
                (folder / "tasks" / file.name).write_text(file.read_text())
        (folder / "tasks" / "demo_goes_on.yaml").write_text(GENERATION)
        (folder / "tasks" / "fingerprint.py").write_text(FINGERPRINT)
        return Run(config=config, task_path=folder / "tasks", folder=folder)

    return make


def save(config: Config, folder: Path) -> None:
    folder.mkdir(parents=True)
    model = build_model(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    torch.save({"module": model.state_dict()}, folder / "mp_rank_00_model_states.pt")


def sparse(windows: tuple[int, int]) -> Callable[[Tokenizer], AttentionPattern]:
    return lambda tokenizer: AttentionPattern(
        initial_tokens=3, separator_ids={tokenizer.token_to_id(mark) for mark in (".", "?", "!")}, windows=windows
    )


def numbers(results: Mapping[str, object]) -> dict[str, float]:
    """Every number of every task, errors of the mean included."""
    table = results["results"]
    assert isinstance(table, dict)
    return {f"{task} {key}": value for task, row in table.items() for key, value in row.items() if isinstance(value, (int, float))}


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, text_folder: Path) -> None:
    monkeypatch.setenv("SEPLLM_EVAL_DATA", str(text_folder))


@pytest.mark.usefixtures("local")
def test_a_checkpoint_gets_the_scores_that_lm_eval_gives_the_folder_converted_from_it(
    make_run: Callable[..., Run], text_folder: Path, alone: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line of lm-eval, on a folder whose model code travels with it, without this package."""
    run = make_run(prefill=sparse((5, 9)), decode=sparse((3, 6)))
    monkeypatch.setattr("megatron.inference.tasks.Mesh.start", lambda config: alone)
    ours = numbers(evaluate(run.config))
    convert(run.config, input_dir=run.folder / "checkpoints" / "global_step7", output_dir=run.folder / "hf")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "2", "--include_path", str(run.task_path)]
    command += ["--model_args", f"pretrained={run.folder / 'hf'},trust_remote_code=True", "--output_path", str(run.folder / "theirs")]
    command += ["--tasks", "demo_perplexity,demo_next_sentence,demo_goes_on"]
    environment = os.environ | {
        "HF_HOME": str(run.folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "SEPLLM_EVAL_DATA": str(text_folder),
        "PYTHONPATH": "",
    }
    done = subprocess.run(command, env=environment, cwd=run.folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (run.folder / "theirs").rglob("results_*.json")
    theirs = numbers(json.loads(file.read_text()))
    assert ours.keys() == theirs.keys()
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.usefixtures("local")
def test_scores_do_not_depend_on_the_batch_size(make_run: Callable[..., Run], alone: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.inference.tasks.Mesh.start", lambda config: alone)
    run = make_run(prefill=sparse((5, 9)))
    scores = []
    for size in (1, 7):
        wanted = run.config.evaluation.model_copy(update={"eval_batch_size": size})
        scores.append(numbers(evaluate(run.config.model_copy(update={"evaluation": wanted}))))
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


@pytest.mark.usefixtures("local")
@pytest.mark.parametrize("pattern", ["full", "streaming"])
def test_shots_and_limit_are_those_that_lm_eval_would_use(
    make_run: Callable[..., Run], alone: object, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.setattr("megatron.inference.tasks.Mesh.start", lambda config: alone)
    reads = {"full": AttentionPattern.full(2), "streaming": AttentionPattern(initial_tokens=2, windows=(6, 6))}[pattern]
    wanted = {"eval_tasks": ("demo_next_sentence", "demo_perplexity"), "eval_num_fewshot": 2, "eval_limit": 5.0}
    run = make_run(prefill=reads, groups={"attention": {"mode": pattern}})
    evaluation = run.config.evaluation.model_copy(update=wanted)
    ours = evaluate(run.config.model_copy(update={"evaluation": evaluation}))
    convert(run.config, input_dir=run.folder / "checkpoints" / "global_step7", output_dir=run.folder / "hf", verify=False)
    tasks = find_tasks(evaluation)
    theirs = simple_evaluate(
        model=HFLM(pretrained=str(run.folder / "hf"), device="cpu", batch_size=4),
        tasks=list(tasks.names),
        task_manager=tasks.manager,
        num_fewshot=2,
        limit=5,
    )
    assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-4)
    assert ours["n-shot"] == theirs["n-shot"] == {"demo_next_sentence": 2, "demo_perplexity": 2}
    assert ours["n-samples"] == theirs["n-samples"]


@pytest.mark.usefixtures("local")
def test_without_a_limit_every_document_is_scored(make_run: Callable[..., Run], alone: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.inference.tasks.Mesh.start", lambda config: alone)
    run = make_run(prefill=sparse((4, 4)))
    metrics_file = run.folder / "metrics.jsonl"
    metrics_file.write_text('{"iteration": 3, "train/lm_loss": 2.0}\n{"iteration": 9, "train/lm_loss": 1.0}\n')
    logging = run.config.logging.model_copy(update={"metrics_file": str(metrics_file)})
    evaluation = run.config.evaluation.model_copy(update={"eval_tasks": ("demo_next_sentence", "demo_perplexity")})
    results = evaluate(run.config.model_copy(update={"evaluation": evaluation, "logging": logging}))
    assert results["n-samples"] == {
        "demo_next_sentence": {"original": 12, "effective": 12},
        "demo_perplexity": {"original": 4, "effective": 4},
    }
    (file,) = run.folder.glob("here_eval_results_*.json")
    saved = json.loads(file.read_text())
    assert saved["results"] == results["results"]
    assert saved["run"]["dtype"] == "float32"
    assert saved["run"]["limit"] is None
    assert saved["run"]["checkpoint"].endswith("global_step7")
    assert saved["run"]["versions"].keys() == {"sepllm", "lm_eval", "torch", "datasets", "transformers"}
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [3, 9, 7], "what training wrote stays"
    assert lines[2].keys() >= {"eval/demo_next_sentence_acc", "eval/demo_next_sentence_acc_norm", "eval/demo_perplexity_word_perplexity"}


def test_the_results_file_is_named_by_prefix_and_time() -> None:
    when = datetime(2026, 3, 4, 5, 6, 7)
    assert results_path("", when) == Path("eval_results_03-04-2026-05-06-07.json")
    assert results_path("runs/small", when) == Path("runs/small_eval_results_03-04-2026-05-06-07.json")


def test_dashboard_names_are_task_and_metric() -> None:
    row = {"alias": "sums", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A"}
    assert dashboard_metrics({"results": {"sums": row}}) == {"eval/sums_acc": 0.5, "eval/sums_exact_match_strict": 0.25}


def test_wildcards_name_tasks_and_lm_evals_own_are_found_too() -> None:
    assert find_tasks(EvaluationConfig(eval_tasks=("local_arc*", "demo_perplexity"), eval_task_path=str(ROOT / "configs/eval"))).names == (
        "local_arc_challenge",
        "local_arc_easy",
        "demo_perplexity",
    )


def test_unknown_tasks_are_named_with_the_nearest_known_and_defaults_are_known() -> None:
    with pytest.raises(ValueError, match=r"(?s)hellaswog is not a task of lm-eval.*Did you mean hellaswag.*demo_nothing is not a task"):
        find_tasks(EvaluationConfig(eval_tasks=("hellaswog", "piqa", "demo_nothing")))


def test_a_task_path_that_is_no_folder_is_named() -> None:
    with pytest.raises(ValueError, match="eval_task_path nowhere is not a folder"):
        find_tasks(EvaluationConfig(eval_tasks=("piqa",), eval_task_path="nowhere"))


class TestLoading:
    def test_a_missing_load_is_named(self, make_config: Callable[..., Config]) -> None:
        with pytest.raises(ValueError, match="load is not set"):
            load_model(make_config(), torch.device("cpu"))

    @pytest.mark.parametrize("fresh", [False, True])
    def test_a_folder_without_checkpoint_is_named_even_if_training_may_start_fresh(
        self, make_config: Callable[..., Config], tmp_path: Path, fresh: bool
    ) -> None:
        config = make_config(groups={"checkpoint": {"load": str(tmp_path), "allow_fresh_start": fresh}})
        with pytest.raises(ValueError, match="holds no finished checkpoint"):
            load_model(config, torch.device("cpu"))

    def test_a_checkpoint_of_another_shape_is_named(self, make_config: Callable[..., Config], tmp_path: Path) -> None:
        save(make_config(), tmp_path / "global_step1")
        wider = make_config(intermediate_size=80, no_weight_tying=False, groups={"checkpoint": {"load": str(tmp_path)}})
        with pytest.raises(ValueError, match=r"another shape: it also has sequential\.6\.final_linear\.weight; sequential.*\(64, 32\).*\(80, 32\)"):
            load_model(wider, torch.device("cpu"))

    def test_the_model_computes_in_the_runs_precision(self, make_config: Callable[..., Config], tmp_path: Path) -> None:
        save(make_config(), tmp_path / "global_step1")
        config = make_config(groups={"checkpoint": {"load": str(tmp_path)}, "precision": {"precision": "bfloat16"}})
        loaded = load_model(config, torch.device("cpu"))
        assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
        assert loaded.iteration == 1

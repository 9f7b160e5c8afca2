"""Every task file under configs/eval builds its requests from rows with the public field names, without a network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

FOLDER = Path(__file__).parents[2] / "configs" / "eval"
CHOICE = {"choices": {"text": ["red", "blue"], "label": ["A", "B"]}, "answerKey": "B"}
WINO = {"sentence": "The cup fit the box because the _ was small.", "option1": "cup", "option2": "box", "answer": "1"}
BLIMP = {"sentence_good": "She saw herself.", "sentence_bad": "She saw himself.", "UID": "anaphor_gender_agreement"}
ROWS: dict[str, tuple[str, dict[str, object]]] = {
    "demo_perplexity": ("perplexity.jsonl", {"text": "All of it."}),
    "demo_next_sentence": ("next_sentence.jsonl", {"context": "It began.", "choices": ["\nIt ended.", "\nNo."], "label": 1}),
    "local_arc_easy": ("arc_easy.test.jsonl", {"question": "Which?", **CHOICE}),
    "local_arc_challenge": ("arc_challenge.test.jsonl", {"question": "Which?", **CHOICE}),
    "local_piqa": ("piqa.validation.jsonl", {"goal": "Open it", "sol1": "Push.", "sol2": "Pull.", "label": 1}),
    "local_winogrande": ("winogrande_xl.validation.jsonl", WINO),
    "local_lambada": ("lambada_openai.test.jsonl", {"text": "They went home to their house"}),
    "local_wikitext": ("wikitext2_raw.test.jsonl", {"page": " = A page = \n"}),
    "local_wsc273": ("wsc273.test.jsonl", WINO),
    "local_gsm8k": ("gsm8k.test.jsonl", {"question": "How many?", "answer": "1,000+1=1,001\n#### 1,001"}),
    "local_blimp": ("blimp.test.jsonl", BLIMP),
    "local_blimp_anaphor_gender": ("blimp.test.jsonl", BLIMP),
}
REQUESTS: dict[str, list[tuple[object, ...]]] = {
    "demo_perplexity": [("All of it.",)],
    "demo_next_sentence": [("It began.", "\nIt ended."), ("It began.", "\nNo.")],
    "local_arc_easy": [("Question: Which?\nAnswer:", " red"), ("Question: Which?\nAnswer:", " blue")],
    "local_arc_challenge": [("Question: Which?\nAnswer:", " red"), ("Question: Which?\nAnswer:", " blue")],
    "local_piqa": [("Question: Open it\nAnswer:", " Push."), ("Question: Open it\nAnswer:", " Pull.")],
    "local_winogrande": [("The cup fit the box because the cup", " was small."), ("The cup fit the box because the box", " was small.")],
    "local_lambada": [("They went home to their", " house")],
    "local_wikitext": [(" = A page = \n",)],
    "local_wsc273": [("The cup fit the box because the cup", " was small."), ("The cup fit the box because the box", " was small.")],
    "local_gsm8k": [("Question: How many?\nAnswer:", {"until": ["Question:"], "do_sample": False, "max_gen_toks": 256})],
    "local_blimp": [("", " She saw herself."), ("", " She saw himself.")],
    "local_blimp_anaphor_gender": [("", " She saw herself."), ("", " She saw himself.")],
}
LABELS = {
    "demo_next_sentence": 1,
    "local_arc_easy": 1,
    "local_piqa": 1,
    "local_winogrande": 0,
    "local_wsc273": 0,
    "local_blimp": 0,
    "local_blimp_anaphor_gender": 0,
}
ASKED = {
    "demo_next_sentence": "context",
    "local_arc_easy": "question",
    "local_arc_challenge": "question",
    "local_piqa": "goal",
    "local_winogrande": "sentence",
    "local_wsc273": "sentence",
    "local_lambada": "text",
    "local_gsm8k": "question",
}
"""The field that tells one question from another."""
SHOTS = {
    "demo_next_sentence": "It began.\nNo.",
    "local_arc_easy": "Question: Which?\nAnswer: blue",
    "local_arc_challenge": "Question: Which?\nAnswer: blue",
    "local_piqa": "Question: Open it\nAnswer: Pull.",
    "local_winogrande": "The cup fit the box because the cup was small.",
    "local_wsc273": "The cup fit the box because the cup was small.",
    "local_lambada": "They went home to their house",
    "local_gsm8k": "Question: How many?\nAnswer: 1,000+1=1,001\n#### 1,001",
}
"""A question with its right answer."""


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=str(FOLDER), include_defaults=False)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for file, row in ROWS.values():
        (tmp_path / file).write_text(json.dumps(row) + "\n" + json.dumps(row | {"UID": "another"}) + "\n")
    monkeypatch.setenv("SEPLLM_EVAL_DATA", str(tmp_path))
    return tmp_path


def test_every_task_file_is_here(manager: TaskManager) -> None:
    assert set(manager.all_tasks) == set(ROWS)


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_these_requests(manager: TaskManager, name: str) -> None:
    task = manager.load([name])["tasks"][name]
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=1, rank=0, world_size=1)
    assert [instance.args for instance in task.instances] == REQUESTS[name]
    if name in LABELS:
        (document,) = [document for _, document in task.doc_iterator(rank=0, limit=1, world_size=1)]
        scores = [(-float(place != LABELS[name]), place == LABELS[name]) for place in range(len(REQUESTS[name]))]
        assert task.process_results(document, scores)["acc"] == 1.0


@pytest.mark.usefixtures("data")
def test_rows_are_chosen_by_their_fields(manager: TaskManager) -> None:
    assert len(manager.load(["local_blimp_anaphor_gender"])["tasks"]["local_blimp_anaphor_gender"].eval_docs) == 1


def test_a_folder_may_be_given_as_metadata(data: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEPLLM_EVAL_DATA")
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata={"folder": str(data)})  # type: ignore[dict-item]
    assert len(manager.load(["demo_perplexity"])["tasks"]["demo_perplexity"].eval_docs) == 2


def test_a_folder_that_is_not_named_or_lacks_the_file_is_an_error(manager: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEPLLM_EVAL_DATA", raising=False)
    with pytest.raises(ValueError, match="set SEPLLM_EVAL_DATA"):
        manager.load(["demo_perplexity"])
    monkeypatch.setenv("SEPLLM_EVAL_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"perplexity\.jsonl does not exist"):
        manager.load(["demo_perplexity"])


@pytest.mark.parametrize("name", ASKED)
def test_shots_are_other_questions_with_their_right_answers(manager: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    file, row = ROWS[name]
    rows = [row | {ASKED[name]: f"Number {place}: {row[ASKED[name]]}"} for place in range(4)]
    (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("SEPLLM_EVAL_DATA", str(tmp_path))
    task = manager.load([name])["tasks"][name]
    task.set_config(key="num_fewshot", value=3)
    task.set_fewshot_seed(seed=0)
    task.build_all_requests(rank=0, world_size=1)
    for instance in task.instances:
        assert sorted(re.findall(r"Number (\d):", instance.args[0])) == ["0", "1", "2", "3"]
        assert re.sub(r"Number \d: ", "", instance.args[0]).startswith(f"{SHOTS[name]}\n\n" * 3)


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" 1,001 it is.\n#### 1001", 1, 1),
        (" So 7.\n#### $1,001.", 1, 1),
        ("#### 7, not 1001", 0, 1),
        (" That makes 1001.", 0, 1),
        ("#### 1001, or 1002", 1, 0),
        (" None.", 0, 0),
    ],
)
def test_answers_to_gsm8k_are_numbers(manager: TaskManager, text: str, strict: int, flexible: int) -> None:
    task = manager.load(["local_gsm8k"])["tasks"]["local_gsm8k"]
    assert task.process_results(ROWS["local_gsm8k"][1], [text]) == {"strict": strict, "flexible": flexible}


def test_a_limit_takes_equally_many_rows_of_each_paradigm(manager: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [BLIMP | {"UID": paradigm, "sentence_good": f"{paradigm} {place}"} for paradigm in "abc" for place in range(3)]
    (tmp_path / "blimp.test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("SEPLLM_EVAL_DATA", str(tmp_path))
    documents = manager.load(["local_blimp"])["tasks"]["local_blimp"].eval_docs
    assert list(documents["sentence_good"]) == ["a 0", "b 0", "c 0", "a 1", "b 1", "c 1", "a 2", "b 2", "c 2"]

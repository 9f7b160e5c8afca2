from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tools.datasets.eval_tasks import EvalFiles, make_eval_files, sentences

WORDS = ["light", "dark", "river", "stone", "bird", "cloud", "field", "horse", "winter", "summer"]


def document(seed: int, count: int = 30) -> str:
    chance = random.Random(seed)
    made = [" ".join(chance.choices(WORDS, k=chance.randint(6, 14))).capitalize() + "." for _ in range(count)]
    return "".join(sentence + chance.choice([" ", "\n", "\n\n"]) for sentence in made)


DOCUMENTS = [document(seed) for seed in range(5)]


def made(folder: Path, *, seed: int = 0, documents: list[str] = DOCUMENTS, **changes: int) -> EvalFiles:
    return make_eval_files(documents, folder, seed, **changes)


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_same_documents_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    first, again, other = (made(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first.next_sentence.read_bytes() == again.next_sentence.read_bytes() != other.next_sentence.read_bytes()
    assert first.perplexity.read_bytes() == again.perplexity.read_bytes()


def test_perplexity_rows_are_the_documents_as_they_are(tmp_path: Path) -> None:
    files = made(tmp_path, documents=[*DOCUMENTS, " \n"])
    assert [row["text"] for row in rows(files.perplexity)] == DOCUMENTS


def test_the_right_choice_is_what_the_document_goes_on_with(tmp_path: Path) -> None:
    files = made(tmp_path)
    questions = rows(files.next_sentence)
    assert len(questions) == files.num_questions > 100
    for question in questions:
        choices = question["choices"]
        assert isinstance(choices, list)
        assert len(set(choices)) == 4
        assert sum(any(str(question["context"]) + choice in text for text in DOCUMENTS) for choice in choices) == 1
        assert any(str(question["context"]) + choices[question["label"]] in text for text in DOCUMENTS)  # type: ignore[index]


def test_wrong_choices_are_sentences_of_the_text_and_about_as_long(tmp_path: Path) -> None:
    everything = {sentence.text for number, text in enumerate(DOCUMENTS) for sentence in sentences(number, text)}
    for question in rows(made(tmp_path).next_sentence):
        choices = [str(choice) for choice in question["choices"]]  # type: ignore[attr-defined]
        lengths = [len(choice.split()) for choice in choices]
        assert {choice.lstrip() for choice in choices} <= everything
        assert max(lengths) - min(lengths) <= 6


def test_labels_do_not_favour_a_place(tmp_path: Path) -> None:
    labels = [row["label"] for row in rows(made(tmp_path).next_sentence)]
    assert all(labels.count(place) > len(labels) / 8 for place in range(4))


def test_no_more_questions_than_asked_for(tmp_path: Path) -> None:
    assert made(tmp_path, num_questions=7).num_questions == len(rows(tmp_path / "next_sentence.jsonl")) == 7


def test_sentences_stay_within_a_paragraph_and_start_with_a_capital() -> None:
    text = "one two three four five six seven. A B c d e f g.\n\nTitle without an end\n\nThe next one has no less than eight words."
    assert [sentence.text for sentence in sentences(0, text)] == ["A B c d e f g.", "The next one has no less than eight words."]


@pytest.mark.parametrize("documents", [[], ["Too short."], [document(0, 1)]])
def test_text_that_gives_no_question_is_an_error(tmp_path: Path, documents: list[str]) -> None:
    with pytest.raises(ValueError, match="Give more text"):
        made(tmp_path, documents=documents)

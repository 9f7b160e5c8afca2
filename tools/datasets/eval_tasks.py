"""Evaluation files for `configs/eval/demo_*.yaml`, made from held-out documents: nothing to download, the same on every machine.

usage: python tools/datasets/eval_tasks.py --input held_out.jsonl --output-dir DIR [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CHOICES = 4
SENTENCE_WORDS = range(6, 41)
CONTEXT_WORDS = 80
_SENTENCE = re.compile(r"(?<!\S)[A-Z\"'“‘](?:(?!\n\s*\n).)*?[.!?](?=\s|$)", re.DOTALL)
"""From a capital or a quotation mark to the next full stop, within one paragraph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalFiles:
    perplexity: Path
    """One ``{"text"}`` a line: the documents."""
    next_sentence: Path
    """One ``{"context", "choices", "label"}`` a line: which of four sentences goes on."""
    num_questions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    document: int
    start: int
    """Character at which it starts in its document."""
    text: str
    num_words: int


def make_eval_files(documents: Iterable[str], out_dir: Path, seed: int, *, num_questions: int = 200) -> EvalFiles:
    """Write ``perplexity.jsonl`` and ``next_sentence.jsonl``. The same documents and seed give the same bytes.

    At most ``num_questions`` questions; fewer where the text holds fewer. ValueError where it holds none.
    """
    texts = [text for text in documents if text.strip()]
    questions = list(_questions(texts, random.Random(seed), num_questions))
    if not questions:
        raise ValueError(
            f"The {len(texts)} held-out documents give no question: that takes {CHOICES + 1} sentences of {SENTENCE_WORDS[0]} to "
            f"{SENTENCE_WORDS[-1]} words, one of them inside a document. Give more text."
        )
    files = EvalFiles(perplexity=out_dir / "perplexity.jsonl", next_sentence=out_dir / "next_sentence.jsonl", num_questions=len(questions))
    out_dir.mkdir(parents=True, exist_ok=True)
    _write_lines(files.perplexity, ({"text": text} for text in texts))
    _write_lines(files.next_sentence, questions)
    return files


def sentences(document: int, text: str) -> list[Sentence]:
    """The sentences of a document that are neither very short nor very long."""
    found = (
        Sentence(document=document, start=match.start(), text=match.group(), num_words=len(match.group().split()))
        for match in _SENTENCE.finditer(text)
    )
    return [sentence for sentence in found if sentence.num_words in SENTENCE_WORDS]


def _questions(texts: Sequence[str], chance: random.Random, count: int) -> Iterator[dict[str, object]]:
    """Up to ``count`` questions, each about another sentence."""
    pool = [sentence for number, text in enumerate(texts) for sentence in sentences(number, text)]
    asked = [sentence for sentence in pool if texts[sentence.document][: sentence.start].strip()]
    chance.shuffle(asked)
    for answer in asked[:count]:
        others = _distractors(pool, answer, chance)
        if len(others) == CHOICES - 1:
            yield _question(texts[answer.document], answer, others, chance)


def _distractors(pool: Sequence[Sentence], answer: Sentence, chance: random.Random) -> list[Sentence]:
    """Sentences from elsewhere, the closest in length of a few dozen drawn, so that length does not give the answer away."""
    drawn = chance.sample(pool, min(len(pool), 16 * CHOICES))
    elsewhere = {sentence.text: sentence for sentence in drawn if abs(sentence.start - answer.start) > 2000 or sentence.document != answer.document}
    elsewhere.pop(answer.text, None)
    return sorted(elsewhere.values(), key=lambda sentence: abs(sentence.num_words - answer.num_words))[: CHOICES - 1]


def _question(text: str, answer: Sentence, others: Sequence[Sentence], chance: random.Random) -> dict[str, object]:
    """The words before the answer, and the choices, each after the blank that stands before the answer."""
    before = text[: answer.start]
    context = before.rstrip()
    blank = before[len(context) :]
    words = list(re.finditer(r"\S+", context))
    order = [answer, *others]
    chance.shuffle(order)
    return {
        "context": context[words[-CONTEXT_WORDS:][0].start() :],
        "choices": [blank + choice.text for choice in order],
        "label": order.index(answer),
    }


def _write_lines(path: Path, rows: Iterable[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--input", type=Path, required=True, help='jsonl of held-out documents, {"text": ...} a line')
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-questions", type=int, default=200)
    arguments = parser.parse_args()
    with arguments.input.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines if line.strip()]
    files = make_eval_files(texts, arguments.output_dir, arguments.seed, num_questions=arguments.num_questions)
    print(f"{files.perplexity}: {len(texts)} documents; {files.next_sentence}: {files.num_questions} questions")


if __name__ == "__main__":
    main()

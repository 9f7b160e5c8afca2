"""GSM8K's answers (arXiv 2110.14168): strict wants the number after "####", flexible takes the last number that was written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypedDict

NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"


class Row(TypedDict):
    question: str
    answer: str


def score(row: Row, texts: Sequence[str]) -> dict[str, float]:
    """1 where the number is right, else 0."""
    wanted, text = value(row["answer"].rpartition("####")[2]), texts[0]
    marked, numbers = re.search(rf"####\s*({NUMBER})", text), re.findall(NUMBER, text)
    return {
        "strict": float(marked is not None and value(marked[1]) == wanted),
        "flexible": float(bool(numbers) and value(numbers[-1]) == wanted),
    }


def value(number: str) -> float:
    return float(re.sub(r"[,$\s]", "", number))

"""WinoGrande's partial scoring (arXiv 1907.10641): the same ending after the sentence with either option in the blank."""

from __future__ import annotations

from typing import TypedDict


class Row(TypedDict):
    sentence: str
    option1: str
    option2: str
    answer: str


def gold(row: Row) -> int:
    return int(row["answer"]) - 1


def contexts(row: Row) -> list[str]:
    before = row["sentence"].partition("_")[0]
    return [before + row["option1"], before + row["option2"]]


def ending(row: Row) -> str:
    return row["sentence"].partition("_")[2].strip()

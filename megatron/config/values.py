"""Kinds of values a YAML key may hold: each reads what YAML produced, or says in words what it wants.

YAML 1.1 reads ``6e-4`` as text, so text that is a number is taken as one wherever a number is wanted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydantic import JsonValue

_LARGEST = 1e18
"""Of any number in a configuration; whole ones fit into 64 bits."""
_NUMBER_IN_TEXT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a value must be."""

    words: str
    """As in "give ...": `a whole number`."""
    read: Callable[[JsonValue], JsonValue]
    """The value as the typed field wants it. Raises ValueError when it is of another kind."""


def _number(value: JsonValue) -> float:
    if isinstance(value, str) and _NUMBER_IN_TEXT.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise ValueError
    return float(value)


def _whole(value: JsonValue) -> int:
    number = _number(value)
    if isinstance(value, int):
        return value
    if not number.is_integer():
        raise ValueError
    return int(number)


def _flag(value: JsonValue) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _text(value: JsonValue) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _block(value: JsonValue) -> dict[str, JsonValue]:
    if not isinstance(value, dict):
        raise ValueError
    return value


def whole(*, minimum: int | None = None, maximum: int | None = None) -> Kind:
    def read(value: JsonValue) -> int:
        number = _whole(value)
        if (minimum is not None and number < minimum) or (maximum is not None and number > maximum):
            raise ValueError
        return number

    return Kind(words=f"a whole number{_limits(minimum, maximum)}", read=read)


def number(*, minimum: float | None = None, maximum: float | None = None) -> Kind:
    def read(value: JsonValue) -> float:
        result = _number(value)
        if (minimum is not None and result < minimum) or (maximum is not None and result > maximum):
            raise ValueError
        return result

    return Kind(words=f"a number{_limits(minimum, maximum)}", read=read)


def _limits(minimum: float | None, maximum: float | None) -> str:
    limits = [f"at least {minimum}"] if minimum is not None else []
    limits += [f"at most {maximum}"] if maximum is not None else []
    return f" of {' and '.join(limits)}" if limits else ""


def choice(*words: str) -> Kind:
    """One of these words; upper and lower case are the same."""

    def read(value: JsonValue) -> str:
        known = {word.lower(): word for word in words}
        if not isinstance(value, str) or value.lower() not in known:
            raise ValueError
        return known[value.lower()]

    return Kind(words="one of " + ", ".join(words), read=read)


def list_of(kind: Kind, *, words: str) -> Kind:
    def read(value: JsonValue) -> JsonValue:
        if not isinstance(value, list):
            raise ValueError
        return [kind.read(item) for item in value]

    return Kind(words=words, read=read)


def _anything(value: JsonValue) -> JsonValue:
    return value


FLAG = Kind(words="true or false", read=_flag)
TEXT = Kind(words="text (in quotes if it looks like a number)", read=_text)
PREFIX = Kind(words="one prefix as text; lists of them are train_data_paths, valid_data_paths and test_data_paths", read=_text)
WHOLE = whole()
COUNT = whole(minimum=1)
PORT = whole(minimum=1, maximum=65535)
SIZE = whole(minimum=0)
NUMBER = number()
FRACTION = number(minimum=0, maximum=1)
NOT_NEGATIVE = number(minimum=0)
BLOCK = Kind(words="a block in braces, such as {enabled: true}", read=_block)
WHOLES = list_of(WHOLE, words="a list of whole numbers, such as [1, 2]")
SIZES = list_of(SIZE, words="a list of whole numbers of at least 0, such as [0, 1]")
NUMBERS = list_of(NUMBER, words="a list of numbers, such as [0.5, 0.5]")
WEIGHTS = list_of(NOT_NEGATIVE, words="a list of numbers of at least 0, such as [0.5, 0.5]")
TEXTS = list_of(TEXT, words='a list of texts, such as ["a", "b"]')
ANYTHING = Kind(words="a value", read=_anything)


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberInText:
    path: str
    text: str
    number: float | int


def numbers_from_text(value: JsonValue, *, path: str) -> tuple[JsonValue, list[NumberInText]]:
    """The block with every text such as ``"5e8"`` as the number it is meant to be, and where that was done.

    Only numbers with an exponent: those are what YAML 1.1 takes for text.
    """
    found: list[NumberInText] = []
    if isinstance(value, dict):
        result: dict[str, JsonValue] = {}
        for key, member in value.items():
            result[key], inner = numbers_from_text(member, path=f"{path}.{key}")
            found += inner
        return result, found
    if isinstance(value, list):
        pairs = [numbers_from_text(item, path=path) for item in value]
        return [item for item, _ in pairs], [entry for _, inner in pairs for entry in inner]
    if isinstance(value, str) and "e" in value.lower() and _NUMBER_IN_TEXT.fullmatch(value.strip()):
        parsed = float(value)
        exact = int(parsed) if parsed.is_integer() else parsed
        return exact, [NumberInText(path=path, text=value, number=exact)]
    return value, found


def not_finite(value: JsonValue, *, path: str) -> Iterator[tuple[str, float]]:
    """Every infinity and NaN inside a block, with its path: YAML has them (`.inf`, `.nan`, 1.0e+999), JSON has not."""
    if isinstance(value, dict):
        for key, member in value.items():
            yield from not_finite(member, path=f"{path}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from not_finite(item, path=path)
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, value


def words(text: str) -> tuple[str, ...]:
    """The words of a long list of names."""
    return tuple(text.split())

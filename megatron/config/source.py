"""One YAML file as a list of keys with their lines. Knows YAML, not what any key means.

GPT-NeoX files are one flow mapping in braces with comments and trailing commas; block style is as good. YAML 1.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import yaml
from pydantic import JsonValue


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One top-level key as somebody wrote it."""

    key: str
    value: JsonValue
    places: dict[str, str]
    """`file:line` of the key (under "") and of every member of its block, under its dotted path."""

    @property
    def place(self) -> str:
        return self.places[""]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    entries: tuple[Entry, ...]
    mistakes: tuple[str, ...]
    is_yaml: bool = True
    """False: nothing could be read, and `mistakes` says why."""


def _text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return str(node.value)


class _Loader(yaml.SafeLoader):
    """Plain YAML 1.1 without dates: a run named 2026-01-01 is text."""


_Loader.add_constructor("tag:yaml.org,2002:timestamp", _text)


def read_source(name: str, text: str) -> Source:
    """The keys of one file. A file that is no YAML gives the line and the likely cause as its mistake."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return Source(entries=(), mistakes=())
        if not isinstance(root, yaml.MappingNode):
            text_of_mistake = f"{_place(name, root)}: the file must be one mapping of keys to values, as in {{num_layers: 12}}."
            return Source(entries=(), mistakes=(text_of_mistake,), is_yaml=False)
        mistakes = tuple(_repeated_members(name, root))
        return Source(entries=tuple(_entries(name, root, loader)), mistakes=mistakes)
    except yaml.MarkedYAMLError as error:
        return Source(entries=(), mistakes=(_explain(name, text, error),), is_yaml=False)
    except yaml.YAMLError as error:
        return Source(entries=(), mistakes=(f"{name}: not YAML: {error}",), is_yaml=False)
    finally:
        loader.dispose()


def read_scalar(text: str) -> JsonValue:
    """The value that ``text`` has in YAML, for overrides. Raises ValueError when it is no YAML."""
    try:
        value: JsonValue = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is not a YAML value: {' '.join(str(error).split())}") from error
    return value


def _place(name: str, node: yaml.Node) -> str:
    return f"{name}:{node.start_mark.line + 1}"


def _entries(name: str, root: yaml.MappingNode, loader: yaml.SafeLoader) -> Iterator[Entry]:
    for key_node, value_node in root.value:
        places = {"": _place(name, key_node)} | dict(_member_places(name, value_node, path=""))
        yield Entry(key=str(key_node.value), value=loader.construct_object(value_node, deep=True), places=places)


def _member_places(name: str, node: yaml.Node, *, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            inner = f"{path}.{key_node.value}" if path else str(key_node.value)
            yield inner, _place(name, key_node)
            yield from _member_places(name, value_node, path=inner)


def _repeated_members(name: str, root: yaml.MappingNode) -> Iterator[str]:
    """Members given twice inside one block (top-level keys are compared over all files together)."""
    for key_node, value_node in root.value:
        yield from _repeated(name, value_node, path=str(key_node.value))


def _repeated(name: str, node: yaml.Node, *, path: str) -> Iterator[str]:
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, str] = {}
    for key_node, value_node in node.value:
        inner = f"{path}.{key_node.value}"
        if inner in first:
            yield f"{_place(name, key_node)}: {inner} is given twice, first at {first[inner]}: remove one."
        first.setdefault(inner, _place(name, key_node))
        yield from _repeated(name, value_node, path=inner)


def _explain(name: str, text: str, error: yaml.MarkedYAMLError) -> str:
    line = error.problem_mark.line if error.problem_mark is not None else 0
    problem = error.problem or error.context or "unreadable"
    return f"{name}:{line + 1}: not YAML: {problem}. {_likely_cause(text.splitlines(), line, problem)}"


def _likely_cause(lines: list[str], line: int, problem: str) -> str:
    if "\\t" in problem:
        return "YAML takes no tabs here: use spaces."
    if "stream end" in problem:
        return "A closing brace, bracket or quote is probably missing."
    before = next(((i, bare) for i in range(min(line, len(lines)) - 1, -1, -1) if (bare := _without_comment(lines[i]))), None)
    if "expected ',' or" in problem and before is not None and before[1][-1] not in ",{[":
        return f"Line {before[0] + 1} probably lacks a comma at its end: {before[1]}"
    return "Check the quotes, commas and braces of this line and the one before it."


def _without_comment(line: str) -> str:
    return "" if line.lstrip().startswith("#") else line.split(" #")[0].strip()

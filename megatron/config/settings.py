"""All keys of all files and overrides, merged, checked one by one, and read as their kinds. Groups are built from these.

Mistakes are collected, not raised: a key that is missing or wrong makes everything that needs it `Unreadable`, which is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

from pydantic import JsonValue

from megatron.config.keys import ALIASES, KEYS, Honoured, Inert, Refused, canonical, nearest
from megatron.config.schema import Group
from megatron.config.source import Entry
from megatron.config.values import not_finite, numbers_from_text

T = TypeVar("T", int, float, bool, str)
G = TypeVar("G", bound=Group)
R = TypeVar("R")


class Unreadable(Exception):
    """A key that something else depends on is missing or wrong; that is reported already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """One thing that several keys together got wrong."""

    keys: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """One key with the value it finally has."""

    written: str
    value: JsonValue
    places: dict[str, str]


@dataclass(slots=True, kw_only=True)
class Settings:
    """Values by canonical key. Null is the same as absent."""

    given: dict[str, Given] = field(default_factory=dict)
    values: dict[str, JsonValue] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    mistakes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def has(self, key: str) -> bool:
        return key in self.values or key in self.broken

    def raw(self, key: str) -> JsonValue:
        """The value, or None where the key is absent."""
        if key in self.broken:
            raise Unreadable(key)
        return self.values.get(key)

    def get(self, key: str, kind: type[T]) -> T | None:
        value = self.raw(key)
        assert value is None or isinstance(value, kind), f"{key} is kept as {type(value).__name__}"
        return value

    def get_or(self, key: str, default: T) -> T:
        value = self.raw(key)
        return default if value is None else cast("T", value)

    def need(self, key: str, kind: type[T]) -> T:
        """The value of a key that has no default."""
        value = self.get(key, kind)
        if value is None:
            raise Unreadable(key)
        return value

    def wholes(self, key: str) -> tuple[int, ...] | None:
        value = self.raw(key)
        return None if value is None else tuple(cast("list[int]", value))

    def items(self, key: str) -> list[JsonValue] | None:
        value = self.raw(key)
        return None if value is None else cast("list[JsonValue]", value)

    def block(self, key: str) -> dict[str, JsonValue] | None:
        value = self.raw(key)
        return None if value is None else cast("dict[str, JsonValue]", value)

    def place(self, key: str) -> str | None:
        """`file:line` of a key, or of a member of its block for a dotted key."""
        head, _, member = key.partition(".")
        if head not in self.given:
            return None
        places = self.given[head].places
        return places.get(member, places[""])

    def written(self, key: str) -> str:
        """The key in the user's spelling."""
        return self.given[key].written if key in self.given else key

    def report(self, mistake: Mistake) -> None:
        """Adds the mistake, with the places of its keys in front."""
        places = dict.fromkeys(place for key in mistake.keys if (place := self.place(key)) is not None)
        self.mistakes.append(f"{', '.join(places)}: {mistake.text}" if places else mistake.text)

    def fail(self, keys: Sequence[str], text: str) -> Unreadable:
        """Reports the mistake; raise the result."""
        self.report(Mistake(keys=tuple(keys), text=text))
        return Unreadable(keys[0])

    def agreed(self, key: str, member: JsonValue, member_key: str) -> float | None:
        """The value of a key that a block may give too. Both is an error unless they are equal."""
        value, inner = cast("float | None", self.raw(key)), cast("float | None", member)
        if value is not None and inner is not None and value != inner:
            raise self.fail([key, member_key], f"{key} ({value:g}) and {member_key} ({inner:g}) differ: give one of them.")
        return value if inner is None else inner

    def check_members(self, name: str, block: dict[str, JsonValue], known: Sequence[str]) -> None:
        """Reports every member of the block that is not known."""
        for member in block:
            if member not in known:
                close = nearest(member, list(known))
                hint = f"did you mean {name}.{close}?" if close is not None else f"DeepSpeed's {name} block has no such member."
                self.report(Mistake(keys=(f"{name}.{member}",), text=f"unknown member {name}.{member}: {hint}"))


def collect(entries: Sequence[Entry], overrides: Mapping[str, object]) -> Settings:
    """Every key of the files, overridden, each checked by its own rule."""
    settings = Settings()
    for entry in entries:
        _add(settings, entry)
    for key, value in overrides.items():
        _override(settings, key, cast("JsonValue", value))
    for key, given in settings.given.items():
        if given.value is not None or key not in KEYS:
            _check(settings, key, given)
    _note_inert(settings)
    return settings


def _add(settings: Settings, entry: Entry) -> None:
    key = canonical(entry.key)
    if key in settings.given:
        first = settings.given[key]
        names = f" (as {first.written} and as {entry.key})" if first.written != entry.key else ""
        settings.mistakes.append(f"{entry.place}: {key} is given twice{names}, first at {first.places['']}: remove one.")
        return
    settings.given[key] = Given(written=entry.key, value=entry.value, places=entry.places)
    if entry.key.replace("-", "_") in ALIASES:
        settings.notes.append(f"{entry.place}: {entry.key} is the old name of {key}.")


def _override(settings: Settings, dotted: str, value: JsonValue) -> None:
    """Sets ``key`` or ``block.member``; the rest of a block stays as the files have it."""
    head, *members = dotted.split(".")
    key = canonical(head)
    place = f"--set {dotted}"
    if not members:
        settings.given[key] = Given(written=head, value=value, places={"": place})
        return
    before = settings.given.get(key)
    block = before.value if before is not None and before.value is not None else {}
    if not isinstance(block, dict):
        settings.mistakes.append(f"{place}: {key} is {block!r}, which has no members: use --set {key}=VALUE.")
        return
    places = dict(before.places) if before is not None else {"": place}
    settings.given[key] = Given(
        written=before.written if before is not None else head,
        value=_with_member(block, members, value),
        places=places | {".".join(members): place},
    )


def _with_member(block: dict[str, JsonValue], members: Sequence[str], value: JsonValue) -> dict[str, JsonValue]:
    first, *rest = members
    inner = block.get(first)
    return {**block, first: _with_member(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}


def _check(settings: Settings, key: str, given: Given) -> None:
    """Files the value under its key, or the mistake."""
    rule, value, place = KEYS.get(key), given.value, given.places[""]
    if rule is None:
        close = nearest(key)
        hint = f": did you mean {close}?" if close is not None else ": it is no key of GPT-NeoX, SepLLM or this project."
        settings.mistakes.append(f"{place}: unknown key {given.written}{hint}")
    elif isinstance(rule, Refused):
        if value not in rule.accepted:
            settings.mistakes.append(f"{place}: {given.written} is {_shown(value)}: {rule.reason}.")
    elif isinstance(rule, Inert):
        settings.values[key] = value
    else:
        try:
            settings.values[key] = _read(settings, key, given)
        except ValueError:
            settings.broken.add(key)
            settings.mistakes.append(f"{place}: {given.written} is {_shown(value)}: give {rule.kind.words}.")
        except Unreadable:
            settings.broken.add(key)


def _read(settings: Settings, key: str, given: Given) -> JsonValue:
    rule = KEYS[key]
    assert not isinstance(rule, Inert | Refused)
    if isinstance(given.value, dict):
        value, found = numbers_from_text(given.value, path=key)
        for member in found:
            settings.notes.append(f"{settings.place(member.path)}: YAML reads {member.path} {member.text!r} as text; taken as {member.number:g}.")
        endless = [settings.fail([path], f"{path} is {number}: give a finite number.") for path, number in not_finite(value, path=key)]
        if endless:
            raise endless[0]
        return rule.kind.read(value)
    result = rule.kind.read(given.value)
    if isinstance(given.value, str) and isinstance(result, int | float):
        settings.notes.append(f"{given.places['']}: YAML reads {given.written} {given.value!r} as text; taken as {result:g}.")
    return result


def _shown(value: JsonValue) -> str:
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 80 else text[:77] + "..."


def _note_inert(settings: Settings) -> None:
    """One note for all keys that share a reason."""
    by_reason: dict[str, list[str]] = {}
    for key in settings.values:
        rule = KEYS[key]
        if isinstance(rule, Inert):
            by_reason.setdefault(rule.reason, []).append(settings.written(key))
    settings.notes.extend(f"no effect: {', '.join(keys)} ({reason})." for reason, keys in by_reason.items())


def attempt(settings: Settings, work: Callable[[], R]) -> R | None:
    """The result of ``work``, or None where something that it needs is reported as missing or wrong."""
    try:
        return work()
    except Unreadable:
        return None


def copied(settings: Settings, group: type[G], **worked_out: object) -> G:
    """The group with every copied key of it that was given, and the fields that were worked out."""
    name = group.__name__.removesuffix("Config").lower()
    given = {rule.field: settings.raw(key) for key, rule in copied_keys(name) if settings.has(key)}
    return group.model_validate({**given, **worked_out})


def copied_keys(group: str) -> Iterator[tuple[str, Honoured]]:
    """The keys whose values are fields of the group as they are."""
    for key, rule in KEYS.items():
        if isinstance(rule, Honoured) and rule.is_copied and rule.group == group:
            yield key, rule

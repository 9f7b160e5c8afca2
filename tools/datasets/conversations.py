"""Conversations to tokens and labels by the chat template of a transformers tokenizer: only what the model is to say counts.

A conversation is a list of turns with a ``role`` and a ``content``. It is rendered and tokenized once, as a whole, so its tokens are those of
`apply_chat_template`. What is learned of it is what each turn of the generating role adds to the rendering of the turns before it with
the generation prompt; a token belongs to where its first character stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from megatron.data.gpt_dataset import IGNORED_LABEL
from tools.datasets.documents import Record, Source, check_whole, lists_of
from tools.datasets.encoding import LABELS, Encoder, Output, Rows, fingerprint, repair, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NO_TOKEN = -1


class Turn(TypedDict):
    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRecipe:
    tokenizer_path: str
    """Folder or hub name of a transformers tokenizer with a chat template."""
    keys: tuple[str, ...] = ("conversation",)
    generation_role: str = "assistant"
    """Whose turns are learned."""
    only_last: bool = False
    """Of these, the last turn of the conversation alone."""
    has_labels: bool = True
    """Otherwise everything is learned, and there are no label files."""
    ftfy: bool = False

    def build(self) -> Encoder:
        return _ChatEncoder(self)

    def fingerprint(self) -> str:
        return fingerprint(repr(self), [self.tokenizer_path])


class _ChatEncoder:
    def __init__(self, recipe: ChatRecipe) -> None:
        if recipe.ftfy:
            repair("")
        self._recipe = recipe
        self._tokenizer = _open_tokenizer(recipe.tokenizer_path)
        names = [name for key in recipe.keys for name in ([key, f"{key}_label"] if recipe.has_labels else [key])]
        self.outputs = [Output(name=f"{name}_document", dtype=LABELS) for name in names]

    def encode(self, source: Source, records: Sequence[Record]) -> list[Rows]:
        rows = [self._rows(source, record) for record in records]
        end_id = self._tokenizer.eos_token_id
        columns = zip(zip(*rows, strict=True), self.outputs, strict=True)
        return [rows_of(column, output, eod_id=NO_TOKEN if end_id is None else end_id) for column, output in columns]

    def _rows(self, source: Source, record: Record) -> list[list[int]]:
        """A row for each output."""
        rows = []
        place = source.place(record)
        for conversation in lists_of(source, record, self._recipe.keys):
            turns = [_turn(turn, place, repaired=self._recipe.ftfy) for turn in conversation]
            for turn in turns:
                check_whole(turn["content"], source, record)
            tokens, labels = self._encode(turns, place) if turns else ([], [])
            rows += [tokens, labels] if self._recipe.has_labels else [tokens]
        return rows

    def _encode(self, turns: list[Turn], place: str) -> tuple[list[int], list[int]]:
        text = self._render(turns, place)
        encoding = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        labels = np.full(len(encoding.ids), IGNORED_LABEL)
        if self._recipe.has_labels:
            starts = np.array([start for start, _ in encoding.offsets])
            for begin, end in self._learned(turns, text, place):
                first, last = np.searchsorted(starts, [begin, end])
                labels[first:last] = encoding.ids[first:last]
        end_id = self._tokenizer.eos_token_id
        if end_id is None:
            return encoding.ids, labels.tolist()
        ends_learned = bool(len(labels)) and labels[-1] != IGNORED_LABEL
        return [*encoding.ids, end_id], [*labels.tolist(), end_id if ends_learned else IGNORED_LABEL]

    def _learned(self, turns: list[Turn], text: str, place: str) -> list[tuple[int, int]]:
        """First character and end of every stretch of the rendered text that is learned."""
        first = len(turns) - 1 if self._recipe.only_last else 0
        stretches = []
        for number, turn in enumerate(turns[first:], start=first):
            if turn["role"] != self._recipe.generation_role:
                continue
            before = self._render(turns[:number], place, add_generation_prompt=True) if number else ""
            through = self._render(turns[: number + 1], place)
            if not (text.startswith(through) and through.startswith(before)):
                rule = "the chat template writes earlier turns otherwise once later ones follow, so answers cannot be told from prompts"
                raise ValueError(f"{place}: {rule}: --no-mask learns everything, --only-last needs the last turn alone.")
            stretches.append((len(before), len(through)))
        return stretches

    def _render(self, turns: list[Turn], place: str, *, add_generation_prompt: bool = False) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt))
        except Exception as error:  # of jinja2, which templates raise on purpose too
            raise ValueError(f"{place}: the chat template of {self._recipe.tokenizer_path} refuses these turns ({error}).") from error


def _open_tokenizer(path: str) -> PreTrainedTokenizerFast:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError("Chat templates need the package transformers: pip install transformers") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # of the hub, of its network, of the tokenizer's files
        raise ValueError(f"--tokenizer-path {path} cannot be opened as a transformers tokenizer ({error}).") from error
    if not tokenizer.is_fast:
        raise ValueError(f"--tokenizer-path {path} has no tokenizer.json, which tells tokens and characters apart: save it as a fast tokenizer.")
    if tokenizer.chat_template is None:
        raise ValueError(f"--tokenizer-path {path} has no chat template: add chat_template.jinja to the folder.")
    return tokenizer


def _turn(turn: object, place: str, *, repaired: bool) -> Turn:
    role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f'{place} holds a turn that is not {{"role": ..., "content": ...}} with a text each: it is {str(turn)[:80]}.')
    return Turn(role=role, content=repair(content) if repaired else content)

"""Which token ids separate: those that SepCache uses for known families of models, and those that a tokenizer has."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from sepllm.pattern import SEPARATORS

_BLANKS = {"Ġ": " ", "Ċ": "\n", "ĉ": "\t", "▁": " ", "<0x20>": " ", "<0x0A>": "\n", "<0x09>": "\t"}
"""How tokenizers write blanks in their vocabularies: byte-level ones, and SentencePiece."""


class Separators(NamedTuple):
    """What a cache needs to know of a tokenizer."""

    ids: tuple[int, ...]
    padding_id: int


_PYTHIA = Separators((15, 13, 32, 2, 28, 27, 209, 186, 187, 964, 1157, 3736, 2195, 3706, 1163, 2490, 50276, 586, 4928, 50275), 0)

PRESETS = {
    "llama": Separators((128000, 13, 11, 30, 0, 26, 25, 198, 220, 662, 1174, 949, 758, 2652, 551, 720, 256, 262), 128009),
    "pythia": _PYTHIA,
    "gpt_neox": _PYTHIA,
    "falcon": Separators((25, 23, 42, 12, 38, 37, 193, 4610, 204, 258, 1212, 23787, 466), 11),
}
"""By family: of Llama the tokenizer of Llama 3. A model type names its family if it contains it."""


def preset(model_type: str) -> Separators:
    """The separators of the family that ``model_type`` names."""
    for family, separators in PRESETS.items():
        if family in model_type.lower():
            return separators
    raise ValueError(
        f"model_type {model_type!r} is none of {', '.join(PRESETS)}: give separator_token_ids and PADDING_ID, or the tokenizer, from which they "
        "are found."
    )


def separators_of(tokenizer: PreTrainedTokenizerBase) -> Separators:
    """The tokens that are exactly one of `SEPARATORS`, or a blank and one of them; and the padding id, else the end of text."""
    wanted = set(SEPARATORS) | {f" {character}" for character in SEPARATORS}
    ids = sorted(token for text, token in tokenizer.get_vocab().items() if _readable(text) in wanted)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if not ids or padding is None:
        lack = "a token for padding or the end of text" if ids else "tokens of . , ? ! ; : or blanks"
        raise ValueError(f"{type(tokenizer).__name__} has no {lack}: give separator_token_ids and PADDING_ID.")
    return Separators(tuple(ids), padding)


def _readable(token: str) -> str:
    for written, blank in _BLANKS.items():
        token = token.replace(written, blank)
    return token

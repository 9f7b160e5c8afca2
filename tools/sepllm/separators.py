"""The separator ids of any tokenizer, as a line for a configuration.

    python -m tools.sepllm.separators tokenizer.json

By default those of SepLLM: the tokens that are exactly one of ``. , ? ! ; :``, space, tab and newline. A tokenizer has more tokens of these
characters, such as a sign with a blank before it: `--spaced` adds those, `--all` whatever consists of nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence

from megatron.data.tokenizer import Tokenizer, find_separator_ids
from sepllm.pattern import SEPARATORS
from tools.command import exit_status
from tools.sepllm.vocabulary import open_tokenizer, readable

ESCAPES = {"\\t": "\t", "\\n": "\n", "\\r": "\r"}


def main(argv: Sequence[str] | None = None) -> int:
    flags = argparse.ArgumentParser(prog="tools.sepllm.separators", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("tokenizer", metavar="TOKENIZER", help="tokenizer.json, .model, a folder with one of them, bytes, or a name of tiktoken")
    flags.add_argument("--characters", default="".join(SEPARATORS), help=r"that separate; \t, \n and \r are read as such (default: SepLLM's nine)")
    forms = flags.add_mutually_exclusive_group()
    forms.add_argument("--spaced", action="store_true", help="also each of them with a blank before it")
    forms.add_argument("--all", action="store_true", help="every token that contains only these characters")
    flags.add_argument("--yaml", action="store_true", help="print the line of YAML alone")
    arguments = flags.parse_args(argv)
    return exit_status(lambda: report(open_tokenizer(arguments.tokenizer), arguments))


def report(tokenizer: Tokenizer, arguments: argparse.Namespace) -> None:
    characters = tuple(dict.fromkeys(unescaped(arguments.characters)))
    ids = separator_ids(tokenizer, characters, spaced=arguments.spaced, everything=arguments.all)
    texts = {token: tokenizer.token_text(token) for token in ids}
    absent = [character for character in characters if character not in texts.values()]
    if absent:
        print(f"No token is exactly one of {', '.join(repr(character) for character in absent)}.", file=sys.stderr)
    if not ids:
        raise ValueError(f"{arguments.tokenizer} has no token of these characters: give others with --characters.")
    if not arguments.yaml:
        width = len(str(max(ids)))
        print("\n".join(f"{token:>{width}}  {readable(text)}" for token, text in texts.items()) + "\n")
    print(f"separator_token_ids: {ids}")


def unescaped(characters: str) -> str:
    r"""What was typed as ``\t``, ``\n`` or ``\r`` as the character that it stands for."""
    for typed, character in ESCAPES.items():
        characters = characters.replace(typed, character)
    return characters


def separator_ids(tokenizer: Tokenizer, characters: Iterable[str] = SEPARATORS, *, spaced: bool = False, everything: bool = False) -> list[int]:
    """Ids of the tokens that are exactly one of the characters, in the order of these; then, if ``spaced``, of those with a blank before
    them; or, if ``everything``, of all other tokens that consist of these characters alone, in the order of the ids.
    """
    alone = list(characters)
    ids = find_separator_ids(tokenizer, [*alone, *(f" {character}" for character in alone)] if spaced else alone)
    if everything:
        texts = ((token, tokenizer.token_text(token)) for token in range(tokenizer.vocab_size))
        ids = list(dict.fromkeys([*ids, *(token for token, text in texts if text and set(text) <= set(alone))]))
    return ids


if __name__ == "__main__":
    sys.exit(main())

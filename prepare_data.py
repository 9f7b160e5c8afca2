"""Make token files.

prepare_data.py --input FILE ... --help             your own text
prepare_data.py train-tokenizer --input FILE ...    a tokenizer of your own text
prepare_data.py demo -d DIR                         Shakespeare and the King James Bible, tokenizer included
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    if not argv:
        print(__doc__)
        return 0
    try:
        _run(argv)
    except (ValueError, OSError) as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"prepare_data.py: stopped{'; the same command goes on from here' * argv[0].startswith('-')}.", file=sys.stderr)
        return 130
    return 0


def _run(argv: Sequence[str]) -> None:
    command, flags = argv[0], argv[1:]
    if command == "demo":
        from tools.datasets import demo_corpus

        demo_corpus.main(flags)
    elif command == "train-tokenizer":
        from tools.datasets import train_tokenizer

        train_tokenizer.train_from_flags(flags)
    elif command.startswith("-"):
        from tools.datasets import preprocess

        preprocess.main(argv)
    else:
        named = f"GPT-NeoX's {command} and other named corpora are not downloaded, as most of their addresses are gone"
        raise ValueError(f"{named}: give files or folders with --input, or a data set of the Hugging Face hub with --input hf:NAME.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

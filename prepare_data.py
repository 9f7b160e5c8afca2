"""Make token files.

prepare_data.py demo -d DIR                  Shakespeare and the King James Bible, tokenizer included
prepare_data.py --input FILE ... --help      your own text
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    try:
        if argv[:1] == ["demo"]:
            from tools.datasets import demo_corpus

            demo_corpus.main(argv[1:])
        elif not argv:
            print(__doc__)
        else:
            from tools.datasets import preprocess

            preprocess.main(argv)
    except (ValueError, OSError) as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

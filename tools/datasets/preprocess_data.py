"""`prepare_data.py` with flags, under the name of GPT-NeoX's script."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a checkout that is not installed

from tools.command import exit_status
from tools.datasets import preprocess


def main(argv: list[str] | None = None) -> int:
    return exit_status(lambda: preprocess.main(argv))


if __name__ == "__main__":
    sys.exit(main())

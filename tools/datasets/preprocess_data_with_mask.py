"""`prepare_data.py --mask-before-token ...`, under the name of GPT-NeoX's script."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a checkout that is not installed

from tools.datasets.preprocess_data import main

if __name__ == "__main__":
    sys.exit(main())

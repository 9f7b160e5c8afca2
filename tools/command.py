"""How a command of tools/ ends: what its user got wrong is a sentence on stderr and status 2, not a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


def exit_status(run: Callable[[], object]) -> int:
    """0 when ``run`` returns; 2, with its message printed, when it raises ValueError or a file cannot be read or written."""
    try:
        run()
    except (ValueError, OSError) as mistake:
        print(mistake, file=sys.stderr)
        return 2
    return 0

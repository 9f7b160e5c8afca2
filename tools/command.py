"""How a command of tools/ ends: what its user got wrong is a sentence on stderr and status 2, Ctrl-C a word and status 130; no traceback."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable


def exit_status(run: Callable[[], object]) -> int:
    """0 when ``run`` returns; 2, with its message printed, when it raises ValueError or a file cannot be read or written; 130 at Ctrl-C."""
    try:
        run()
    except (ValueError, OSError) as mistake:
        print(mistake, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _stopped()
    return 0


def until_stopped(main: Callable[[], int | None]) -> int:
    """The status that ``main`` returns, None being 0; 130 at Ctrl-C. For commands with statuses of their own."""
    try:
        return main() or 0
    except KeyboardInterrupt:
        return _stopped()


def _stopped() -> int:
    print("stopped.", file=sys.stderr)
    return 128 + signal.SIGINT

"""SIGTERM and SIGUSR1 as a wish to stop: the current step ends, a checkpoint is saved, the run exits."""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop. A context: outside it the signals do what they did before; a second one does too.

    A launcher's signal does not reach all processes at once: in one that has stopped because others were asked, the first signal, still on its
    way, changes nothing.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self.is_agreed = False
        """Whether all processes stop, because one of them was asked."""
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_agreed and not self.is_requested:
            self._previous = dict.fromkeys(self._previous, signal.SIG_IGN)
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}

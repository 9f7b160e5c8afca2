"""The port at which ranks meet."""

from __future__ import annotations

import socket

DEFAULT_PORT = 29500


def free_port(wanted: int) -> int:
    """A port that nobody on this machine listens on. The default stands for any: between looking and listening lie seconds, in which a second job
    on this machine would find the same one free. A chosen one that is taken: ValueError."""
    try:
        return _bind(wanted if wanted != DEFAULT_PORT else 0)
    except OSError:
        raise ValueError(f"master_port {wanted} is in use: leave it out, or choose another.") from None


def _bind(port: int) -> int:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))
        return int(listener.getsockname()[1])

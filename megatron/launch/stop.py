"""Stops one job on this host: `python -m megatron.launch.stop JOB NODE TERM|HUP`. Says nothing where the job has ended already.

The job is found by the socket that its `megatron.launch.node` holds, and Linux says which process that is: no names are matched.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
from contextlib import suppress

from megatron.launch.node import mark_name

_GONE_S = 20.0


def main(argv: list[str] | None = None) -> int:
    """0 once the signal is sent and, after HUP, the job's processes on this host are gone; else 1."""
    job, node, name = sys.argv[1:] if argv is None else argv
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(mark_name(job, int(node)))
        except ConnectionRefusedError:
            return 0
        pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.Signals[f"SIG{name}"])
        return 0 if name != "HUP" or _is_gone(client) else 1


def _is_gone(client: socket.socket) -> bool:
    """Waits for the end of the process at the other end, with which the connection ends."""
    client.settimeout(_GONE_S)
    try:
        client.recv(1)
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())

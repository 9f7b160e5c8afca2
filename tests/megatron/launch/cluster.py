"""Two throw-away hosts on one machine: network namespaces joined by a cable, each with a name, an sshd and a key of their own.

Nothing outside can be reached from them or reach them. The second one also has a disk of its own, at `own`. Ends only what runs inside them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron.launch.environment import REPOSITORY

HOSTS = ("node1", "node2")
ADDRESSES = ("10.199.8.1", "10.199.8.2")
TOOLS = {"pdsh": "pdsh", "/usr/sbin/sshd": "openssh-server", "ssh-keygen": "openssh-client", "ip": "iproute2", "unshare": "util-linux"}

_SSH = """Host *
  IdentityFile {folder}/id
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
_PASSWD = """root:x:0:0:root:{folder}:/bin/sh
sshd:x:105:65534::/run/sshd:/usr/sbin/nologin
"""
"""A home of its own: what a user's shell does at its start takes time, and may not survive being killed."""
_SSHD = """ListenAddress {address}
HostKey {folder}/hostkey
AuthorizedKeysFile {folder}/id.pub
PidFile none
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
"""


def why_not() -> str | None:
    """What keeps this machine from having such hosts, and the remedy."""
    if os.geteuid() != 0:
        return "network namespaces need root: run as root, or in a container with CAP_NET_ADMIN and CAP_SYS_ADMIN"
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing:
        return f"not installed: apt-get install {' '.join(missing)}"
    tried = subprocess.run(["ip", "netns", "add", f"try{os.getpid()}"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        return f"`ip netns add` fails: {tried.stderr.strip()}"
    _ip("netns", "del", f"try{os.getpid()}")
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    folder: Path
    """For the keys; `folder/own` is another folder on each host."""

    def up(self) -> None:
        (self.folder / "own").mkdir()
        Path("/run/sshd").mkdir(exist_ok=True)
        for key in ("id", "hostkey"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)], check=True)
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            self._make(host, address)
        first, second = map(self._namespace, HOSTS)
        _ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            _ip("-n", self._namespace(host), "addr", "add", f"{address}/24", "dev", "cable")
            self.cable(host, is_up=True)
        self._serve()

    def command(self, host: str, *words: str) -> list[str]:
        """What runs a command on a host."""
        return ["ip", "netns", "exec", self._namespace(host), "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', host, *words]

    def deepy(self, *words: str) -> list[str]:
        """What runs deepy on the first host."""
        return self.command(HOSTS[0], sys.executable, str(REPOSITORY / "deepy.py"), *words)

    def processes(self, host: str) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self._namespace(host)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in listed.stdout.split()]

    def find(self, host: str, *parts: str) -> list[int]:
        """Processes of a host whose command line holds all these."""
        return [pid for pid in self.processes(host) if all(part in _command_line(pid) for part in parts)]

    def cable(self, host: str, *, is_up: bool) -> None:
        """Plugs the cable in, or pulls it out."""
        _ip("-n", self._namespace(host), "link", "set", "cable", "up" if is_up else "down")

    def crash(self, host: str) -> None:
        """Ends everything on a host at once, as a power cut would, and starts it again."""
        for pid in self.processes(host):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._serve(host)

    def down(self) -> None:
        for host in HOSTS:
            deadline = time.monotonic() + 10
            while (left := self.processes(host)) and time.monotonic() < deadline:
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)
            subprocess.run(["ip", "netns", "del", self._namespace(host)], check=False, capture_output=True)
            shutil.rmtree(self._etc(host), ignore_errors=True)

    def _namespace(self, host: str) -> str:
        return f"{host}-{os.getpid()}"

    def _etc(self, host: str) -> Path:
        """What `ip netns exec` shows as /etc on that host."""
        return Path("/etc/netns") / self._namespace(host)

    def _make(self, host: str, address: str) -> None:
        _ip("netns", "add", self._namespace(host))
        _ip("-n", self._namespace(host), "link", "set", "lo", "up")
        etc = self._etc(host)
        (etc / "ssh").mkdir(parents=True)
        names = "".join(f"{address} {host}\n" for address, host in zip(ADDRESSES, HOSTS, strict=True))
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (etc / "passwd").write_text(_PASSWD.format(folder=self.folder))
        (etc / "ssh" / "ssh_config").write_text(_SSH.format(folder=self.folder))
        (etc / "ssh" / "sshd_config").write_text(_SSHD.format(folder=self.folder, address=address))

    def _serve(self, *hosts: str) -> None:
        for host in hosts or HOSTS:
            own_disk = f"mount -t tmpfs none {self.folder}/own; " if host == HOSTS[1] else ""
            subprocess.run(self.command(host, "sh", "-c", f"{own_disk}exec /usr/sbin/sshd -E {self.folder}/{host}.log"), check=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""

"""What a host answers before a job starts there: `python -m megatron.launch.probe`. Holds no device and loads no torch."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from megatron.config.loader import config_to_json
from megatron.config.schema import Config
from megatron.launch.environment import REPOSITORY
from megatron.launch.inputs import data_inputs, nearest_folder, obstacles, tokenizer_inputs
from megatron.launch.node import tell
from megatron.launch.ports import free_port
from megatron.launch.resources import computes_in_fp16, count_gpus
from megatron.launch.worker import decode_config

PACKAGES = ("torch", "deepspeed", "numpy", "pydantic", "transformers", "triton")
_CODE = ("megatron", "sepllm", "csrc")
_SUFFIXES = (".py", ".cpp", ".cu", ".h")
_HASHED_BYTES = 2**20
_SHARED_S = 5.0


class Machine(BaseModel):
    """What must be the same on all hosts."""

    model_config = ConfigDict(frozen=True)

    versions: dict[str, str]
    code: str
    config: str
    inputs: dict[str, str]
    """Of each file that the configuration names: its size, and a hash of how it begins."""


class Answer(BaseModel):
    """What one host says."""

    model_config = ConfigDict(frozen=True)

    machine: Machine
    obstacles: tuple[str, ...]
    """Why its ranks cannot be started there, one sentence each."""
    address: str | None = None
    """Of the first host: where the others reach it."""
    port: int | None = None
    """Of the first host: free."""


def machine(config: Config, script: Path) -> Machine:
    """This one."""
    return Machine(versions=_versions(), code=_code(script), config=_digest(config_to_json(config).encode()), inputs=dict(_inputs(config)))


def main(argv: Sequence[str] | None = None) -> int:
    """0, once deepy has the answer and has hung up."""
    given = _parser().parse_args(argv)
    config = decode_config(given.config_base64)
    mark = _shared_mark(config, given) if given.shared else None
    found = list(_obstacles(config, given))
    if mark is not None and not _is_marked(mark, is_first=given.node == 0):
        found.append(
            f"save ({config.checkpoint.save}) is not the folder that the first host sees: mount one file system on all hosts, or set "
            "use_shared_fs to false where each has its own."
        )
    address = port = None
    if given.node == 0:
        address = config.launch.master_addr or _address()
        try:
            port = free_port(config.launch.master_port)
        except ValueError as mistake:
            found.append(str(mistake))
    answer = Answer(machine=machine(config, Path(given.script)), obstacles=tuple(found), address=address, port=port)
    try:
        tell(given.job, "answer", answer.model_dump())
        if mark is not None and given.node == 0:
            sys.stdin.read()
    finally:
        if mark is not None and given.node == 0:
            mark.unlink(missing_ok=True)
    return 0


def _obstacles(config: Config, given: argparse.Namespace) -> Iterator[str]:
    yield from obstacles(config, script=Path(given.script).name, has_fp16=computes_in_fp16(config.runtime.device))
    if config.runtime.device == "cuda" and (gpus := count_gpus()) < given.gpus:
        yield f"the job wants GPU {given.gpus - 1} and there are {gpus}: correct the slots of this host in the hostfile, or look at nvidia-smi there."
    if not os.path.isfile(given.script):
        yield f"{given.script} does not exist: every host needs the script at the same path."


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _code(script: Path) -> str:
    """Hash of this project's sources and of the script."""
    files = sorted(path for folder in _CODE for path in (REPOSITORY / folder).rglob("*") if path.suffix in _SUFFIXES)
    lines = [f"{path.relative_to(REPOSITORY)} {_digest(path.read_bytes())}" for path in files]
    if script.is_file():
        lines.append(_digest(script.read_bytes()))
    return _digest("\n".join(lines).encode())


def _inputs(config: Config) -> Iterator[tuple[str, str]]:
    for given in (*tokenizer_inputs(config), *data_inputs(config)):
        for path in map(Path, given.files):
            if path.is_file():  # remote ones are the same from everywhere
                with path.open("rb") as file:
                    yield str(path), f"{path.stat().st_size} bytes, {_digest(file.read(_HASHED_BYTES))}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _shared_mark(config: Config, given: argparse.Namespace) -> Path | None:
    """The file by which other hosts recognize the first one's folder of checkpoints."""
    save = config.checkpoint.save
    if save is None or Path(given.script).name != "train.py":
        return None
    mark = nearest_folder(Path(save)) / f".{given.job}"
    if given.node == 0 and os.access(mark.parent, os.W_OK):
        mark.touch()
    return mark


def _is_marked(mark: Path, *, is_first: bool) -> bool:
    deadline = time.monotonic() + _SHARED_S
    while not is_first and not mark.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _address() -> str | None:
    """The first address of this host that is not its loopback, as `hostname -I` lists them."""
    listed = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout.split()
    return listed[0] if listed else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron.launch.probe", allow_abbrev=False)
    parser.add_argument("--job", required=True, help="what the answer begins with")
    parser.add_argument("--node", type=int, required=True, help="number of this host")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs that must be there")
    parser.add_argument("--shared", action="store_true", help="the folder of checkpoints must be that of the first host")
    parser.add_argument("--script", required=True)
    parser.add_argument("--config-base64", required=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())

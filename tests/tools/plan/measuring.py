"""A training run that keeps an account of itself: the bytes that its tensors hold at most, and what it hands to collectives.

`PROGRAM` runs on every process and prints a line of JSON for each configuration.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_to_all_single
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.config.schema import Config
from megatron.training.trainer import train
from tests.megatron.training.running import run_ranks

PROGRAM = "import sys; from tests.tools.plan.measuring import main; main(sys.argv[1:])"
MARK = "ACCOUNT "


@dataclass(slots=True, kw_only=True)
class Account:
    """Of one process."""

    peak_bytes: int = 0
    """Of all tensors that were alive at once."""
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes handed to each kind of collective, whole tensors (the shards of all processes together)."""


class Bookkeeper(TorchDispatchMode):
    """Sees every operator: keeps the books of storages that are alive, and of collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.account = Account()
        self._live: dict[int, int] = {}
        self._live_bytes = 0

    def all_to_all_single(self, received: Tensor, *args: Any, **kwargs: Any) -> object:
        """torch's, which an operator of our own calls where this mode does not see it."""
        self._add("all_to_all_single", received.nbytes)
        return all_to_all_single(received, *args, **kwargs)

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        space, _, name = func.name().partition("::")
        if space in ("c10d", "_c10d_functional"):
            self._note_collective(name.split(".")[0], args, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._note_storage(tensor.untyped_storage())
        return result

    def _note_collective(self, name: str, args: tuple[Any, ...], result: object) -> None:
        """An operator gets what it writes to, or returns it. A group of one sends nothing."""
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
        if tensors and not any(_is_group_of_one(argument) for argument in args):
            self._add(name, max(tensor.nbytes for tensor in tensors))

    def _add(self, name: str, num_bytes: int) -> None:
        self.account.sent[name] = self.account.sent.get(name, 0) + num_bytes

    def _note_storage(self, storage: torch.UntypedStorage) -> None:
        place = storage.data_ptr()
        if place == 0 or place in self._live:
            return
        self._live[place] = storage.nbytes()
        self._live_bytes += storage.nbytes()
        self.account.peak_bytes = max(self.account.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._forget, place)

    def _forget(self, place: int) -> None:
        self._live_bytes -= self._live.pop(place)


def _is_group_of_one(argument: object) -> bool:
    return isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()) and ProcessGroup.unbox(argument).size() == 1


def main(paths: Sequence[str]) -> None:
    for path in paths:
        config = Config.model_validate_json(Path(path).read_text())
        with Bookkeeper() as books, patch.object(torch.distributed, "all_to_all_single", books.all_to_all_single):
            train(config)
        print(MARK + json.dumps(asdict(books.account)), flush=True)


def accounts(configs: Sequence[Config], *, ranks: int, folder: Path) -> list[list[Account]]:
    """What each process of each run did, in the order of ranks."""
    paths = [folder / f"config{place}.json" for place in range(len(configs))]
    for path, config in zip(paths, configs, strict=True):
        path.write_text(config.model_dump_json())
    run_ranks(["-c", PROGRAM, *map(str, paths)], ranks=ranks, folder=folder)
    lines = [(folder / f"rank{rank}.txt").read_text().splitlines() for rank in range(ranks)]
    of_ranks = [[Account(**json.loads(line.removeprefix(MARK))) for line in of_rank if line.startswith(MARK)] for of_rank in lines]
    return [list(of_run) for of_run in zip(*of_ranks, strict=True)]

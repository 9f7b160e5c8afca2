"""One endless text, read token by token: what is measured on the way, and how it goes on after an interruption."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sepllm.streaming.method import Method, StreamCache

BLOCK = 64
"""Tokens between two looks at the device, at the clock and at the memory."""
STATE, LOSSES, STORED = "state.pt", "log.txt", "kv.txt"
"""Files of a stream: where to go on; the negative log-likelihood of each token; how many tokens were stored after it was read."""
FORMAT = "2"
"""Of the state: a later one has another number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Sums up to a token, so that two of them tell about what lies between."""

    num_tokens: int
    nll_sum: float
    stored_sum: int
    elapsed_s: float
    allocated_bytes: int
    """Of keys and values, at this token."""
    process_bytes: int
    """As `memory_bytes`, at this token."""


@dataclass(slots=True, kw_only=True)
class Tally:
    """What was measured so far."""

    num_tokens: int = 0
    """Tokens read, each of which predicted the next one."""
    nll_sum: float = 0.0
    """Negative log-likelihoods, natural logarithm."""
    stored_sum: int = 0
    """Tokens stored after each token was read, added up."""
    stored_largest: int = 0
    token_bytes: int = 0
    """Keys and values of one stored token, in all layers."""
    allocated_bytes_largest: int = 0
    process_bytes_largest: int = 0
    elapsed_s: float = 0.0
    """For models, caches and losses; loading and tokenizing aside."""
    marks: list[Mark] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """Of all tokens so far."""
        return perplexity_of(self.nll_sum, self.num_tokens)


def perplexity_of(nll_sum: float, num_tokens: int) -> float:
    """``inf`` where it is too large for a float."""
    mean = nll_sum / max(1, num_tokens)
    return math.exp(mean) if mean < 700 else math.inf


class Stream:
    """A text under one method, from where its folder says that it was left. The model has an attachment (`sepllm.hf.attach`)."""

    def __init__(self, model: PreTrainedModel, method: Method, folder: Path, *, identity: Mapping[str, str], save_every: int = 10_000) -> None:
        """``identity``: what a run must have in common with the one that it continues, method and format aside. ``save_every``: in tokens."""
        if save_every < 1:
            raise ValueError(f"save_every is {save_every}: it counts tokens and must be 1 or more.")
        self.model, self.method, self.folder, self.save_every = model, method, folder, save_every
        self.identity = {**identity, "method": repr(method), f"format of {STATE}": FORMAT}
        self.device = model.device
        self.cache = StreamCache(method, num_layers=model.get_decoder().config.num_hidden_layers)
        self.tally = Tally()
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def read(self, pairs: Iterator[tuple[int, int]], num_tokens: int) -> Iterator[Tally]:
        """The tally after each block, until ``num_tokens`` were read or the text has no more. ``pairs`` are those of the whole text."""
        if self.tally.num_tokens > num_tokens:
            raise ValueError(
                f"{self.folder} holds {self.tally.num_tokens} tokens already, more than num_eval_tokens ({num_tokens}): ask for as many or more, "
                "use another --output_dir, or --restart."
            )
        is_new = False
        rest = islice(pairs, self.tally.num_tokens, None)
        while block := list(islice(rest, self._block_length(num_tokens))):
            self._read(block)
            is_new = True
            if self.tally.num_tokens % self.save_every == 0:
                self._mark()
                self._save()
                is_new = False
            yield self.tally
        if is_new:
            self._save()

    def _block_length(self, num_tokens: int) -> int:
        """A block ends where the state is saved, and where the run ends."""
        done = self.tally.num_tokens
        return min(BLOCK, self.save_every - done % self.save_every, num_tokens - done)

    @torch.inference_mode()
    def _read(self, block: list[tuple[int, int]]) -> None:
        """Reads tokens one by one; looks at the results once they are all under way."""
        began_s = time.perf_counter()
        pairs = torch.tensor(block, device=self.device)
        losses, stored = [], []
        for number in range(len(block)):
            position = None if self.method.shifts_positions else torch.tensor([[self.cache.num_stored()]], device=self.device)
            logits = self.model(input_ids=pairs[None, number, :1], position_ids=position, past_key_values=self.cache, use_cache=True).logits
            losses.append(cross_entropy(logits[0].float(), pairs[number, 1:]))
            stored.append(self.cache.num_stored())
        values = torch.stack(losses).tolist()
        self.tally.elapsed_s += time.perf_counter() - began_s
        self._count(values, stored)
        self._log(LOSSES, values)
        self._log(STORED, stored)

    def _count(self, losses: list[float], stored: list[int]) -> None:
        tally = self.tally
        tally.num_tokens += len(losses)
        for loss in losses:
            tally.nll_sum += loss
        tally.stored_sum += sum(stored)
        tally.stored_largest = max(tally.stored_largest, *stored)
        tally.token_bytes = self.cache.num_stored_bytes() // self.cache.num_stored()
        tally.allocated_bytes_largest = max(tally.allocated_bytes_largest, self.cache.num_allocated_bytes())
        tally.process_bytes_largest = max(tally.process_bytes_largest, memory_bytes(self.device))

    def _log(self, name: str, values: list[float] | list[int]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.writelines(f"{value!r}\n" for value in values)

    def _mark(self) -> None:
        tally = self.tally
        tally.marks.append(
            Mark(
                num_tokens=tally.num_tokens,
                nll_sum=tally.nll_sum,
                stored_sum=tally.stored_sum,
                elapsed_s=tally.elapsed_s,
                allocated_bytes=self.cache.num_allocated_bytes(),
                process_bytes=memory_bytes(self.device),
            )
        )

    def _save(self) -> None:
        """The state is the new one or the old one, whenever the run is killed."""
        state = {
            "identity": self.identity,
            "tally": asdict(self.tally),
            "cache": self.cache.state(),
            "file_bytes": {name: (self.folder / name).stat().st_size for name in (LOSSES, STORED)},
        }
        partial = self.folder / f"{STATE}.partial"
        torch.save(state, partial)
        os.replace(partial, self.folder / STATE)

    def _resume(self) -> None:
        """Takes up what the folder holds; what was logged after the latest save is forgotten."""
        if not (self.folder / STATE).exists():
            for name in (LOSSES, STORED):
                (self.folder / name).unlink(missing_ok=True)
            return
        state = torch.load(self.folder / STATE, map_location="cpu", weights_only=True)
        saved = state["identity"]
        different = [f"{key} {saved.get(key)}, not {value}" for key, value in self.identity.items() if saved.get(key) != value]
        if different:
            raise ValueError(f"{self.folder} holds a run with {'; '.join(different)}: use another --output_dir, or --restart to begin anew.")
        marks = [Mark(**mark) for mark in state["tally"].pop("marks")]
        self.tally = Tally(**state["tally"], marks=marks)
        self.cache.restore(state["cache"], self.device)
        for name, size in state["file_bytes"].items():
            os.truncate(self.folder / name, size)


def forget(folder: Path) -> None:
    """The next stream of this folder begins anew."""
    (folder / STATE).unlink(missing_ok=True)


def memory_bytes(device: torch.device) -> int:
    """On CUDA, the most that torch has had allocated; elsewhere, what this process has resident (its peak, where that is not told)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    counts = Path("/proc/self/statm")
    if counts.exists():
        return int(counts.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

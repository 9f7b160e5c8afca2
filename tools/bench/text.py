"""Token rows of real text with a stated share of separators.

How much SepLLM skips depends on the text, so a benchmark names the share of separators beside every figure. By default the text is the
demo's, Shakespeare and the King James Bible: the plays have more separators than the target (a line ends every few words), the Bible
fewer, and pieces of both in turn meet it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DENSITY = 0.16
"""Share of separators that a benchmark's text is chosen for: a web mix's, by the Pythia tokenizer; prose has less, wrapped lines more."""
DEMO_FOLDER = Path("data/demo")
GPU_TOKENS = 16384
"""Of a call or a step on a GPU; with fewer, launching kernels would be what is measured."""
PIECE = 256
"""Tokens in a row from one source before the other may take over."""
PYTHIA_SEPARATORS = (15, 13, 32, 2, 28, 27, 209, 186, 187)
"""``. , ? ! ; : space tab newline`` in the Pythia tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStream:
    """Running text as token ids."""

    name: str
    ids: NDArray[np.int64]
    separator_ids: tuple[int, ...]

    def is_separator(self) -> NDArray[np.bool_]:
        return np.isin(self.ids, self.separator_ids)

    def density(self) -> float:
        """Share of separators among the tokens."""
        return float(self.is_separator().mean())

    def rows(self, count: int, length: int, *, target: float | None, tolerance: float = 0.01, seed: int = 0) -> Tensor:
        """``count`` stretches of ``length`` tokens, ``[count, length]`` int64, which do not overlap where the text is long enough.

        With a ``target``, each has that share of separators, within ``tolerance``; ValueError where the text has too few of them.
        """
        if len(self.ids) < length:
            raise ValueError(f"{self.name} has {len(self.ids)} tokens, but a row takes {length}: give a longer text, or a smaller --seq-lengths.")
        starts = np.random.default_rng(seed).permutation(np.arange(0, len(self.ids) - length + 1, max(length // 8, 1)))
        before = np.concatenate([[0], self.is_separator().cumsum()])
        if target is not None:
            density = (before[starts + length] - before[starts]) / length
            starts = starts[np.abs(density - target) <= tolerance]
        chosen = _apart(starts.tolist(), length, count)
        if len(chosen) < count:
            raise ValueError(
                f"{self.name} ({self.density():.3f} of its tokens are separators) has {len(chosen)} stretches of {length} tokens with "
                f"{target} +- {tolerance} of them, but {count} are needed: give another --density-target, or --tokens."
            )
        return torch.from_numpy(np.stack([self.ids[start : start + length] for start in chosen]))


def usual_rows(length: int, device: str) -> int:
    """Rows of ``length`` tokens that a training step takes where nobody says how many: one, on a GPU as many as make `GPU_TOKENS`."""
    return max(1, GPU_TOKENS // length) if device.startswith("cuda") else 1


def add_text_flags(flags: argparse.ArgumentParser) -> None:
    text = flags.add_argument_group("text", "Shakespeare and the King James Bible of requirements/demo.txt, or your own tokens")
    text.add_argument("--density-target", type=float, metavar="SHARE", help=f"of separators, +- 0.01 (default: {DENSITY}; with --tokens, any)")
    text.add_argument("--tokens", type=Path, metavar="FILE", help="a .npy of token ids, or the .bin of a dataset")
    text.add_argument("--separator-ids", type=int, nargs="+", default=PYTHIA_SEPARATORS, metavar="ID", help="of --tokens (default: Pythia's)")


def chosen_stream(arguments: argparse.Namespace) -> TokenStream:
    """The text that the flags ask for. Fills in the default ``density_target``."""
    if arguments.tokens is not None:
        return file_stream(arguments.tokens, arguments.separator_ids)
    if arguments.density_target is None:
        arguments.density_target = DENSITY
    return demo_stream(target=arguments.density_target)


def demo_stream(*, target: float, folder: Path = DEMO_FOLDER) -> TokenStream:
    """The demo's two texts, in pieces, mixed to the ``target`` share of separators. Its tokenizer is made where it is not there yet."""
    from megatron.data.tokenizer import HFTokenizer, find_separator_ids
    from tools.datasets import demo_corpus

    if not (folder / "tokenizer.json").exists():
        print(f"Making {folder} (as prepare_data.py demo does) ...", flush=True)
        demo_corpus.build([*demo_corpus.shakespeare(), *demo_corpus.king_james()], folder)
    tokenizer = HFTokenizer.from_file(folder / "tokenizer.json")
    separators = tuple(find_separator_ids(tokenizer))

    def source(documents: Sequence[demo_corpus.Document]) -> TokenStream:
        rows = tokenizer.encode_batch([document.text for document in documents])
        ids = np.concatenate([np.array([*row, tokenizer.eod_id], dtype=np.int64) for row in rows])
        return TokenStream(name=documents[0].source, ids=ids, separator_ids=separators)

    return mixed([source(list(demo_corpus.shakespeare())), source(list(demo_corpus.king_james()))], target=target)


def file_stream(path: Path, separator_ids: Sequence[int]) -> TokenStream:
    """Your own tokens: a one-dimensional ``.npy`` of ids, or the ``.bin`` of a dataset with its ``.idx`` beside it."""
    if path.suffix == ".npy":
        ids = np.load(path)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{path} holds {ids.dtype} of shape {ids.shape}: give one row of integer token ids.")
    elif path.suffix == ".bin":
        from megatron.data.indexed import IndexedDataset

        documents = IndexedDataset(path.with_suffix(""))
        ids = np.concatenate([documents[i] for i in range(len(documents))])
    else:
        raise ValueError(f"--tokens {path}: give a .npy of token ids, or the .bin of a dataset.")
    return TokenStream(name=path.name, ids=ids.astype(np.int64), separator_ids=tuple(separator_ids))


def mixed(sources: Sequence[TokenStream], *, target: float, piece: int = PIECE) -> TokenStream:
    """The sources in pieces, each taken from the one that brings the share of separators so far closest to ``target``.

    It ends where one of them has ended. ValueError where no mixture can have that share.
    """
    densities = [source.density() for source in sources]
    if not min(densities) <= target <= max(densities):
        known = ", ".join(f"{source.name} {density:.3f}" for source, density in zip(sources, densities, strict=True))
        raise ValueError(f"A share of {target} separators cannot be mixed of these texts ({known}): choose one between them, or give --tokens.")
    pieces = [source.ids[: len(source.ids) // piece * piece].reshape(-1, piece) for source in sources]
    flags = [source.is_separator()[: of_source.size].reshape(-1, piece) for source, of_source in zip(sources, pieces, strict=True)]
    counts = [of_source.sum(1).tolist() for of_source in flags]
    taken = [0] * len(sources)
    chosen: list[NDArray[np.int64]] = []
    separators = 0
    while all(place < len(of_source) for place, of_source in zip(taken, pieces, strict=True)):
        wanted = target * piece * (len(chosen) + 1) - separators
        best = min(range(len(sources)), key=lambda i: abs(counts[i][taken[i]] - wanted))
        chosen.append(pieces[best][taken[best]])
        separators += counts[best][taken[best]]
        taken[best] += 1
    return TokenStream(name=" + ".join(source.name for source in sources), ids=np.concatenate(chosen), separator_ids=sources[0].separator_ids)


def _apart(starts: Sequence[int], length: int, count: int) -> list[int]:
    """The first ``count`` starts whose stretches do not overlap; where the text is too short for that, the first at all."""
    chosen: list[int] = []
    for start in starts:
        if len(chosen) < count and all(abs(start - other) >= length for other in chosen):
            chosen.append(start)
    return chosen if len(chosen) == count else list(starts[:count])

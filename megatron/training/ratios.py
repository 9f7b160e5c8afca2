"""How sparse the attention of a batch is: the paper's Attn(%) and r.KV (arXiv 2412.12094, Table 3) as exact counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from sepllm.layout import TokenLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """Counts over layers and rows; add those of several batches.

    What was kept is counted where the layout is and may be a tensor without dimensions, so that only who reads a ratio waits for a device.
    """

    kept_pairs: int | Tensor = 0
    """(query, key) pairs that are computed."""
    causal_pairs: int = 0
    """Pairs of each query with every column up to its own."""
    kept_keys: int | Tensor = 0
    """Keys that the last query of each row reads."""
    keys: int = 0

    @classmethod
    def of(cls, layout: TokenLayout, *, layers: Iterable[int] | None = None) -> Ratios:
        """The counts of a forward pass, over all layers or these. Its queries may follow cached keys, and are then the only ones that count.

        Layers that share their ranges are counted once and multiplied. No device is waited for.
        """
        counted: dict[int, tuple[Tensor, Tensor]] = {}
        chosen = tuple(range(layout.pattern.num_layers) if layers is None else layers)
        pairs: int | Tensor = 0
        last: int | Tensor = 0
        for layer in chosen:
            ranges = layout.ranges(layer)
            if id(ranges) not in counted:
                reads = ranges.read_keys()
                counted[id(ranges)] = reads.sum(), reads[:, -1].sum()
            pairs, last = pairs + counted[id(ranges)][0], last + counted[id(ranges)][1]
        rows, length = layout.ids.shape
        causal = layout.num_queries * (2 * length - layout.num_queries + 1) // 2
        return cls(kept_pairs=pairs, causal_pairs=len(chosen) * rows * causal, kept_keys=last, keys=len(chosen) * rows * length)

    def __add__(self, other: Ratios) -> Ratios:
        return Ratios(
            kept_pairs=self.kept_pairs + other.kept_pairs,
            causal_pairs=self.causal_pairs + other.causal_pairs,
            kept_keys=self.kept_keys + other.kept_keys,
            keys=self.keys + other.keys,
        )

    @property
    def attention_map(self) -> float:
        """Kept pairs over causal pairs."""
        return int(self.kept_pairs) / max(self.causal_pairs, 1)

    @property
    def kv(self) -> float:
        """Keys the last query reads over all keys."""
        return int(self.kept_keys) / max(self.keys, 1)


class RatioReport:
    """Says both ratios, of the newest counts and of all so far, each time ``every`` more forward passes are over (`print_ratio_intervals`)."""

    def __init__(self, *, every: int, say: Callable[[str], None]) -> None:
        self._every = every
        self._say = say
        self._passes = 0
        self._so_far = Ratios()

    def note(self, newest: Ratios, *, passes: int, what: str) -> None:
        """``newest`` are the counts of so many forward passes; ``what`` they are together, in a word."""
        before = self._passes // self._every
        self._passes += passes
        self._so_far += newest
        if self._passes // self._every > before:
            self._say(
                f" kept/total of the KV: {newest.kv:.4f} in this {what}, {self._so_far.kv:.4f} so far |"
                f" kept/total of the attention map: {newest.attention_map:.4f} in this {what}, {self._so_far.attention_map:.4f} so far |"
            )

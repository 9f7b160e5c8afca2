"""How sparse the attention of a batch is: the paper's Attn(%) and r.KV (arXiv 2412.12094, Table 3) as exact counts."""

from __future__ import annotations

from dataclasses import dataclass

from sepllm.layout import TokenLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """Counts over all layers and rows; add those of several batches."""

    kept_pairs: int = 0
    """(query, key) pairs that are computed."""
    causal_pairs: int = 0
    kept_keys: int = 0
    """Keys that the last query of each row reads."""
    keys: int = 0

    @classmethod
    def of(cls, layout: TokenLayout) -> Ratios:
        """The counts of a training batch; layers that share their ranges are counted once and multiplied. No device is waited for
        while ``layout`` is on the CPU."""
        counted: dict[int, tuple[int, int]] = {}
        pairs = last = 0
        for layer in range(layout.pattern.num_layers):
            ranges = layout.ranges(layer)
            if id(ranges) not in counted:
                reads = ranges.read_keys()
                counted[id(ranges)] = int(reads.sum()), int(reads[:, -1].sum())
            pairs, last = pairs + counted[id(ranges)][0], last + counted[id(ranges)][1]
        rows, length = layout.ids.shape
        layers = layout.pattern.num_layers
        return cls(kept_pairs=pairs, causal_pairs=layers * rows * length * (length + 1) // 2, kept_keys=last, keys=layers * rows * length)

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
        return self.kept_pairs / max(self.causal_pairs, 1)

    @property
    def kv(self) -> float:
        """Keys the last query reads over all keys."""
        return self.kept_keys / max(self.keys, 1)

"""Which keys a query may read, as one frozen value. Standard library only, so that configuration code can use it without torch.

A query at position ``i`` reads a key at ``j <= i`` if ``j`` is one of the ``a`` initial tokens, or a separator, or ``i - j < n``
(SepLLM, arXiv 2412.12094, section 3). Every published mode is a choice of these three things:

    full attention    n >= sequence length
    StreamingLLM      no separators
    SepLLM            initial tokens, separators, window
    H, HT, HMT        a window per layer, some of them unbounded
    FixLLM            a fixed grid instead of separators
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

UNBOUNDED = 2**30
"""A window that covers any sequence: the layer is full causal attention."""
SEPARATORS = (".", ",", "?", "!", ";", ":", " ", "\t", "\n")
"""SepLLM's nine separators, in its order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standard:
    """The ordinary softmax."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfAdjust:
    """SA-softmax (arXiv 2502.18277): the weights are the softmax times the scores, normalised to [0, 1] or raw."""

    kind: Literal["normalised", "raw"]
    numerator_bias: float = 0.0
    denominator_bias: float = 1e-10
    extremes: Literal["read", "causal"] = "read"
    """Over which keys the minimum and the maximum run: those the query reads, or every causal one (the reference's reading)."""


Softmax = Standard | SelfAdjust


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPattern:
    """Initial tokens, separators and windows of all layers of a model.

    >>> pattern = AttentionPattern(initial_tokens=3, separator_ids=(13, 15), windows=(64,) * 12)
    >>> pattern.reads(query=100, key=40, key_id=13, layer=0)
    True
    """

    initial_tokens: int = 0
    """``a`` in the paper: how many first tokens of a text stay readable for ever."""
    separator_ids: frozenset[int] = field(default_factory=frozenset)
    """Token ids that stay readable for ever. Any iterable of ints is accepted."""
    windows: tuple[int, ...] = (UNBOUNDED,)
    """``n`` in the paper, one per layer: how many nearest keys a query reads, itself included."""
    intervals: tuple[int, ...] | None = None
    """FixLLM: per layer, every interval-th token after the initial ones stays readable. The first is ``a + interval - 1``."""
    sliding_width: int | None = None
    """Hard limit on everything: a query reads no key further back than this. None: no limit."""
    softmax: Softmax = Standard()
    padding_id: int | None = None
    """Without an attention mask, a leading run of this id is padding. None: every token is text."""
    reference_padding: bool = False
    """Read padding as the reference implementation does: initial tokens start after as many columns as there are
    `padding_id` tokens anywhere in the prompt (at column 0 when that is None), even on padding, and decoding sees padding."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "separator_ids", frozenset(self.separator_ids))
        object.__setattr__(self, "windows", tuple(self.windows))
        if self.initial_tokens < 0:
            raise ValueError(f"initial_tokens is {self.initial_tokens}: it counts tokens and must be 0 or more.")
        if not self.windows or min(self.windows) < 1:
            raise ValueError(f"windows is {self.windows}: give one window of at least 1 (the query itself) per layer.")
        if min(self.separator_ids, default=0) < 0:
            raise ValueError(f"separator_ids holds {min(self.separator_ids)}: token ids are 0 or more; leave it empty for no separators.")
        if self.intervals is not None:
            object.__setattr__(self, "intervals", tuple(self.intervals))
            if len(self.intervals) != len(self.windows) or min(self.intervals) < 1:
                raise ValueError(f"intervals is {self.intervals}: give one interval of at least 1 for each of the {len(self.windows)} layers.")

    @classmethod
    def full(cls, num_layers: int) -> AttentionPattern:
        """Full causal attention in every layer."""
        return cls(windows=(UNBOUNDED,) * num_layers)

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @property
    def has_far_keys(self) -> bool:
        """Whether any text can hold a key that every later query may read."""
        return self.initial_tokens > 0 or bool(self.separator_ids) or self.intervals is not None

    @property
    def looks_at_ids(self) -> bool:
        """Whether it depends on token ids what is read: on those of separators, or of padding."""
        return bool(self.separator_ids) or self.padding_id is not None

    def is_full(self, sequence_length: int, *, layer: int | None = None) -> bool:
        """Whether the layer (or every layer) is plain causal attention at this sequence length."""
        if self.sliding_width is not None and self.sliding_width < sequence_length - 1:
            return False
        windows: Iterable[int] = self.windows if layer is None else (self.windows[layer],)
        return all(window >= sequence_length for window in windows)

    def reads(self, *, query: int, key: int, key_id: int, layer: int = 0) -> bool:
        """The definition itself, for one pair of an unpadded text. Everything else in this project is a faster way to say it."""
        if key > query or (self.sliding_width is not None and query - key > self.sliding_width):
            return False
        return self.is_far(key, key_id=key_id, layer=layer) or query - key < self.windows[layer]

    def is_far(self, key: int, *, key_id: int, layer: int = 0) -> bool:
        """Whether every later query may read this key of an unpadded text, `sliding_width` aside."""
        on_grid = self.intervals is not None and key >= self.initial_tokens and (key - self.initial_tokens + 1) % self.intervals[layer] == 0
        return key < self.initial_tokens or key_id in self.separator_ids or on_grid

    def widened(self, extra: int) -> AttentionPattern:
        """The same pattern with every window ``extra`` keys longer."""
        return replace(self, windows=tuple(min(window + extra, UNBOUNDED) for window in self.windows))

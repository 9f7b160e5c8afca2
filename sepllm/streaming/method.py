"""Which tokens of an endless text stay: all of them, the first and the newest, or these and the separators between.

vanilla         everything, at its position in the text
streamingllm    initial | newest                    a + w = c: one token leaves for each that comes
sepllm          initial | separators | newest       a + s + w < c: grows to c, then keeps a + s + w
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sepllm.cache import CacheBudget, When
from sepllm.hf.cache import SepCache

MethodName = Literal["vanilla", "streamingllm", "sepllm"]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
ENDLESS = 2**40
"""Tokens that no text has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to keep a cache small, or not."""

    name: MethodName
    initial: int
    """``a`` in the paper."""
    separators: int
    """``s``"""
    local: int
    """``w``"""
    total: int
    """``c``: once more than this are stored, tokens are dropped."""
    shifts_positions: bool
    """Positions count the tokens stored. False: new tokens are told that number, but stored keys keep the one that they came with."""
    separator_ids: tuple[int, ...]

    @classmethod
    def vanilla(cls) -> Method:
        """Full attention: nothing is dropped."""
        return cls(name="vanilla", initial=0, separators=0, local=ENDLESS, total=ENDLESS, shifts_positions=False, separator_ids=())

    @classmethod
    def streamingllm(cls, *, initial: int, total: int, shifts_positions: bool = True) -> Method:
        """The first tokens and the newest, ``total`` together (arXiv 2309.17453)."""
        if not 0 <= initial < total:
            raise ValueError(f"init_cache_size is {initial} and cache_size {total}: StreamingLLM keeps both the first tokens and newer ones.")
        return cls(
            name="streamingllm",
            initial=initial,
            separators=0,
            local=total - initial,
            total=total,
            shifts_positions=shifts_positions,
            separator_ids=(),
        )

    @classmethod
    def sepllm(
        cls, *, initial: int, separators: int, local: int, total: int, separator_ids: tuple[int, ...], shifts_positions: bool = True
    ) -> Method:
        """The first tokens, the newest separators and the newest tokens."""
        if separators < 1:
            raise ValueError(f"sep_cache_size is {separators}: SepLLM keeps separators, give 1 or more, or use the method streamingllm.")
        CacheBudget(initial=initial, separators=separators, local=local, total=total)
        return cls(
            name="sepllm",
            initial=initial,
            separators=separators,
            local=local,
            total=total,
            shifts_positions=shifts_positions,
            separator_ids=separator_ids,
        )


class StreamCache(SepCache):
    """The keys of one endless text. Tokens are dropped after the newest one has read, once more than c are stored.

    A SepCache drops before a token reads, when it makes c; and so stores one token less.
    """

    def __init__(self, method: Method, *, num_layers: int) -> None:
        super().__init__(
            init_cache_size=method.initial,
            sep_cache_size=method.separators,
            local_size=method.local,
            cache_size=method.total + 1,
            USE_MAX_SEP_CACHE=True,
            APPLY_PE_SHIFT=method.shifts_positions,
            separator_token_ids=method.separator_ids,
            PADDING_ID=-1,
            layer_num=num_layers,
        )

    def num_stored(self) -> int:
        """Tokens whose keys are held, counted on the keys."""
        return self.get_usable_length()

    def num_stored_bytes(self) -> int:
        """Of these keys and values, in all layers."""
        return sum(tensor.nbytes for tensor in (*self.key_cache, *self.value_cache))

    def num_allocated_bytes(self) -> int:
        """Of the tensors that hold them, room for more included."""
        return sum(layer.num_allocated_bytes for layer in self.layers)

    def _when(self, length: int, *, is_first: bool, prefilling: bool | None) -> When:
        return "after reading"

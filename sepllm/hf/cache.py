"""SepCache (arXiv 2412.12094): a transformers cache that keeps the initial tokens, the separators and the newest tokens, and no more.

`sepllm.cache` says which tokens stay; this file holds their keys and values, and the interface of the reference implementation. Layers
with equal budgets hold the same tokens, so these are worked out once for all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils import logging

from sepllm.cache import CacheBudget, CachePolicy, HistoryState, Policy, ReferencePolicy, Step, StoredTokens, TokenHistory, When
from sepllm.hf.separators import Separators, preset, separators_of
from sepllm.layout import KeyRanges
from sepllm.positions import apply_rotary_once_more, rotary_table

logger = logging.get_logger(__name__)

Sizes = int | Sequence[int]
"""One number for all layers, or one for each."""


Table = tuple[Tensor, Tensor]
"""Cosines and sines ``[B, S, R]``, as `apply_rotary` takes them."""


class LayerState(TypedDict):
    """What `SepLayer.restore` needs."""

    keys: Tensor
    values: Tensor
    capacities: tuple[int, int]
    num_columns: int


class CacheState(TypedDict):
    """What `SepCache.restore` needs."""

    histories: list[HistoryState]
    layers: list[LayerState]


class KeyBuffer:
    """Keys or values ``[B, K, S, H]`` at the front of a larger tensor, so that adding a token writes that token only."""

    __slots__ = ("storage", "width")

    def __init__(self) -> None:
        self.storage: Tensor | None = None
        self.width = 0

    def append(self, new: Tensor, *, limit: int) -> Tensor:
        """All keys after ``new [B, K, T, H]`` joined them. ``limit``: how many there will be before some are dropped."""
        end = self.width + new.shape[2]
        if self.storage is None or self.storage.shape[2] < end:
            capacity = end + min(max(limit - end, 64), max(end, 64))
            grown = new.new_empty(new.shape[0], new.shape[1], capacity, new.shape[3])
            if self.storage is not None:
                grown.narrow(2, 0, self.width).copy_(self.held())
            self.storage = grown
        self.storage.narrow(2, self.width, new.shape[2]).copy_(new)
        self.width = end
        return self.held()

    def held(self) -> Tensor:
        """All keys."""
        assert self.storage is not None
        return self.storage.narrow(2, 0, self.width)

    def keep(self, source: Tensor, *, limit: int, in_place: bool) -> Tensor:
        """The keys of the columns ``source [B, S']`` only. Not ``in_place``: what `append` returned stays as it is."""
        assert self.storage is not None
        if len(source) == 1:
            kept = self.storage.index_select(2, source[0])
        else:
            kept = self.storage.take_along_dim(source[:, None, :, None], 2)
        self.width = 0
        if not in_place or self.storage.shape[2] > 2 * max(limit, kept.shape[2]):
            self.storage = None
        return self.append(kept, limit=limit)

    def state(self) -> tuple[Tensor, int]:
        """A copy of the keys, and how many there is room for."""
        assert self.storage is not None
        return self.held().clone(), self.storage.shape[2]

    def restore(self, held: Tensor, capacity: int) -> Tensor:
        """The keys ``held``, in a tensor with as much room as before, since where keys lie may decide how a kernel rounds."""
        self.storage, self.width = held.new_empty(held.shape[0], held.shape[1], capacity, held.shape[3]), 0
        return self.append(held, limit=capacity)

    def select(self, rows: Tensor) -> None:
        if self.storage is not None:
            self.storage = self.storage.index_select(0, rows.to(self.storage.device))


class TurnTable:
    """By how much the stored keys are to be turned, worked out once for each column: a token that joins moves no other's slot."""

    def __init__(self) -> None:
        self._first: Tensor | None = None
        self._cos, self._sin = KeyBuffer(), KeyBuffer()

    def of(self, reads: StoredTokens, make: Callable[[Tensor], Table], *, limit: int) -> Table:
        """For all columns of ``reads``. Those of the latest call are known if rows still begin where they did then, which a compression changes."""
        if self._first is not reads.first:
            self._first, self._cos, self._sin = reads.first, KeyBuffer(), KeyBuffer()
        start = self._cos.width
        cos, sin = make(reads.slots(start) - reads.positions[:, start:])
        return self._cos.append(cos[:, None], limit=limit)[:, 0], self._sin.append(sin[:, None], limit=limit)[:, 0]


class SepLayer(CacheLayerMixin):
    """Keys and values of one layer; its history says of which tokens."""

    is_compileable = False
    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, history: TokenHistory) -> None:
        super().__init__()
        self.keys: Tensor | None
        self.values: Tensor | None
        self.history = history
        self.num_columns = 0
        """Columns that ever came to this layer."""
        self._keys, self._values = KeyBuffer(), KeyBuffer()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, K, S, H]`` that the new tokens may read, theirs included."""
        step = self.history.step
        assert step is not None
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.num_columns += step.num_new
        read = self.keys, self.values = self._keys.append(key_states, limit=step.limit), self._values.append(value_states, limit=step.limit)
        if step.source is None:
            return read
        in_place, source = step.compresses == "before reading", step.source.to(key_states.device)
        self.keys = self._keys.keep(source, limit=step.limit, in_place=in_place)
        self.values = self._values.keep(source, limit=step.limit, in_place=in_place)
        return (self.keys, self.values) if in_place else read

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_usable_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.num_columns

    def get_usable_length(self) -> int:
        """Columns stored."""
        return self._keys.width

    def get_max_length(self) -> int:
        return -1

    def select(self, rows: Tensor) -> None:
        self._keys.select(rows)
        self._values.select(rows)
        if self._keys.storage is not None and self._values.storage is not None:
            self.keys, self.values = self._keys.held(), self._values.held()

    def state(self) -> LayerState:
        (keys, for_keys), (values, for_values) = self._keys.state(), self._values.state()
        return LayerState(keys=keys, values=values, capacities=(for_keys, for_values), num_columns=self.num_columns)

    def restore(self, state: LayerState, device: torch.device | str) -> None:
        keys, values = state["keys"].to(device), state["values"].to(device)
        self.lazy_initialization(keys, values)
        for_keys, for_values = state["capacities"]
        self.keys, self.values = self._keys.restore(keys, for_keys), self._values.restore(values, for_values)
        self.num_columns = state["num_columns"]

    @property
    def num_allocated_bytes(self) -> int:
        """Of the tensors behind keys and values, room for more included."""
        return sum(buffer.storage.nbytes for buffer in (self._keys, self._values) if buffer.storage is not None)

    def reset(self) -> None:
        self._keys, self._values = KeyBuffer(), KeyBuffer()
        self.keys = self.values = None
        self.is_initialized, self.num_columns = False, 0

    def offload(self) -> None:
        raise ValueError("SepCache stays small on its device: offloading is not supported.")


class SepCache(Cache):
    """Keys and values of the initial tokens, the separators and the newest tokens of each row.

    The arguments are those of the reference implementation; sizes are one number, or a list with one per layer.

    >>> cache = SepCache(init_cache_size=4, sep_cache_size=128, local_size=256, cache_size=512, layer_num=32, USE_MAX_SEP_CACHE=True,
    ...                  model_type="llama")

    In a model of transformers, `sepllm.hf.attach(model)` hands it the token ids. Without, `update` wants ``input_ids``.
    """

    def __init__(
        self,
        init_cache_size: Sizes = 4,
        sep_cache_size: Sizes = 64,
        local_size: Sizes = 256,
        cache_size: Sizes = 512,
        SEP_ACCUMULATION: bool = True,
        USE_MAX_SEP_CACHE: bool = False,
        SEP_PADDING_IN_BATCH: bool = False,
        separator_token_ids: Iterable[int] | None = None,
        PADDING_ID: int | None = None,
        past_tok_ids: Sequence[Tensor] | None = None,
        key_cache: Sequence[Tensor] | None = None,
        value_cache: Sequence[Tensor] | None = None,
        PRINT_KV_RATIO_INSIDE: bool = False,
        print_KV_inside_per_steps: int = 1000,
        _seen_tokens: int = 0,
        _kept_kv_ratio: Sequence[tuple[int, int]] | None = None,
        APPLY_PE_SHIFT: bool = False,
        APPLY_PES_INSIDE: bool = True,
        _shifted_position_ids: Sequence[Tensor] | None = None,
        _rope_unsqueeze_dim: int = 1,
        _rope_seq_dim: int = 1,
        pe_scaling_factor: float = 1.0,
        pe_dim: int = 128,
        max_position_embeddings: int = 8192,
        base: float = 10000,
        k_seq_dim: int = 2,
        v_seq_dim: int = 2,
        layer_num: int | None = None,
        model_type: str | None = None,
        device: torch.device | str | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        compress_prefill: bool = False,
        reference_compat: bool = False,
    ) -> None:
        """``init_cache_size``, ``sep_cache_size``, ``local_size``, ``cache_size``: a, s, w, c in the paper, with a + s + w < c.

        ``USE_MAX_SEP_CACHE``: keep the newest s separators; otherwise all, and s and c grow with them. ``SEP_ACCUMULATION`` off: only those that
        the latest compression found. Separators and padding id are given, or follow from ``model_type`` or ``tokenizer``.

        ``APPLY_PE_SHIFT``: positions count the tokens stored instead of the text, from angles in fp32; ``APPLY_PES_INSIDE`` off: by the cosines
        and sines in ``cache_kwargs``. ``pe_dim`` and ``base`` are those of the model's rotary embeddings (attached models know their own).
        ``pe_scaling_factor``, ``max_position_embeddings`` and ``device`` change nothing, as in the reference.

        ``compress_prefill``: a prompt longer than c is compressed once it was read, not when the next token comes. ``reference_compat``: the
        reference's own reading of batches (`sepllm.cache.ReferencePolicy`); only there does ``SEP_PADDING_IN_BATCH`` matter.
        """
        if layer_num is None or layer_num < 1:
            raise ValueError(f"layer_num is {layer_num}: give the number of layers of the model.")
        if reference_compat and compress_prefill:
            raise ValueError("reference_compat and compress_prefill are both set: the reference never compresses a prompt, leave one of them out.")
        if _rope_unsqueeze_dim not in (1, 2) or _rope_seq_dim not in (0, 1, 2) or k_seq_dim not in (1, 2, 3) or v_seq_dim not in (1, 2, 3):
            raise ValueError("k_seq_dim and v_seq_dim are 1, 2 or 3, _rope_unsqueeze_dim 1 or 2, _rope_seq_dim 0, 1 or 2: the axes of 4-d tensors.")
        known = _separators(separator_token_ids, PADDING_ID, model_type, tokenizer)
        budgets = _budgets(init_cache_size, sep_cache_size, local_size, cache_size, layer_num)
        self.padding_id = known.padding_id
        self.compress_prefill, self.reference_compat = compress_prefill, reference_compat
        self.shifts_positions, self.shifts_inside = APPLY_PE_SHIFT, APPLY_PES_INSIDE
        self.pe_dim, self.rope_base = pe_dim, float(base)
        self._rope_unsqueeze_dim, self._rope_seq_dim = _rope_unsqueeze_dim, _rope_seq_dim
        self._k_seq_dim, self._v_seq_dim = k_seq_dim, v_seq_dim
        self._steps_between_reports = print_KV_inside_per_steps if PRINT_KV_RATIO_INSIDE else None
        self._num_updates = 0
        self._is_handed = False
        self._positions: dict[int, Tensor] = dict(enumerate(_shifted_position_ids or ()))
        self._turns: dict[tuple[int, torch.device], TurnTable] = {}
        self._slot_tables: dict[tuple[object, ...], tuple[Step, Table]] = {}
        """And the step that each is of."""

        def policy(budget: CacheBudget) -> Policy:
            ids = frozenset(known.ids)
            if reference_compat:
                return ReferencePolicy(
                    budget=budget,
                    separator_ids=ids,
                    padding_id=known.padding_id,
                    accumulates=SEP_ACCUMULATION,
                    is_bounded=USE_MAX_SEP_CACHE,
                    fills_rows=SEP_PADDING_IN_BATCH,
                )
            return CachePolicy(budget=budget, separator_ids=ids, accumulates=SEP_ACCUMULATION, is_bounded=USE_MAX_SEP_CACHE)

        histories = {budget: TokenHistory(policy=policy(budget)) for budget in dict.fromkeys(budgets)}
        self.histories = list(histories.values())
        """One for each budget; that of the first layer first."""
        super().__init__(layers=[SepLayer(histories[budget]) for budget in budgets])
        self._resume(past_tok_ids, key_cache, value_cache, _seen_tokens, _kept_kv_ratio)

    @classmethod
    def from_legacy_cache(cls, past_key_values: object = None, **kwargs: Any) -> SepCache:
        """Deprecated: the same as calling the class. ``past_key_values`` must be None or empty."""
        warnings.warn("SepCache.from_legacy_cache is deprecated: call SepCache(...).", FutureWarning, stacklevel=2)
        if past_key_values:
            raise ValueError("from_legacy_cache takes no past_key_values: resume with past_tok_ids, key_cache and value_cache of SepCache(...).")
        return cls(**kwargs)

    def to_legacy_cache(self) -> tuple[tuple[Tensor, Tensor, Tensor, int], ...]:
        """Deprecated: keys, values, token ids and the number of tokens seen, of every layer."""
        warnings.warn("SepCache.to_legacy_cache is deprecated: read key_cache, value_cache and past_tok_ids.", FutureWarning, stacklevel=2)
        seen = self.get_seq_length()
        return tuple((k, v, ids, seen) for k, v, ids in zip(self.key_cache, self.value_cache, self.past_tok_ids, strict=True))

    @property
    def key_cache(self) -> list[Tensor]:
        """Stored keys of each layer that has any, as they were given: not shifted, in their own layout."""
        return [_swapped(layer.keys, self._k_seq_dim) for layer in self.layers if layer.keys is not None]

    @property
    def value_cache(self) -> list[Tensor]:
        """Stored values of each layer that has any."""
        return [_swapped(layer.values, self._v_seq_dim) for layer in self.layers if layer.values is not None]

    @property
    def past_tok_ids(self) -> list[Tensor]:
        """Ids of the stored tokens, ``[B, S]`` for each layer that has any."""
        return [layer.history.stored.ids for layer in self.layers if layer.keys is not None and layer.history.stored is not None]

    def key_mask(self, layer_idx: int = 0) -> Tensor:
        """Which columns that the latest `update` of a layer returned hold a token of their row. ``[B, S]`` bool

        In a batch, rows may hold fewer tokens than there are columns; who calls `update` must not read the others.
        """
        step = self.layers[layer_idx].history.step
        if step is None:
            raise ValueError("The cache is empty: call update first.")
        return step.reads.places >= 0

    def kv_ratio(self) -> float:
        """Tokens stored over tokens seen, both added up over all steps, rows and layers: the paper's r.KV as a fraction."""
        return sum(layer.history.kept_sum for layer in self.layers) / max(1, sum(layer.history.seen_sum for layer in self.layers))

    def get_usable_length(self, layer_idx: int = 0) -> int:
        """Columns that a layer stores."""
        return self.layers[layer_idx].get_usable_length()

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int | None = None,
        input_ids: Tensor | None = None,
        PREFILLING_FLAG: bool | None = None,
        query_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache_kwargs: dict[str, object] | None = None,
    ) -> tuple[Tensor, ...]:
        """Keys and values that the new tokens may read, theirs included; then the queries, if they were given.

        ``key_states``, ``value_states`` ``[B, K, T, H]`` (or with the tokens on ``k_seq_dim``, ``v_seq_dim``); ``input_ids [B, T]``, padding on
        the left: what ``attention_mask [B, T]`` in ``cache_kwargs`` says, else a leading run of ``PADDING_ID``. ``PREFILLING_FLAG`` (by default: an
        empty cache, or more than one token) keeps everything; a single token that follows may first compress what is stored.

        With ``APPLY_PE_SHIFT`` keys and ``query_states`` come without rotary embeddings, ``position_ids`` with them, and keys and queries are
        returned rotated by their slots in the cache.
        """
        options = dict(cache_kwargs or {})
        ids = input_ids if input_ids is not None else options.get("input_ids")
        if layer_idx is None:
            raise ValueError("update needs layer_idx, the number of the layer whose keys these are.")
        keys, values = _swapped(key_states, self._k_seq_dim), _swapped(value_states, self._v_seq_dim)
        layer = self.layers[layer_idx]
        if not self._is_handed:
            mask = options.get("attention_mask")
            self._advance(layer, keys, _tensor_or_none(ids), _tensor_or_none(mask), PREFILLING_FLAG)
        self._check_turn(layer, layer_idx, keys)
        keys, values = layer.update(keys, values)
        self._report()
        keys, values = _swapped(keys, self._k_seq_dim), _swapped(values, self._v_seq_dim)
        if self.shifts_positions and not self._is_handed:
            return self._shifted(keys, values, query_states, position_ids, layer_idx, options)
        return (keys, values) if query_states is None else (keys, values, query_states)

    def begin_pass(self, input_ids: Tensor, *, attention_mask: Tensor | None = None) -> Tensor | None:
        """Hands over the tokens of a forward pass, before any layer calls `update`; `end_pass` follows it.

        ``attention_mask [B, P + T]`` as models take it. Returns the positions ``[B, T]`` that the model must use, which are slots where
        positions are shifted; None where it may use its own.
        """
        first = self.histories[0]
        is_text = self._text_columns(input_ids, attention_mask, pads_by_id=False)
        slots = _next_slots(first.stored, input_ids, is_text) if self.shifts_positions else None
        compresses = self._when(input_ids.shape[1], is_first=first.stored is None, prefilling=None)
        for history in self.histories:
            history.advance(input_ids, is_text=is_text, positions=slots, compresses=compresses)
        self._is_handed = True
        return slots

    def check_fits(self, num_layers: int, *, has_sliding_window: bool) -> None:
        """ValueError where this cache cannot serve a model of so many layers."""
        if len(self.layers) != num_layers:
            raise ValueError(f"SepCache was made for layer_num {len(self.layers)}, but the model has {num_layers} layers.")
        if self.reference_compat and has_sliding_window:
            raise ValueError("reference_compat is set, and this model has a sliding window, of which the reference knows nothing: leave it out.")
        if self.shifts_positions and (not self.shifts_inside or self.reference_compat):
            raise ValueError("In a model positions are shifted inside, the right way: leave APPLY_PES_INSIDE on and reference_compat off.")

    def pass_group(self, layer_idx: int) -> int:
        """A number that layers share which store the same tokens, and so read the same."""
        return id(self.layers[layer_idx].history)

    def pass_ranges(self, layer_idx: int, *, sliding_width: int | None = None) -> KeyRanges:
        """What the tokens of this pass read in a layer: all that is stored, ``sliding_width`` aside."""
        return self._step(layer_idx).ranges(sliding_width=sliding_width)

    def pass_places(self) -> Tensor:
        """The place of each token of this pass in its text; 0 for padding. ``[B, T]`` int64"""
        step = self._step(0)
        return step.reads.places[:, step.reads.width - step.num_new :].clamp(min=0)

    def pass_turns(self, layer_idx: int, make: Callable[[Tensor], Table]) -> Table | None:
        """From the position that each stored key was rotated to, to its slot; None where these are equal.

        Asked for after the layer's `update`. ``make``: cosines and sines of positions ``[B, T]`` int64, which are on the device of the layer's keys.
        """
        step = self._step(layer_idx)
        if not self.shifts_positions or step.is_first or not any(history.has_compressed for history in self.histories):
            return None
        device = self.layers[layer_idx].device
        table = self._turns.setdefault((self.pass_group(layer_idx), device), TurnTable())
        return table.of(step.reads, lambda turns: make(turns.to(device)), limit=step.limit)

    def _step(self, layer_idx: int) -> Step:
        step = self.layers[layer_idx].history.step
        assert step is not None
        return step

    def end_pass(self) -> None:
        """The forward pass is over."""
        self._is_handed = False

    def state(self) -> CacheState:
        """Everything that is stored, for `restore` in a cache of the same arguments: tensors, numbers, lists, tuples and dictionaries."""
        return CacheState(histories=[history.state() for history in self.histories], layers=[layer.state() for layer in self.layers])

    def restore(self, state: CacheState, device: torch.device | str) -> None:
        """As it was when `state` was called, on a device: what follows is computed alike, bit for bit."""
        for history, of_history in zip(self.histories, state["histories"], strict=True):
            history.restore(of_history, device)
        for layer, of_layer in zip(self.layers, state["layers"], strict=True):
            layer.restore(of_layer, device)

    def reset(self) -> None:
        super().reset()
        for history in self.histories:
            history.reset()
        self._positions.clear()
        self._turns.clear()
        self._slot_tables.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order; rows may repeat."""
        for history in self.histories:
            history.select(beam_idx)
        for layer in self.layers:
            layer.select(beam_idx)
        self._positions = {layer: positions.index_select(0, beam_idx.to(positions.device)) for layer, positions in self._positions.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(torch.arange(self._num_rows(), device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self._num_rows()).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Only of nothing: keys that were dropped cannot come back."""
        if tokens_to_remove:
            raise ValueError("SepCache cannot be cropped: the keys it dropped cannot come back. Use a DynamicCache where tokens are taken back.")

    def activate_past_recording(self) -> None:
        raise ValueError(
            "Assisted decoding takes rejected tokens back, and SepCache has dropped the keys that it would need: generate without an assistant "
            "or prompt lookup, or with a DynamicCache."
        )

    def __repr__(self) -> str:
        return f"SepCache(layers={len(self.layers)}, seen={self.get_seq_length()}, stored={self.get_usable_length()})"

    def _num_rows(self) -> int:
        stored = self.histories[0].stored
        return 0 if stored is None else stored.num_rows

    def _advance(self, layer: SepLayer, keys: Tensor, ids: Tensor | None, mask: Tensor | None, prefilling: bool | None) -> None:
        """Tells the layer's history of the new tokens, unless another layer did so already."""
        if ids is None:
            raise ValueError(
                "SepCache needs the token ids of the keys. In a model, call sepllm.hf.attach(model) first, which hands them over; elsewhere give "
                "update(..., input_ids=...)."
            )
        if ids.shape != (keys.shape[0], keys.shape[2]):
            raise ValueError(f"input_ids has shape {tuple(ids.shape)} but there are keys of {keys.shape[0]} rows of {keys.shape[2]} tokens.")
        history = layer.history
        if layer.num_columns != history.num_columns:
            return
        is_text = self._text_columns(ids, mask, pads_by_id=True, stored=history.stored)
        compresses = self._when(ids.shape[1], is_first=history.stored is None, prefilling=prefilling)
        history.advance(ids, is_text=is_text, positions=None, compresses=compresses)

    def _check_turn(self, layer: SepLayer, layer_idx: int, keys: Tensor) -> None:
        step = layer.history.step
        if step is None or keys.shape[2] != step.num_new or layer.num_columns + step.num_new != layer.history.num_columns:
            raise ValueError(
                f"Layer {layer_idx} was given {keys.shape[2]} tokens after {layer.num_columns}, but its turn is at "
                f"{layer.history.num_columns}: every layer must be updated once with every token."
            )

    def _when(self, length: int, *, is_first: bool, prefilling: bool | None) -> When:
        """Whether and when ``length`` new tokens lead to a compression."""
        if length == 1 and not (is_first if prefilling is None else prefilling):
            return "before reading"
        return "after reading" if self.compress_prefill or (prefilling is False and not self.reference_compat) else "never"

    def _text_columns(self, ids: Tensor, mask: Tensor | None, *, pads_by_id: bool, stored: StoredTokens | None = None) -> Tensor | None:
        """``[B, T]`` bool, or None if all new tokens are text. Looks at tensors only while a row may still begin with padding."""
        stored = stored or self.histories[0].stored
        if (ids.shape[1] == 1 and stored is not None and stored.has_text_in_every_row) or (mask is None and not pads_by_id):
            return None
        had_text = torch.zeros(len(ids), dtype=torch.bool) if stored is None else stored.counts > 0
        has_text = had_text.to(ids.device)[:, None]
        if mask is None:
            is_text = (ids != self.padding_id).cummax(1).values | has_text
        else:
            is_text = _checked(mask, ids, has_text)
        return None if bool(is_text.all()) else is_text

    def _shifted(
        self,
        keys: Tensor,
        values: Tensor,
        queries: Tensor | None,
        position_ids: Tensor | None,
        layer_idx: int,
        options: dict[str, object],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and queries rotated by their slots. What is stored stays as it came."""
        if queries is None or position_ids is None:
            raise ValueError("APPLY_PE_SHIFT is set: update needs query_states and position_ids.")
        step = self.layers[layer_idx].history.step
        assert step is not None
        size = options.get("partial_rotation_size")
        assert size is None or isinstance(size, int)
        if not self.shifts_inside:
            return self._shifted_outside(keys, values, queries, size, options)
        dims = _swapped(keys, self._k_seq_dim).shape[3] if size is None else size
        if dims != self.pe_dim:
            raise ValueError(
                f"pe_dim is {self.pe_dim} but {dims} dimensions are to be rotated: set pe_dim to the head size, or partial_rotation_size."
            )
        cos, sin = self._slot_table(step, position_ids, layer_idx, dims=dims, like=keys)
        first = cos.shape[1] - step.num_new

        def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            x_BSKH = _swapped(x, self._k_seq_dim).transpose(1, 2)
            return _swapped(apply_rotary_once_more(x_BSKH, cos, sin).transpose(1, 2), self._k_seq_dim)

        return turned(keys, cos, sin), values, turned(queries, cos[:, first:], sin[:, first:])

    def _slot_table(self, step: Step, position_ids: Tensor, layer_idx: int, *, dims: int, like: Tensor) -> Table:
        """Of each stored token's position. Layers that store the same share one, the reference's aside, which counts in each layer."""
        kind = self.pass_group(layer_idx), dims, like.dtype, like.device
        known = self._slot_tables.get(kind)
        if known is None or known[0] is not step or self.reference_compat:
            slots = self._slots(step, position_ids, layer_idx).to(like.device)
            known = self._slot_tables[kind] = step, rotary_table(slots, rotary_dims=dims, base=self.rope_base, dtype=like.dtype)
        return known[1]

    def _slots(self, step: Step, position_ids: Tensor, layer_idx: int) -> Tensor:
        """Position of each stored token. ``[B, S]`` int64"""
        if not self.reference_compat:
            return step.reads.slots()
        width, known = step.reads.width, self._positions.get(layer_idx)
        if known is None:
            known = position_ids.expand(step.reads.num_rows, -1)
        if known.shape[1] < width:
            more = torch.arange(1, width - known.shape[1] + 1, device=known.device)
            known = torch.cat([known, known[:, -1:] + more], 1)
        self._positions[layer_idx] = known
        return known[:, :width]

    def _shifted_outside(
        self, keys: Tensor, values: Tensor, queries: Tensor, size: int | None, options: dict[str, object]
    ) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = _tensor_or_none(options.get("cos")), _tensor_or_none(options.get("sin"))
        if cos is None or sin is None:
            raise ValueError("APPLY_PES_INSIDE is off: give cos and sin of the slots in cache_kwargs.")
        if self._k_seq_dim == 3:
            raise ValueError("APPLY_PES_INSIDE is off and k_seq_dim is 3: rotation needs the head size last, use k_seq_dim 1 or 2.")
        width, length = keys.shape[self._k_seq_dim], queries.shape[self._k_seq_dim]
        if cos.shape[self._rope_seq_dim] < width:
            raise ValueError(f"cos and sin have {cos.shape[self._rope_seq_dim]} positions, but {width} keys are stored: give at least as many.")

        def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            dims = x.shape[-1] if size is None else size
            first, second = x[..., :dims].chunk(2, -1)
            cos, sin = cos.unsqueeze(self._rope_unsqueeze_dim), sin.unsqueeze(self._rope_unsqueeze_dim)
            return torch.cat([x[..., :dims] * cos + torch.cat([-second, first], -1) * sin, x[..., dims:]], -1)

        def of_queries(name: str, whole: Tensor) -> Tensor:
            given = _tensor_or_none(options.get(name))
            return whole.narrow(self._rope_seq_dim, width - length, length) if given is None else given

        of_keys = [table.narrow(self._rope_seq_dim, 0, width) for table in (cos, sin)]
        return turned(keys, *of_keys), values, turned(queries, of_queries("cos_q", cos), of_queries("sin_q", sin))

    def _report(self) -> None:
        self._num_updates += 1
        every = self._steps_between_reports
        if every is not None and self._num_updates % (every * len(self.layers)) == 0:
            logger.warning(f"SepCache stores {self.kv_ratio():.2%} of the keys ({self.get_usable_length()} of {self.get_seq_length()} now).")

    def _resume(
        self,
        ids: Sequence[Tensor] | None,
        keys: Sequence[Tensor] | None,
        values: Sequence[Tensor] | None,
        seen: int,
        ratios: Sequence[tuple[int, int]] | None,
    ) -> None:
        """Begin with stored tokens: the newest of ``seen``."""
        if not (ids or keys or values):
            return
        if not (ids and keys and values) or not len(ids) == len(keys) == len(values) == len(self.layers):
            raise ValueError(
                f"To resume, past_tok_ids, key_cache and value_cache must each hold one tensor for each of the {len(self.layers)} layers."
            )
        for number, (layer, *given) in enumerate(zip(self.layers, ids, keys, values, strict=True)):
            if layer.history.stored is None:
                self._advance(layer, _swapped(given[1], self._k_seq_dim), given[0], None, True)
                _place_at_end(layer.history, seen)
            layer.num_columns = layer.history.num_columns - given[0].shape[1]
            layer.update(_swapped(given[1], self._k_seq_dim), _swapped(given[2], self._v_seq_dim))
            if ratios is not None:
                layer.history.kept_sum, layer.history.seen_sum = ratios[number]


def _place_at_end(history: TokenHistory, seen: int) -> None:
    """Takes the stored tokens, initial ones aside, for the newest of ``seen``."""
    stored, initial = history.stored, history.policy.budget.initial
    assert stored is not None
    dropped = max(0, seen - stored.width)
    columns = torch.stack([stored.ids, stored.places + dropped * (stored.places >= initial), stored.positions])
    history.stored = replace(stored, columns=columns, sizes=replace(stored.sizes, dropped=stored.sizes.dropped + dropped))
    history.num_columns += dropped


def _separators(ids: Iterable[int] | None, padding_id: int | None, model_type: str | None, tokenizer: PreTrainedTokenizerBase | None) -> Separators:
    """What is given, the rest from the tokenizer or the family of models."""
    if ids is not None and padding_id is not None:
        return Separators(tuple(frozenset(ids) - {-1}), padding_id)
    if tokenizer is None and model_type is None:
        raise ValueError("Which tokens separate is not known: give separator_token_ids and PADDING_ID, or model_type, or tokenizer.")
    known = preset(model_type or "") if tokenizer is None else separators_of(tokenizer)
    return Separators(
        known.ids if ids is None else tuple(frozenset(ids) - {-1}),
        known.padding_id if padding_id is None else padding_id,
    )


def _budgets(initial: Sizes, separators: Sizes, local: Sizes, total: Sizes, num_layers: int) -> list[CacheBudget]:
    """The budget of each layer."""

    def each(name: str, sizes: Sizes) -> Sequence[int]:
        sizes = [sizes] * num_layers if isinstance(sizes, int) else list(sizes)
        if len(sizes) != num_layers:
            raise ValueError(f"{name} has {len(sizes)} entries but layer_num is {num_layers}: give one number, or one for each layer.")
        return sizes

    columns = [
        each(name, sizes)
        for name, sizes in {"init_cache_size": initial, "sep_cache_size": separators, "local_size": local, "cache_size": total}.items()
    ]
    return [CacheBudget(initial=a, separators=s, local=w, total=c) for a, s, w, c in zip(*columns, strict=True)]


def _checked(mask: Tensor, ids: Tensor, has_text: Tensor) -> Tensor:
    """The part of an attention mask that speaks of ``ids [B, T]``. ``[B, T]`` bool"""
    if mask.ndim != 2 or mask.shape[0] != ids.shape[0] or mask.shape[1] < ids.shape[1]:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: SepCache needs one entry for each of the tokens, {tuple(ids.shape)}, or more."
        )
    is_text = mask[:, mask.shape[1] - ids.shape[1] :].bool()
    if bool((is_text.cummax(1).values != is_text).any() | (has_text & ~is_text).any()):
        raise ValueError("attention_mask hides tokens within or after a text: SepCache wants padding on the left only.")
    return is_text


def _next_slots(stored: StoredTokens | None, ids: Tensor, is_text: Tensor | None) -> Tensor:
    """The slots that new tokens have before anything is compressed. ``[B, T]`` int64"""
    held = torch.zeros_like(ids[:, :1]) if stored is None else (stored.width - stored.first).long()
    number = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape) if is_text is None else (is_text.cumsum(1) - 1).clamp(min=0)
    return held + number


def _swapped(x: Tensor, axis: int) -> Tensor:
    """With its tokens on axis 2 instead of another, or back."""
    return x if axis == 2 else x.transpose(2, axis)


def _tensor_or_none(value: object) -> Tensor | None:
    if value is not None and not isinstance(value, Tensor):
        raise ValueError(f"A {type(value).__name__} was given where a tensor is wanted.")
    return value

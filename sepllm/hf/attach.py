"""SepLLM without training: let the attention of any causal language model of transformers read under a pattern, or from a SepCache.

`attach` names a function of ours as the model's attention, and a hook before its forward pass tells that function which tokens are coming.
No signature and no weight changes; `detach` puts back what was there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from sepllm.attention.registry import attend
from sepllm.hf.cache import SepCache, Table
from sepllm.hf.configuration_sepllm_gpt_neox import SepLLMGPTNeoXConfig
from sepllm.hf.falcon import use_interface, use_own_attention
from sepllm.hf.layout_cache import LayoutLayer, layout_layer
from sepllm.layout import KeyRanges, TokenLayout
from sepllm.pattern import AttentionPattern
from sepllm.positions import apply_rotary_once_more, table_of_frequencies

NUM_CHECKED_TOKENS = 8
"""Length of the text on which `attach` compares the model with and without it."""

LAYER_TYPES = ("full_attention", "sliding_attention")
"""Layers, as configurations name them, that read keys in a way we compute."""

CHANGES_SCORES = frozenset({"softcap", "s_aux", "sinks", "position_bias"})
"""What models hand to an attention function that would change its result."""


def attach(
    model: PreTrainedModel, pattern: AttentionPattern | None = None, *, decode_pattern: AttentionPattern | None = None, core: str = "auto"
) -> Attachment:
    """The model reads under ``pattern`` from now on, until `Attachment.detach`, or the end of a ``with`` block.

    ``pattern``: what a text reads that begins; by default everything. ``decode_pattern``: what tokens read that follow cached ones; by default the
    same. With a `SepCache` as ``past_key_values``, tokens that follow read whatever it stores. ``core``: as in `sepllm.attention.attend`.
    ValueError where a forward pass shows that the model computes its attention otherwise.
    """
    if attachment_of(model) is not None:
        raise ValueError(f"This {type(model).__name__} has an attachment: detach it first.")
    config = getattr(model.get_decoder(), "config", None)
    if reads_as_trained(model):
        raise ValueError(
            f"A {model.config.model_type} model reads as its configuration says, and takes a SepCache as it is: leave attach out, or change the "
            "configuration (prefill_local_window_size, ...)."
        )
    if config is None or not hasattr(config, "num_hidden_layers"):
        raise ValueError(f"{type(model).__name__} is no plain language model: attach to the one inside it.")
    prefill = _for_layers(pattern or AttentionPattern.full(1), config.num_hidden_layers)
    decode = prefill if decode_pattern is None else _for_layers(decode_pattern, config.num_hidden_layers)
    return Attachment(model, prefill=prefill, decode=decode, core=core)


def detach(model: PreTrainedModel) -> None:
    """The model is as it was before `attach`. ValueError if it was not attached to."""
    attachment = attachment_of(model)
    if attachment is None:
        raise ValueError(f"This {type(model).__name__} has no attachment.")
    attachment.detach()


def reads_as_trained(model: PreTrainedModel) -> bool:
    """Whether it is a ``sepllm_gpt_neox`` model, wherever its code came from: it hands token ids to a SepCache itself."""
    return str(model.config.model_type) == SepLLMGPTNeoXConfig.model_type


def attachment_of(model: PreTrainedModel) -> Attachment | None:
    """What `attach` returned, while it lasts."""
    owners = (getattr(hook, "__self__", None) for hook in model.get_decoder()._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Attachment)), None)


class Attachment:
    """A model that reads under our patterns. Made by `attach`."""

    def __init__(self, model: PreTrainedModel, *, prefill: AttentionPattern, decode: AttentionPattern, core: str) -> None:
        self.model = model
        self.prefill_pattern, self.decode_pattern, self.core = prefill, decode, core
        self._decoder = model.get_decoder()
        self._sliding_widths = _sliding_widths(self._decoder.config)
        self._parameters = list(inspect.signature(self._decoder.forward).parameters)
        self._rotary = _Rotary.of(self._decoder)
        self._pass: _Pass | None = None
        self._latest_layout: TokenLayout | None = None
        self._latest_cache: SepCache | None = None
        self._layers_seen: set[int] = set()
        self._stretch: Tensor | None = None
        self._name = f"sepllm-{id(self):x}"
        self._put_in_place()

    def detach(self) -> None:
        """The model is as it was before. Nothing happens a second time."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    def kv_ratio(self) -> float:
        """Keys that the newest token reads over all keys of its text, over layers and rows: the paper's r.KV as a fraction.

        Of the latest forward pass; with a SepCache, of all its passes.
        """
        if self._latest_cache is not None:
            return self._latest_cache.kv_ratio()
        if self._latest_layout is None:
            raise ValueError("No forward pass has been made yet.")
        return self.ratio_of(self._latest_layout)

    def ratio_of(self, layout: TokenLayout) -> float:
        """`TokenLayout.kv_ratio`, where the model's own sliding window counts too."""
        layouts = {width: _narrowed(layout, width) for width in set(self._sliding_widths)}
        read = [layouts[width].ranges(layer).read_keys()[:, -1] for layer, width in enumerate(self._sliding_widths)]
        return int(torch.stack(read).sum()) / (layout.ids.numel() * len(read))

    def _put_in_place(self) -> None:
        self._undo: list[Callable[[], object]] = []
        with _deterministic(self.model), torch.no_grad():
            expected = self._logits()
            try:
                self._replace_attention()
                self._check(expected)
            except BaseException:
                self.detach()
                raise
            self._latest_layout = None

    def _replace_attention(self) -> None:
        configs = {
            id(module.config): module.config for module in self.model.modules() if isinstance(getattr(module, "config", None), PreTrainedConfig)
        }
        falcon = use_interface(self.model)
        self._undo.append(partial(use_own_attention, falcon))
        AttentionInterface.register(self._name, self._attention)
        self._undo.append(partial(AttentionInterface._global_mapping.pop, self._name, None))
        for config in configs.values():
            old = config._attn_implementation_internal
            config._attn_implementation_internal = self._name
            self._undo.append(partial(setattr, config, "_attn_implementation_internal", old))
        self._undo.append(self._decoder.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        self._undo.append(self._decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True).remove)

    def _check(self, expected: Tensor) -> None:
        """ValueError unless our function runs in every layer and, reading everything, gives what the model gives."""
        patterns, self.prefill_pattern = self.prefill_pattern, AttentionPattern.full(len(self._sliding_widths))
        name = type(self.model).__name__
        try:
            found = self._logits()
            is_turned_right = isinstance(self._rotary, _Rotary) and _is_close(self._stretched_logits(), expected)
        except (AttributeError, IndexError, TypeError) as error:
            raise ValueError(
                f"{name} does not run when its attention function is another one ({error}): it cannot be attached to, use a model that does."
            ) from error
        finally:
            self.prefill_pattern = patterns
        if isinstance(self._rotary, _Rotary) and not is_turned_right:
            self._rotary = "it does not pair the dimensions of its rotary embeddings half by half"
        missing = set(range(len(self._sliding_widths))) - self._layers_seen
        if missing:
            raise ValueError(
                f"{name} does not use the attention interface of transformers in layers {sorted(missing)}: it cannot be attached to, use a model "
                "that does."
            )
        if not _is_close(found, expected):
            raise ValueError(
                f"{name} computes something in its attention that is not known here: over the same keys it says something else. It cannot be "
                "attached to."
            )

    def _logits(self, **kwargs: Tensor) -> Tensor:
        """On tokens from all over the vocabulary: the first ones are often control tokens, on which a model in bf16 says mostly noise."""
        vocab_size = self._decoder.config.vocab_size
        ids = torch.arange(1, NUM_CHECKED_TOKENS + 1, device=self.model.device)[None] * max(1, vocab_size // (NUM_CHECKED_TOKENS + 1)) % vocab_size
        return self.model(input_ids=ids, use_cache=False, **kwargs)[0]

    def _stretched_logits(self) -> Tensor:
        """The same, if we know how this model rotates: its positions are twice what they should be, and turned back by us."""
        positions = torch.arange(NUM_CHECKED_TOKENS, device=self.model.device)[None]
        self._stretch = -positions
        try:
            return self._logits(position_ids=2 * positions)
        finally:
            self._stretch = None

    def _before(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[tuple[object, ...], dict[str, object]]:
        """Before the model's forward pass: what the tokens that come may read."""
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        if given.get("output_attentions") or (given.get("output_attentions") is None and self._decoder.config.output_attentions):
            raise ValueError("output_attentions is set, but an attached model never forms the attention weights: leave it out, or detach.")
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ValueError("attention_mask is not a [B, S] tensor: an attached model takes 1 for text and 0 for padding, no prepared masks.")
        uses_cache = given.get("use_cache")
        if cache is None and (self._decoder.config.use_cache if uses_cache is None else uses_cache) and not _checkpoints(self._decoder):
            cache = given["past_key_values"] = DynamicCache()
        if cache is None and mask is None and self._stretch is None:
            _check_one_text(given.get("position_ids"))
        ids = self._known_ids(given, cache)
        if isinstance(cache, SepCache):
            self._pass = self._from_sep_cache(cache, ids, mask, given)
        else:
            self._pass = self._from_layout(cache, ids, mask)
        self._latest_layout, self._latest_cache = self._pass.layout, cache if isinstance(cache, SepCache) else None
        return (), given

    def _after(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        """After it, whether it succeeded or not."""
        finished, self._pass = self._pass, None
        if finished is not None:
            finished.end(has_succeeded=output is not None)

    def _known_ids(self, given: dict[str, object], cache: object) -> Tensor:
        """The ids, or stand-ins where nobody asks for them."""
        ids, embedded = given.get("input_ids"), given.get("inputs_embeds")
        if isinstance(ids, Tensor):
            return ids
        if not isinstance(embedded, Tensor):
            raise ValueError("Give input_ids.")
        if isinstance(cache, SepCache) or self.prefill_pattern.looks_at_ids or self.decode_pattern.looks_at_ids:
            raise ValueError(
                "inputs_embeds do not say which tokens are separators or padding: give input_ids, or attach a pattern without separator_ids and "
                "padding_id."
            )
        return torch.zeros(embedded.shape[:2], dtype=torch.long, device=embedded.device)

    def _from_layout(self, cache: object, ids: Tensor, mask: Tensor | None) -> _Pass:
        """A pass over a cache of transformers, or none."""
        store = None if cache is None else _store_of(cache)
        cached = store.layout if store is not None and store.get_seq_length() else None
        if cached is None:
            layout = TokenLayout.from_ids(ids, self.prefill_pattern, attention_mask=mask)
        else:
            begins = ids.shape[1] > 1 or (cached.has_padding and not bool(cached.is_text[:, -1].all()))
            new_mask = mask[:, mask.shape[1] - ids.shape[1] :] if mask is not None and begins else None
            layout = cached.extend(ids, pattern=self.decode_pattern, attention_mask=new_mask)
        rotary = self._rotary if self._stretch is not None else None
        return _Pass(widths=self._sliding_widths, layout=layout, store=store, rotary=rotary, turn_by=self._stretch)

    def _from_sep_cache(self, cache: SepCache, ids: Tensor, mask: Tensor | None, given: dict[str, object]) -> _Pass:
        """A pass over a SepCache, which is told of the tokens."""
        self._check_cache(cache)
        is_first = cache.get_seq_length() == 0
        layout = TokenLayout.from_ids(ids, self.prefill_pattern, attention_mask=mask) if is_first else None
        if layout is not None and layout.has_padding:
            mask = layout.is_text
        slots = cache.begin_pass(ids, attention_mask=mask)
        if slots is not None:
            given["position_ids"] = slots
        return _Pass(widths=self._sliding_widths, layout=layout, cache=cache, rotary=self._rotary if cache.shifts_positions else None)

    def _check_cache(self, cache: SepCache) -> None:
        cache.check_fits(len(self._sliding_widths), has_sliding_window=any(width is not None for width in self._sliding_widths))
        if cache.shifts_positions and isinstance(self._rotary, str):
            raise ValueError(f"APPLY_PE_SHIFT is set, but {self._rotary}: positions of this model cannot be shifted, leave it out.")

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """An attention function as transformers wants it: ``[B, N, T, H]``, ``[B, K, S, H]`` to ``[B, T, N, H]``."""
        now, layer = self._pass, module.layer_idx
        assert isinstance(layer, int)
        if now is None:
            raise ValueError("Attention was computed outside of a forward pass of the attached model; gradient checkpointing does that, turn it off.")
        wrong = sorted(name for name in CHANGES_SCORES & kwargs.keys() if kwargs[name] is not None)
        if wrong or attention_mask is not None or not getattr(module, "is_causal", True):
            raise ValueError(f"{type(module).__name__} uses {', '.join(wrong) or 'a mask of its own'}, which is not computed here.")
        self._layers_seen.add(layer)
        q_BTNH, k_BSKH, v_BSKH = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if isinstance(now.rotary, _Rotary):
            q_BTNH, k_BSKH = now.turned(q_BTNH, k_BSKH, layer)
        read_BTNH = attend(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            now.ranges(layer, q_BTNH.device),
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            core=self.core,
            softmax=self.prefill_pattern.softmax,
            dropout=dropout,
        )
        return read_BTNH, None


@dataclass(kw_only=True)
class _Pass:
    """One forward pass: what its queries read, worked out once for layers that agree."""

    widths: tuple[int | None, ...]
    """Sliding width of each layer."""
    layout: TokenLayout | None = None
    store: LayoutLayer | None = None
    cache: SepCache | None = None
    rotary: _Rotary | str | None = None
    """Set where keys may have to be turned to their slots."""
    turn_by: Tensor | None = None
    """``[B, S]``: by how many positions, where no cache says."""
    _ranges: dict[tuple[object, ...], KeyRanges] = field(default_factory=dict)
    _layouts: dict[int | None, TokenLayout] = field(default_factory=dict)
    _tables: dict[tuple[int, torch.device], Table | None] = field(default_factory=dict)

    def ranges(self, layer: int, device: torch.device) -> KeyRanges:
        """What the layer's queries read."""
        width = self.widths[layer]
        key: tuple[object, ...]
        if self.layout is not None:
            pattern = self.layout.pattern
            key = (pattern.windows[layer], pattern.intervals and pattern.intervals[layer], width, device)
        else:
            assert self.cache is not None
            key = (self.cache.pass_group(layer), width, device)
        if key not in self._ranges:
            made = self._made(layer, width)
            self._ranges[key] = made if made.index.device == device else made.to(device)
        return self._ranges[key]

    def turned(self, q_BTNH: Tensor, k_BSKH: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Queries and keys at their slots instead of the positions that they came with. What is stored stays as it is."""
        key = 0 if self.cache is None else self.cache.pass_group(layer), k_BSKH.device
        if key not in self._tables:
            self._tables[key] = self._table(layer, k_BSKH)
        table = self._tables[key]
        if table is None:
            return q_BTNH, k_BSKH
        (cos, sin), first = table, k_BSKH.shape[1] - q_BTNH.shape[1]
        return apply_rotary_once_more(q_BTNH, cos[:, first:], sin[:, first:]), apply_rotary_once_more(k_BSKH, cos, sin)

    def _table(self, layer: int, keys: Tensor) -> Table | None:
        assert isinstance(self.rotary, _Rotary)
        make = partial(self.rotary.table, dtype=keys.dtype)
        if self.cache is not None:
            return self.cache.pass_turns(layer, make)
        assert self.turn_by is not None
        return make(self.turn_by.to(keys.device))

    def end(self, *, has_succeeded: bool) -> None:
        """What has been read is remembered by the cache."""
        if self.store is not None and has_succeeded:
            self.store.layout = self.layout
        if self.cache is not None:
            self.cache.end_pass()

    def _made(self, layer: int, width: int | None) -> KeyRanges:
        if self.layout is None:
            assert self.cache is not None
            return self.cache.pass_ranges(layer, sliding_width=width)
        if width not in self._layouts:
            self._layouts[width] = _narrowed(self.layout, width)
        return self._layouts[width].ranges(layer)


@dataclass(frozen=True, kw_only=True)
class _Rotary:
    """The rotary embeddings of a model: half-split pairs of the first dimensions of each head."""

    frequencies: Tensor
    """Radians per position of each pair."""

    @classmethod
    def of(cls, base: nn.Module) -> _Rotary | str:
        """Those of the model, or why they cannot be used."""
        found = [module for module in base.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]
        if len(found) != 1:
            return "its rotary embeddings are not in one place" if found else "it has no rotary embeddings"
        kind = getattr(found[0], "rope_type", "default")
        if kind in ("dynamic", "longrope"):
            return f"its rotary frequencies change with the length (rope_type {kind})"
        frequencies = found[0].inv_freq
        assert isinstance(frequencies, Tensor)
        return cls(frequencies=frequencies)

    def table(self, positions: Tensor, *, dtype: torch.dtype) -> Table:
        """Cosines and sines ``[B, S, R]`` for ``positions [B, S]``, from angles in fp32."""
        return table_of_frequencies(positions, self.frequencies.to(positions.device, torch.float32), dtype=dtype)


def _for_layers(pattern: AttentionPattern, num_layers: int) -> AttentionPattern:
    """The pattern with a window for each layer of the model; one window serves all."""
    if pattern.num_layers == num_layers:
        return pattern
    if pattern.num_layers != 1:
        raise ValueError(
            f"The pattern has {pattern.num_layers} windows but the model has {num_layers} layers: give one window, or one for each layer."
        )
    return replace(pattern, windows=pattern.windows * num_layers, intervals=pattern.intervals and pattern.intervals * num_layers)


def _sliding_widths(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """How far back the model itself lets each layer read; None: as far as it likes."""
    if getattr(config, "attention_chunk_size", None) is not None:
        raise ValueError("This model reads within chunks (attention_chunk_size): it cannot be attached to.")
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    unknown = sorted(set(types) - set(LAYER_TYPES))
    if unknown:
        raise ValueError(f"This model has layers of type {', '.join(unknown)}: only {' and '.join(LAYER_TYPES)} can be attached to.")
    return tuple(window - 1 if kind == "sliding_attention" and window is not None else None for kind in types)


def _narrowed(layout: TokenLayout, width: int | None) -> TokenLayout:
    """The layout under the model's own sliding width too."""
    own = layout.pattern.sliding_width
    if width is None or (own is not None and own <= width):
        return layout
    return replace(layout, pattern=replace(layout.pattern, sliding_width=width), _ranges={})


def _check_one_text(position_ids: object) -> None:
    """ValueError where transformers would take a row for several texts: it tells them apart by positions that do not go on."""
    if isinstance(position_ids, Tensor) and position_ids.ndim == 2 and bool((position_ids.diff(dim=1) != 1).any()):
        raise ValueError(
            "position_ids do not go on within a row, which is how transformers packs several texts into one: an attached model reads a row as one "
            "text. Give each text a row of its own."
        )


def _store_of(cache: object) -> LayoutLayer:
    """The layer of a DynamicCache that remembers the layout. Its sliding layers, while empty, become plain ones: ranges say what is read."""
    if not isinstance(cache, Cache):
        raise ValueError(f"past_key_values is a {type(cache).__name__}: an attached model needs a DynamicCache or a SepCache.")
    if isinstance(cache, DynamicCache) and not cache.get_seq_length():
        cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
    return layout_layer(cache)


def _is_close(found: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.05
    return float((found - expected).float().norm()) <= tolerance * float(expected.float().norm())


def _checkpoints(base: nn.Module) -> bool:
    return base.training and getattr(base, "gradient_checkpointing", False)


@contextmanager
def _deterministic(model: nn.Module) -> Iterator[None]:
    """Without dropout for a while."""
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True

"""The attention weights of a Hugging Face model on a text, and how much of them each key receives.

Fused attention never forms the weights, so they are worked out again: hooks keep what the projection to queries, keys and values gives,
and with what the attention was called. That these weights are the model's own is checked against what the layer passed on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sepllm.attention.dense import DENSE
from sepllm.hf.modeling_sepllm_gpt_neox import SepLLMGPTNeoXAttention
from sepllm.layout import TokenLayout
from sepllm.ops.attention_reference import Bias
from sepllm.positions import apply_rotary
from tools.plot.mask import Kind

TOLERANCE = 1e-3
"""Between what our weights read and what the layer passed on."""


def load_model(folder: str | Path) -> PreTrainedModel:
    """A model of SepLLM or of plain GPT-NeoX, in fp32."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder: give a converted checkpoint, such as tools/ckpts/convert_neox_to_hf.py writes.")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if model.config.model_type not in ("sepllm_gpt_neox", "gpt_neox"):
        raise ValueError(f"{folder} is a {model.config.model_type}: scores are drawn of sepllm_gpt_neox and gpt_neox.")
    return model.eval()


@torch.no_grad()
def attention_weights(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What each query gives to each key, the mean over the heads. ``[layers, S, S]`` float32, for ``ids [S]``."""
    if model.config.model_type == "gpt_neox":
        return torch.stack([weights[0].mean(0) for weights in model(ids[None], output_attentions=True).attentions])
    attentions = [module for module in model.modules() if isinstance(module, SepLLMGPTNeoXAttention)]
    with _watched(attentions) as calls:
        model(ids[None], use_cache=False)
    return torch.stack([_weights(attention, call) for attention, call in zip(attentions, calls, strict=True)])


@dataclass(slots=True)
class _Call:
    """One call of an attention layer."""

    given: tuple[object, ...] = ()
    projected: list[Tensor] = field(default_factory=list)
    """q, k and v of all heads."""
    passed_on: list[Tensor] = field(default_factory=list)
    """What was read, all heads side by side."""

    @property
    def layout(self) -> TokenLayout:
        return next(value for value in self.given if isinstance(value, TokenLayout))

    @property
    def rotary(self) -> tuple[Tensor, Tensor] | None:
        for value in self.given:
            if isinstance(value, tuple) and not isinstance(value, Bias):
                cosines, sines = value
                return cosines, sines
        return None

    @property
    def bias(self) -> Bias | None:
        return next((value for value in self.given if isinstance(value, Bias)), None)


@contextmanager
def _watched(attentions: list[SepLLMGPTNeoXAttention]) -> Iterator[list[_Call]]:
    """What each of these layers is called with and does inside the block."""
    calls = [_Call() for _ in attentions]
    hooks = []
    for attention, call in zip(attentions, calls, strict=True):

        def note_given(_: nn.Module, args: tuple[object, ...], named: dict[str, object], call: _Call = call) -> None:
            call.given = (*args, *named.values())

        def note_projected(_: nn.Module, args: tuple[Tensor, ...], out: Tensor, call: _Call = call) -> None:
            call.projected.append(out)

        def note_passed_on(_: nn.Module, args: tuple[Tensor, ...], call: _Call = call) -> None:
            call.passed_on.append(args[0])

        hooks.append(attention.register_forward_pre_hook(note_given, with_kwargs=True))
        hooks.append(attention.query_key_value.register_forward_hook(note_projected))
        hooks.append(attention.dense.register_forward_pre_hook(note_passed_on))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _weights(attention: SepLLMGPTNeoXAttention, call: _Call) -> Tensor:
    """``[S, S]``: attention over the rows of the identity instead of the values gives the weights themselves."""
    config = attention.config
    heads, head_size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    q_1SNH, k_1SNH, v_1SNH = call.projected[0].unflatten(-1, (heads, 3, head_size)).unbind(-2)
    if call.rotary is not None:
        q_1SNH, k_1SNH = apply_rotary(q_1SNH, *call.rotary), apply_rotary(k_1SNH, *call.rotary)
    length, ranges = q_1SNH.shape[1], call.layout.ranges(attention.layer)
    rows_1SNS = torch.eye(length)[None, :, None].expand(1, length, heads, length)
    softmax = call.layout.pattern.softmax
    weights_TNS = DENSE.attention(q_1SNH, k_1SNH, rows_1SNS, ranges, scale=head_size**-0.5, softmax=softmax, bias=call.bias, dropout=0.0)[0]
    read = torch.einsum("tns,snh->tnh", weights_TNS, v_1SNH[0]).flatten(1)
    difference = float((read - call.passed_on[0][0]).abs().max())
    assert difference < TOLERANCE, f"layer {attention.layer} reads otherwise than worked out here, by {difference}"
    return weights_TNS.mean(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What the keys of one layer receive."""

    by_key: NDArray[np.float64]
    """``[S]``: mean weight that a later query, or the key's own, gives to the key."""
    share: dict[Kind, float]
    """Of all attention, by why a far query reads the key."""
    readable: dict[Kind, float]
    """Of all (query, key) pairs that are read."""

    @classmethod
    def of(cls, weights: NDArray[np.float64], is_read: NDArray[np.bool_], kinds: tuple[Kind, ...]) -> Received:
        """``weights`` and ``is_read`` are ``[S, S]``, queries first."""
        later_queries = np.arange(len(weights), 0, -1)
        given, pairs = weights.sum(0), is_read.sum(0)
        of_kind = {kind: np.array([kind == other for other in kinds]) for kind in dict.fromkeys(kinds)}
        return cls(
            by_key=given / later_queries,
            share={kind: float(given[columns].sum() / given.sum()) for kind, columns in of_kind.items()},
            readable={kind: float(pairs[columns].sum() / pairs.sum()) for kind, columns in of_kind.items()},
        )

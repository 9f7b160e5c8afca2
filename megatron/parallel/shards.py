"""How tensor parallelism cuts each parameter into pieces, as GPT-NeoX stores them, and back again to the bit.

    rows      one piece a rank along dim 0: embeddings, output matrix, qkv, linear1 (column parallel)
    columns   along dim 1: attention.dense and mlp.linear2 (row parallel)
    summed    the row biases under the parallel residual, where each rank adds its own before the one reduction
    copied    the same everywhere: norms, the row biases otherwise, learned positions

Rows of several parts, such as ``[up ; gate]``, are cut part by part, so that every rank holds a piece of each.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron.config.keys import GATED_ACTIVATIONS
from megatron.config.schema import ModelConfig

RowBiases = Literal["summed", "copied"]
_ROW_PARALLEL = ("attention.dense", "mlp.linear2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How one parameter is cut."""

    kind: Literal["rows", "columns", "summed", "copied"]
    parts: tuple[int, ...] = ()
    """Of rows and columns: how many indivisible units (heads, or single rows) each part has. Every rank gets as many units of each."""


def cut_of(name: str, model: ModelConfig) -> Cut:
    """How the parameter ``sequential.N.<name>`` of this model is cut. ValueError for a name that has no rule."""
    kind = re.sub(r"^sequential\.\d+\.", "", name)
    stem = kind.rpartition(".")[0]
    heads, groups, width = model.num_attention_heads, model.num_kv_heads, model.intermediate_size
    if kind in ("word_embeddings.weight", "final_linear.weight"):
        return Cut(kind="rows", parts=(1,) if model.padded_vocab_size is None else (model.padded_vocab_size,))
    if stem == "attention.query_key_value":
        return Cut(kind="rows", parts=(heads,) if groups == heads else (heads, groups, groups))
    if stem == "attention.qk_layernorm":
        return Cut(kind="copied") if kind.endswith(".g") else Cut(kind="rows", parts=(heads,))
    if stem == "mlp.linear1":
        return Cut(kind="rows", parts=(width, width) if model.activation in GATED_ACTIVATIONS else (width,))
    if stem in _ROW_PARALLEL and kind.endswith(".weight"):
        return Cut(kind="columns", parts=(heads,) if stem == "attention.dense" else (width,))
    if stem in _ROW_PARALLEL:
        return Cut(kind="summed" if model.gpt_j_residual else "copied")
    if "norm." in kind or kind == "position_embeddings.weight":
        return Cut(kind="copied")
    raise ValueError(f"{name} has no rule by which tensor parallelism cuts it.")


def split(name: str, whole: Tensor, model: ModelConfig, *, ranks: int) -> list[Tensor]:
    """The piece of each tensor-parallel rank; `joined` makes them whole again, bit for bit. ValueError where they cannot be equal.

    Of a summed bias the first rank holds everything and the others minus zero, the one number that changes nothing when added.
    """
    if ranks == 1:
        return [whole]
    cut = cut_of(name, model)
    if cut.kind == "copied":
        return [whole] * ranks
    if cut.kind == "summed":
        return [whole, *(torch.full_like(whole, -0.0) for _ in range(ranks - 1))]
    dim = 0 if cut.kind == "rows" else 1
    if uneven := [units for units in cut.parts if units % ranks]:
        raise ValueError(f"{name} has {uneven[0]} heads or rows to share, which {ranks} tensor-parallel ranks do not divide: use another --tp.")
    pieces = [part.chunk(ranks, dim) for part in whole.split(_sizes(whole.shape[dim], cut.parts), dim)]
    return [torch.cat(of_rank, dim) for of_rank in zip(*pieces, strict=True)]


def whole_shape(name: str, shard: Tensor, model: ModelConfig, *, ranks: int) -> list[int]:
    """The shape of the tensor of which ``shard`` is one of ``ranks`` pieces."""
    shape, kind = list(shard.shape), cut_of(name, model).kind if ranks > 1 else "copied"
    if kind in ("rows", "columns"):
        shape[0 if kind == "rows" else 1] *= ranks
    return shape


def joined(name: str, shards: list[Tensor], model: ModelConfig, *, row_biases: RowBiases = "summed") -> Tensor:
    """The whole tensor of the pieces of all tensor-parallel ranks, in their order. Norms that have drifted apart are averaged.

    ``row_biases``: how programs other than GPT-NeoX have cut those of the parallel residual; nothing in a file tells the two apart.
    """
    if len(shards) == 1:
        return shards[0]
    cut = cut_of(name, model)
    if cut.kind == "summed" and row_biases == "copied":
        return shards[0]
    if cut.kind == "summed":
        return functools.reduce(torch.add, (shard.float() for shard in shards)).to(shards[0].dtype)  # a sum from 0 would lose minus zeros
    if cut.kind == "copied":
        is_norm = "norm." in name and any(not torch.equal(shard, shards[0]) for shard in shards[1:])
        return torch.stack(shards).float().mean(0).to(shards[0].dtype) if is_norm else shards[0]
    dim = 0 if cut.kind == "rows" else 1
    pieces = zip(*(shard.split(_sizes(shard.shape[dim], cut.parts), dim) for shard in shards), strict=True)
    return torch.cat([torch.cat(of_part, dim) for of_part in pieces], dim)


def parts_of_groups(qkv: Tensor, model: ModelConfig) -> Tensor:
    """Rows ``[q of all heads | k of all | v of all]`` of rows ``q .. q k v`` per k/v head: how GPT-NeoX before #1315 and SepLLM's fork
    ordered grouped heads. Nothing in a file tells the two apart."""
    per_group = model.num_attention_heads // model.num_kv_heads
    head_size = model.hidden_size // model.num_attention_heads
    grouped = qkv.unflatten(0, (model.num_kv_heads, per_group + 2, head_size))
    return torch.cat([part.flatten(0, 2) for part in grouped.split([per_group, 1, 1], 1)], 0)


def _sizes(length: int, parts: tuple[int, ...]) -> list[int]:
    """The length of each part, in proportion to its units."""
    return [length * units // sum(parts) for units in parts]

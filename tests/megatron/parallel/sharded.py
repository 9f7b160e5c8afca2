"""What each rank of a tensor-parallel group computes, case by case, beside the whole model on one device: run as a program by every rank."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.model.gpt import GPTModel
from megatron.model.init import initialise
from megatron.model.recompute import Recompute
from megatron.parallel.mesh import Axis
from megatron.parallel.parameters import norm_over_shards, prepare_parameters
from megatron.parallel.regions import TensorParallel
from megatron.parallel.shards import cut_of, joined, split
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern, SelfAdjust

SEPLLM = AttentionPattern(initial_tokens=2, separator_ids=(5, 6, 7), windows=(6, 9))
LLAMA = {
    "norm": "rmsnorm",
    "norm_epsilon": 1e-5,
    "rotary_pct": 1.0,
    "activation": "swiglu",
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
    "gpt_j_residual": False,
    "num_kv_heads": 2,
}
BIPE = {"use_bipe": True, "bipe_separator_ids": (6, 8)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    model: dict[str, object] = field(default_factory=dict)
    pattern: AttentionPattern = SEPLLM
    core: str = "auto"
    recompute: Recompute | None = None
    is_compiled: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)


HALF = (torch.float32, torch.bfloat16)
DROPPED = {"hidden_dropout": 0.3, "attention_dropout": 0.3}

CASES = {
    "parallel residual": Case(dtypes=HALF),
    "sequential residual": Case(model={"gpt_j_residual": False}, dtypes=HALF),
    "one norm for both branches": Case(model={"gpt_j_tied": True}),
    "tied embeddings": Case(model={"no_weight_tying": False}),
    "llama": Case(model=LLAMA, dtypes=HALF),
    "tied llama": Case(model=LLAMA | {"no_weight_tying": False}),
    "grouped heads with biases": Case(model={"num_kv_heads": 2, "activation": "geglu"}),
    "full attention": Case(pattern=AttentionPattern.full(2)),
    "self-adjust": Case(pattern=AttentionPattern(initial_tokens=2, separator_ids=(5, 6, 7), windows=(6, 9), softmax=SelfAdjust(kind="normalised"))),
    "alibi": Case(model={"pos_emb": "alibi"}),
    "bilevel rotary": Case(model=BIPE),
    "bilevel alibi": Case(model=BIPE | {"pos_emb": "alibi"}),
    "learned positions": Case(model={"pos_emb": "learned"}),
    "sinusoidal positions": Case(model={"pos_emb": "sinusoidal"}),
    "dense core": Case(core="dense"),
    "chunked core": Case(core="chunked"),
    "norms of q and k": Case(model={"use_qk_layernorm": True}),
    "root-mean-square norms of q and k": Case(model={"use_qk_layernorm": True, "norm": "rmsnorm"}),
    "scale norms of q and k": Case(model={"use_qk_layernorm": True, "norm": "scalenorm"}),
    "recomputed": Case(recompute=Recompute(num_layers=1, is_selective=False), model={"gpt_j_residual": False}),
    "recomputed selectively": Case(recompute=Recompute(num_layers=1, is_selective=True), model={"gpt_j_residual": False}),
    "compiled": Case(is_compiled=True, model={"num_layers": 1}, pattern=AttentionPattern.full(1)),
    "hidden dropout": Case(model={"hidden_dropout": 0.3}),
    "dropout": Case(model=DROPPED | {"gpt_j_residual": False}),
    "dropout, recomputed": Case(model=DROPPED | {"gpt_j_residual": False}, recompute=Recompute(num_layers=2, is_selective=False)),
    "dropout, recomputed selectively": Case(model=DROPPED | {"gpt_j_residual": False}, recompute=Recompute(num_layers=2, is_selective=True)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A sharded model, joined, beside the whole one."""

    losses: tuple[float, float]
    """Of the whole model, of the sharded one; so are the others."""
    norms: tuple[float, float]
    """Of all gradients together."""
    differences: dict[str, float]
    """Between both gradients of each parameter, relative to its norm, or to a hundredth of that of all gradients where this is more."""
    errors: tuple[float, float]
    """Of all gradients together, relative to those of the whole model in float32."""
    same_weights: bool
    """To the bit."""
    agree: bool
    """Whether what every shard holds a copy of is the same to the bit on all: loss and gradients."""


Key = tuple[str, bool, torch.dtype]
"""Of a result: the case, whether the sequence was cut, and what was computed in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    layout: TokenLayout


def model_config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_kv_heads": 4,
        "intermediate_size": 48,
        "seq_length": 24,
        "max_position_embeddings": 64,
        "pos_emb": "rotary",
        "rotary_pct": 0.5,
        "no_weight_tying": True,
        "gpt_j_residual": True,
        "vocab_size": 90,
        "padded_vocab_size": 96,
        "init_method_std": 0.1,
        "output_layer_init_method": "normal",
    }
    return ModelConfig.model_validate(values | changes)


def batch_of(pattern: AttentionPattern) -> Batch:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(4, 90, (2, 25), generator=generator)
    text = torch.where(torch.rand(text.shape, generator=generator) < 0.25, torch.randint(5, 9, text.shape, generator=generator), text)
    mask = (torch.rand(2, 24, generator=generator) < 0.8).float()
    return Batch(ids=text[:, :-1], labels=text[:, 1:], loss_mask=mask, layout=TokenLayout.from_ids(text[:, :-1].contiguous(), pattern))


def built(case: Case, parallel: TensorParallel, dtype: torch.dtype) -> GPTModel:
    """The model with its initial weights, and biases and norms that are random too."""
    config = model_config(**case.model)
    model = GPTModel(config, core=case.core, recompute=case.recompute, parallel=parallel)
    initialise(model, config, seed=3, shards=parallel.axis)
    whole = GPTModel(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.1
            if parameter.ndim == 1 or "norm" in name:
                dict(model.named_parameters())[name].add_(split(name, drawn, config, ranks=parallel.size)[parallel.rank])
    model.to(dtype)
    prepare_parameters(model.named_parameters(), config, parallel)
    if case.is_compiled and parallel.size > 1:
        model.compile_blocks(backend="aot_eager")
    return model.train()


def loss_of(model: GPTModel, batch: Batch) -> float:
    torch.manual_seed(5)
    loss = model.loss(batch)
    loss.backward()
    return float(loss.detach())


def compare(case: Case, parallel: TensorParallel, dtype: torch.dtype) -> Compared:
    batch = batch_of(case.pattern)
    reference, whole, shard = built(case, TensorParallel(), torch.float32), built(case, TensorParallel(), dtype), built(case, parallel, dtype)
    loss_of(reference, batch)
    losses = loss_of(whole, batch), loss_of(shard, batch)
    gathered: list[Any] = [None] * parallel.size
    distributed.all_gather_object(gathered, (losses[1], dict(shard.named_parameters()), gradients_of(shard)), group=parallel.axis.group)
    exact, wanted, found = gradients_of(reference), gradients_of(whole), {}
    same, agree = True, all(loss == losses[1] for loss, *_ in gathered)
    for name, parameter in whole.named_parameters():
        same &= torch.equal(joined(name, [values[name] for _, values, _ in gathered], whole.config), parameter)
        pieces = [gradients.get(name, torch.full_like(values[name], -0.0)) for _, values, gradients in gathered]
        found[name] = joined(name, pieces, whole.config)
        agree &= cut_of(name, whole.config).kind != "copied" or all(torch.equal(piece, pieces[0]) for piece in pieces)
    least = norm_of(wanted) / 100
    differences = {name: float((found[name] - wanted[name]).norm()) / max(float(wanted[name].norm()), least) for name in wanted}
    errors = [norm_of({name: found_here[name] - exact[name] for name in exact}) / norm_of(exact) for found_here in (wanted, found)]
    norms = [float(norm_over_shards(own_gradients(model), shards=model.parallel.axis, along=model.parallel.axis)) for model in (whole, shard)]
    return Compared(losses=losses, norms=(norms[0], norms[1]), differences=differences, errors=(errors[0], errors[1]), same_weights=same, agree=agree)


def own_gradients(model: GPTModel) -> list[tuple[nn.Parameter, Tensor]]:
    return [(parameter, parameter.grad) for parameter in model.parameters() if parameter.grad is not None]


def gradients_of(model: GPTModel) -> dict[str, Tensor]:
    return {name: parameter.grad.float() for name, parameter in model.named_parameters() if parameter.grad is not None}


def norm_of(gradients: dict[str, Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(gradients.values()))


def main(output: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = distributed.new_group(list(range(size)))
    axis = Axis(size=size, rank=rank, group=group)
    results: dict[Key, Compared] = {}
    for cuts_sequence in (False, True):
        parallel = TensorParallel(axis=axis, is_sequence_cut=cuts_sequence)
        for name, case in CASES.items():
            for dtype in case.dtypes:
                results[name, cuts_sequence, dtype] = compare(case, parallel, dtype)
    if rank == 0:
        torch.save(results, output)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    from tests.megatron.parallel import sharded  # under the name that the test loads the results by

    sharded.main(Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))

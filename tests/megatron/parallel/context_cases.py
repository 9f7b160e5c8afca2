"""What the processes of one context group compute for `test_context.py`: whole models, on their pieces and on whole rows."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from megatron.config.schema import ModelConfig, TrainingConfig
from megatron.data.batch import Batch
from megatron.model.gpt import GPTModel, cross_entropy
from megatron.model.init import initialise
from megatron.model.recompute import Recompute
from megatron.parallel.mesh import Axis
from megatron.training.pieces import Piece
from sepllm.pattern import UNBOUNDED, AttentionPattern, SelfAdjust

SEPARATORS = (1, 2)
DOCUMENT_END = 3
PADDING = 4
VOCABULARY = 64
LENGTH = 64
LAYERS = 3


@dataclass(frozen=True)
class Case:
    pattern: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    core: str = "auto"
    recompute: dict[str, Any] = field(default_factory=dict)
    batch: dict[str, Any] = field(default_factory=dict)
    is_compiled: bool = False
    leading_padding: int = 0
    dtype: torch.dtype = torch.float64
    is_for_four: bool = True
    """Computed by groups of four processes too."""

    def attention_pattern(self) -> AttentionPattern:
        values: dict[str, Any] = {"initial_tokens": 3, "separator_ids": SEPARATORS, "windows": (6,) * LAYERS}
        return AttentionPattern(**values | self.pattern)

    def model_config(self) -> ModelConfig:
        values: dict[str, Any] = {
            "num_layers": LAYERS,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_kv_heads": 4,
            "intermediate_size": 64,
            "seq_length": LENGTH,
            "max_position_embeddings": LENGTH,
            "pos_emb": "rotary",
            "rotary_pct": 0.5,
            "no_weight_tying": True,
            "gpt_j_residual": True,
            "padded_vocab_size": VOCABULARY,
            "init_method_std": 0.3,
        }
        return ModelConfig(**values | self.model)

    def rows(self, *, seed: int) -> Tensor:
        torch.manual_seed(seed)
        text = torch.randint(5, VOCABULARY, (2, LENGTH + 1))
        text = torch.where(torch.rand(text.shape) < torch.tensor([[0.1], [0.3]]), torch.randint(1, 3, text.shape), text)
        text[0, [9, 10, 40]] = DOCUMENT_END
        text[1, : self.leading_padding] = PADDING
        return text


H_LAYERS = {"windows": (5, UNBOUNDED, 20)}
CASES = {
    "separators": Case(),
    "separators, native": Case(core="native"),
    "separators, chunked": Case(core="chunked", is_for_four=False),
    "separators, dense": Case(core="dense", is_for_four=False),
    "H layers": Case(H_LAYERS),
    "H layers, grouped heads, learned positions": Case(H_LAYERS, {"num_kv_heads": 2, "pos_emb": "learned", "gpt_j_residual": False}),
    "full attention": Case({"initial_tokens": 0, "separator_ids": (), "windows": (UNBOUNDED,) * LAYERS}),
    "StreamingLLM": Case({"separator_ids": ()}),
    "FixLLM": Case({"separator_ids": (), "windows": (4, 9, 9), "intervals": (5, 7, 7)}),
    "BiPE, rotary": Case(model={"use_bipe": True, "bipe_separator_ids": SEPARATORS}),
    "BiPE, ALiBi": Case(H_LAYERS, {"use_bipe": True, "bipe_separator_ids": SEPARATORS, "pos_emb": "alibi"}),
    "ALiBi": Case(model={"pos_emb": "alibi"}, core="chunked"),
    "raw": Case({"softmax": SelfAdjust(kind="raw")}),
    "normalised": Case({"softmax": SelfAdjust(kind="normalised", numerator_bias=0.5)}),
    "extremes of all keys": Case({"softmax": SelfAdjust(kind="normalised", extremes="causal")}),
    "packed documents": Case(batch={"document_end_id": DOCUMENT_END, "masked_id": DOCUMENT_END}),
    "packed documents, BiPE": Case(
        H_LAYERS, {"use_bipe": True, "bipe_separator_ids": SEPARATORS, "pos_emb": "alibi"}, batch={"document_end_id": DOCUMENT_END}
    ),
    "padding, a piece without loss": Case({"padding_id": PADDING}, batch={"masked_id": PADDING}, leading_padding=50),
    "recomputed": Case(recompute={"checkpoint_activations": True, "checkpoint_num_layers": 2}, is_for_four=False),
    "recomputed selectively": Case(recompute={"checkpoint_activations": True, "recompute_granularity": "selective"}, is_for_four=False),
    "compiled": Case(H_LAYERS, is_compiled=True, is_for_four=False),
    "fp32": Case(H_LAYERS, dtype=torch.float32),
    "bf16": Case(H_LAYERS, dtype=torch.bfloat16),
}


@dataclass(frozen=True)
class Errors:
    """Of the loss and of each parameter's gradient by name: norm of the difference over the norm."""

    pieces: dict[str, float]
    """Pieces against the whole row in float64."""
    whole: dict[str, float]
    """The whole row in the case's own precision against the same."""
    against_whole: dict[str, float]
    """Pieces against the whole row in the case's own precision."""


def main() -> None:
    """Every case on this process; the first writes the errors to the file that the command names."""
    distributed.init_process_group("gloo")
    context = Axis(size=distributed.get_world_size(), rank=distributed.get_rank(), group=distributed.new_group())
    wanted = {name: case for name, case in CASES.items() if context.size == 2 or case.is_for_four}
    results = {name: asdict(errors(case, context)) for name, case in wanted.items()}
    if context.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    distributed.barrier()
    distributed.destroy_process_group()


def errors(case: Case, context: Axis) -> Errors:
    config, pattern = case.model_config(), case.attention_pattern()
    model = GPTModel(config, core=case.core, recompute=Recompute.of(TrainingConfig(train_iters=1, **case.recompute)))
    initialise(model, config, seed=0)
    model = model.to(case.dtype)
    batch, another = (Batch.from_rows(case.rows(seed=seed), pattern, **case.batch) for seed in (0, 1))
    exact = gradients(copy.deepcopy(model).double(), batch)
    whole = gradients(model, batch)
    if case.is_compiled:
        model.compile_blocks(backend="aot_eager")
        gradients(model, Piece.of(another, context))  # another number of keys to send
    pieces = gradients(model, Piece.of(batch, context))
    for value in pieces.values():
        distributed.all_reduce(value)
        value /= context.size
    return Errors(pieces=distance(pieces, exact), whole=distance(whole, exact), against_whole=distance(pieces, whole))


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == wanted.keys()
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in wanted.items()}


def gradients(model: GPTModel, batch: Batch | Piece) -> dict[str, Tensor]:
    """The loss and every parameter's gradient, in float64."""
    model.zero_grad()
    loss = cross_entropy(model(batch.ids, batch.layout), batch.labels, batch.loss_mask)
    if isinstance(batch, Piece):
        loss = loss * batch.weight.to(loss.dtype)
    loss.backward()
    found = {name: parameter.grad.double() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return found | {"loss": loss.detach().double()}


if __name__ == "__main__":
    main()

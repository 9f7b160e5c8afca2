"""The whole model: a list of layers, numbered and named as GPT-NeoX stores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megatron.config.checks import NOT_BUILT_YET
from megatron.config.loader import ConfigError
from megatron.config.schema import Config, GenerationConfig, ModelConfig, ParallelConfig
from megatron.model.block import Block
from megatron.model.cache import KeyValueCache
from megatron.model.embedding import Embedding
from megatron.model.init import initialise
from megatron.model.norms import make_norm
from megatron.model.passes import LayerPass, layer_passes, positions_of
from megatron.model.recompute import Recompute
from megatron.parallel.context import ContextLayout
from megatron.parallel.linear import ColumnLinear, column_product
from megatron.parallel.mesh import Axis
from megatron.parallel.parameters import prepare_parameters
from megatron.parallel.regions import TensorParallel
from megatron.parallel.vocab import whole_statistics
from sepllm.layout import TokenLayout
from sepllm.ops.cross_entropy import cross_entropy as fused_cross_entropy
from sepllm.ops.linear_cross_entropy import linear_cross_entropy

EMBEDDING = 0
"""Place of the embedding in the list of layers. Places 1 and ``num_layers + 2`` reshape in GPT-NeoX and hold nothing."""
FIRST_BLOCK = 2

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bfloat16": torch.bfloat16}


class LabelledBatch(Protocol):
    """What `GPTModel.loss` reads of a micro-batch."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def loss_mask(self) -> Tensor: ...
    @property
    def layout(self) -> TokenLayout | ContextLayout: ...


def build_model(config: Config, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, shards: Axis = Axis()) -> GPTModel:
    """The model of this run with its initial weights, on ``device`` (default: torch's) in ``dtype`` (default: the run's precision).

    ``shards``: those of every layer, of which this process has one; by default it has the whole model, however the run is parallel.
    On the meta device nothing is allocated or drawn. `ConfigError` where the model asks for something that is not built.
    """
    _refuse_unbuilt(config)
    device = torch.device(device) if device is not None else torch.get_default_device()
    parallel = TensorParallel(axis=shards, is_sequence_cut=config.parallel.sequence_parallel)
    with torch.device("meta"):
        model = GPTModel(config.model, core=config.attention.core, recompute=Recompute.of(config.training), parallel=parallel)
    model.to(dtype or DTYPES[config.precision.precision])
    if device.type != "meta":
        model.to_empty(device=device)
        initialise(model, config.model, seed=config.training.seed, shards=shards)
        prepare_parameters(model.named_parameters(), config.model, parallel)
        if config.training.compile:
            model.compile_blocks()
    return model


def _refuse_unbuilt(config: Config) -> None:
    """How a run is parallel or generates is no matter of its model, which a converter builds on one device."""
    elsewhere = {"parallel": ParallelConfig(), "generation": GenerationConfig()}
    alone = config.model_copy(update=elsewhere)
    reasons = [sentence for is_asked_for, sentence in NOT_BUILT_YET if is_asked_for(alone)]
    if reasons:
        raise ConfigError(reasons)


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters of the model, exactly; nothing is allocated. Tied matrices count once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPTModel(config).parameters())


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """A layer that is yet to be made, by the whole model or by the pipeline stage that it falls to."""

    kind: type[nn.Module]
    arguments: dict[str, Any]

    def make(self) -> nn.Module:
        return self.kind(**self.arguments)


def layer_plans(config: ModelConfig, *, parallel: TensorParallel = TensorParallel()) -> dict[int, LayerPlan]:
    """The layer at each place of the list. Where the word embeddings serve as the output matrix, the last place is free."""
    plans = {EMBEDDING: LayerPlan(Embedding, {"config": config, "parallel": parallel})}
    for layer in range(config.num_layers):
        plans[FIRST_BLOCK + layer] = LayerPlan(Block, {"config": config, "layer": layer, "parallel": parallel})
    plans[config.num_layers + 3] = LayerPlan(FinalNorm, {"config": config})
    if config.no_weight_tying:
        plans[config.num_layers + 4] = LayerPlan(Output, {"config": config, "parallel": parallel})
    return plans


def run_blocks(blocks: Sequence[nn.Module], hidden_BTD: Tensor, passes: Sequence[LayerPass], *, recompute: Recompute | None) -> Tensor:
    """``hidden_BTD`` after the blocks, each with its own pass. ``recompute``: what is computed again for the backward pass."""

    def run(hidden_BTD: Tensor, group: slice) -> Tensor:
        for block, shared in zip(blocks[group], passes[group], strict=True):
            hidden_BTD = block(hidden_BTD, shared)
        return hidden_BTD

    if recompute is None or not torch.is_grad_enabled():
        return run(hidden_BTD, slice(None))
    for first in range(0, len(blocks), recompute.num_layers):
        group = slice(first, first + recompute.num_layers)
        hidden_BTD = checkpoint(run, hidden_BTD, group, use_reentrant=False, context_fn=recompute.contexts)
    return hidden_BTD


class GPTModel(nn.Module):
    """Token ids and their layout in, logits over the padded vocabulary out: over this shard's part of it, where the layers are sharded.

    ``sequential`` holds the layers under GPT-NeoX's places, so that state dict keys are ``sequential.N.<name>``: 0 the embedding,
    2 to ``num_layers + 1`` the blocks, then at ``num_layers + 3`` the last norm and at ``num_layers + 4`` the output matrix,
    which is absent where the word embeddings serve.
    """

    def __init__(
        self, config: ModelConfig, *, core: str = "auto", recompute: Recompute | None = None, parallel: TensorParallel = TensorParallel()
    ) -> None:
        """``core``: which attention core computes. ``recompute``: what is computed again for the backward pass; None keeps all activations."""
        super().__init__()
        self.config = config
        self.core = core
        self.recompute = recompute
        self.parallel = parallel
        self.attention_cores: tuple[str, ...] = ()
        """Which core computed each layer of the last forward pass."""
        self.sequential = nn.ModuleDict({str(place): plan.make() for place, plan in layer_plans(config, parallel=parallel).items()})

    def forward(
        self,
        ids: Tensor,
        layout: TokenLayout | ContextLayout,
        *,
        cache: KeyValueCache | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Logits of the layout's queries, ``[B, T, V]``; with ``labels`` and ``loss_mask``, ``[B, T]``, `cross_entropy`'s mean loss instead.

        ``ids [B, T]`` are the last T columns of ``layout``. The columns before them must be in ``cache``, which grows by T. ``logits_to_keep``: of
        the last so many queries alone; 0: of all.
        """
        hidden_BTD = self._hidden(ids, layout, cache)
        if labels is None:
            return self._logits(hidden_BTD[:, -logits_to_keep:])
        assert loss_mask is not None, "labels come with a mask"
        return self._loss(hidden_BTD, labels, loss_mask)

    def _hidden(self, ids: Tensor, layout: TokenLayout | ContextLayout, cache: KeyValueCache | None) -> Tensor:
        """What the output matrix is multiplied with."""
        self._check(ids, layout, cache)
        embedding = cast(Embedding, self.sequential[str(EMBEDDING)])
        positions = positions_of(layout, self.config)
        if embedding.position_embeddings is not None:
            positions.check_embedded(self.config.max_position_embeddings, offset=self.config.opt_pos_emb_offset)
        hidden_BTD = embedding(ids, positions.embedded)
        passes = layer_passes(
            layout, positions, self.config, like=hidden_BTD, core=self.core, cache=cache, is_training=self.training, parallel=self.parallel
        )
        self.attention_cores = tuple(of_layer.core for of_layer in passes)
        hidden_BTD = run_blocks(self._blocks(), hidden_BTD, passes, recompute=self.recompute if self.training else None)
        return self.sequential[str(self.config.num_layers + 3)](hidden_BTD)

    def _logits(self, hidden_BTD: Tensor) -> Tensor:
        if self.config.no_weight_tying:
            return self.sequential[str(self.config.num_layers + 4)](hidden_BTD)
        return tied_logits(cast(Embedding, self.sequential[str(EMBEDDING)]), hidden_BTD)

    def _loss(self, hidden_BTD: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
        """In fp32 on one shard the logits of a few hundred tokens exist at a time. (ZeRO 3 brings the matrix only where its layer is called.)"""
        matrix = self._output_matrix
        if hidden_BTD.dtype == torch.float32 and self.parallel.size == 1 and not hasattr(matrix, "ds_id"):
            mask = loss_mask.flatten()
            return linear_cross_entropy(hidden_BTD.flatten(0, 1), matrix, labels.flatten(), mask / mask.sum().clamp(min=1))
        in_fp32 = not self.config.fp16_lm_cross_entropy
        return cross_entropy(self._logits(hidden_BTD), labels, loss_mask, in_fp32=in_fp32, shards=self.parallel.axis)

    @property
    def _output_matrix(self) -> Tensor:
        if self.config.no_weight_tying:
            return cast(Output, self.sequential[str(self.config.num_layers + 4)]).final_linear.weight
        return cast(Embedding, self.sequential[str(EMBEDDING)]).word_embeddings.weight

    def loss(self, batch: LabelledBatch) -> Tensor:
        """Mean loss of the batch's unmasked tokens, a scalar."""
        return self(batch.ids, batch.layout, labels=batch.labels, loss_mask=batch.loss_mask)

    def compile_blocks(self, *, backend: str = "inductor") -> None:
        """Has `torch.compile` build the blocks, when they first run: one graph for all layers of the same window and core."""
        for block in self._blocks():
            block.compile(fullgraph=True, backend=backend)

    def _blocks(self) -> list[nn.Module]:
        return [self.sequential[str(FIRST_BLOCK + layer)] for layer in range(self.config.num_layers)]

    def _check(self, ids: Tensor, layout: TokenLayout | ContextLayout, cache: KeyValueCache | None) -> None:
        num_keys = layout.ids.shape[1]
        if ids.shape != (layout.ids.shape[0], layout.num_queries):
            raise ValueError(f"ids is {tuple(ids.shape)} but the layout has {layout.num_queries} queries in each of {layout.ids.shape[0]} rows.")
        if layout.pattern.num_layers != self.config.num_layers:
            raise ValueError(f"The layout's pattern has {layout.pattern.num_layers} windows but num_layers is {self.config.num_layers}.")
        held = 0 if cache is None else cache.length
        if held + ids.shape[1] != num_keys:
            raise ValueError(
                f"The layout has {num_keys} columns, {ids.shape[1]} of them new, but the cache holds {held}: give the cache of this text."
            )


class FinalNorm(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = make_norm(config.norm, config.hidden_size, epsilon=config.norm_epsilon)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.norm(hidden_BTD)


class Output(nn.Module):
    def __init__(self, config: ModelConfig, *, parallel: TensorParallel = TensorParallel()) -> None:
        super().__init__()
        assert config.padded_vocab_size is not None
        self.final_linear = ColumnLinear(config.hidden_size, config.padded_vocab_size, bias=False, parallel=parallel)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.final_linear(hidden_BTD)


def tied_logits(embedding: Embedding, hidden_BTD: Tensor) -> Tensor:
    """Logits where the word embeddings serve as the output matrix, ``[B, T, V]``; over this shard's part of the vocabulary."""
    return column_product(hidden_BTD, embedding.word_embeddings.weight, None, embedding.parallel)


def cross_entropy(logits: Tensor, labels: Tensor, loss_mask: Tensor, *, in_fp32: bool = True, shards: Axis = Axis()) -> Tensor:
    """``sum(loss * mask) / sum(mask)`` over the micro-batch, a scalar; 0 where the mask hides every token.

    ``logits [B, T, V]``, ``labels [B, T]`` int64, ``loss_mask [B, T]`` float. **The backward pass may write over the logits.**
    ``in_fp32=False`` computes the losses in the logits' dtype; their mean is in fp32 either way. The logits may be this process's of the
    ``shards`` of the vocabulary; the losses are then always in fp32.
    """
    if shards.size > 1:
        reduce = partial(whole_statistics, axis=shards)
        losses = fused_cross_entropy(logits.flatten(0, 1), labels.flatten(), reduce=reduce, first_label=shards.rank * logits.shape[-1])
    elif in_fp32:
        losses = fused_cross_entropy(logits.flatten(0, 1), labels.flatten())
    else:
        losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    mask = loss_mask.flatten()
    return (losses * mask).sum() / mask.sum().clamp(min=1)

"""One stage of the model as a DeepSpeed pipeline. Import it after `Mesh.start`, because it imports DeepSpeed.

    first stage      packed layout -> embedding -> blocks -> (hidden states, packed layout)
    further stages   (hidden states, packed layout) -> blocks -> (hidden states, packed layout)
    last stage       (hidden states, packed layout) -> blocks -> last norm -> output matrix -> logits

A stage unpacks the layout once, for all of its layers. DeepSpeed cuts the list of layers into stages, moves tensors between them,
writes and reads a file for each layer; what a stage computes is the forward pass below.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from functools import partial
from typing import Any, cast

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron.config.schema import Config, ModelConfig
from megatron.model.block import Block
from megatron.model.embedding import Embedding
from megatron.model.gpt import DTYPES, EMBEDDING, FIRST_BLOCK, FinalNorm, Output, cross_entropy, layer_plans, run_blocks, tied_logits
from megatron.model.init import initialise
from megatron.model.names import TIED, place_of, weight_name
from megatron.model.passes import layer_passes
from megatron.model.recompute import Recompute
from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.parameters import prepare_parameters
from megatron.parallel.regions import TensorParallel
from sepllm.layout import TokenLayout
from sepllm.positions import Positions


class EmbeddingPipe(Embedding):
    """These four have GPT-NeoX's names, which the patterns of `pipe_partition_method` are written for."""


class ParallelTransformerLayerPipe(Block):
    pass


class NormPipe(FinalNorm):
    pass


class ParallelLinearPipe(Output):
    pass


class TiedEmbedding(EmbeddingPipe):
    """The last stage's copy of the word embeddings, its output matrix."""

    def __init__(self, config: ModelConfig, **how: Any) -> None:
        super().__init__(config, **how)
        self.position_embeddings = None


NAMED: dict[object, type[nn.Module]] = {
    Embedding: EmbeddingPipe,
    Block: ParallelTransformerLayerPipe,
    FinalNorm: NormPipe,
    Output: ParallelLinearPipe,
}


class _Empty:
    """Mixed into a layer's specification: the layer is built without values, in the run's dtype on the stage's device."""

    device: torch.device
    dtype: torch.dtype

    def build(self, log: bool = False) -> nn.Module:
        with torch.device("meta"):
            layer: nn.Module = super().build(log)  # type: ignore[misc]
        return layer.to(self.dtype).to_empty(device=self.device)


class _Layer(_Empty, LayerSpec):
    pass


class _TiedLayer(_Empty, TiedLayerSpec):
    pass


def reshape(inputs: Tensor) -> Tensor:
    """At the places where GPT-NeoX reshapes; here they only keep the numbering, and the cut into `uniform` stages."""
    return inputs


class GPTPipeline(PipelineModule):
    """The layers of one stage. ``parameters()`` are this stage's; their names become GPT-NeoX's by `weight_name`."""

    def __init__(self, config: Config, mesh: Mesh, *, document_end_id: int | None = None) -> None:
        """With the initial weights of the run, the same as of the whole model. ``document_end_id``: where documents end, if they are separated.

        ValueError where `pipe_partition_method` leaves a stage without parameters.
        """
        topology = PipeModelDataParallelTopology(num_pp=mesh.pipe.size, num_mp=mesh.tensor.size, num_dp=mesh.data.size)
        method = config.parallel.pipe_partition_method
        with redirect_stdout(io.StringIO()):  # DeepSpeed prints its settings
            super().__init__(
                _specifications(config, mesh),
                topology=topology,
                loss_fn=partial(_loss, in_fp32=not config.model.fp16_lm_cross_entropy, shards=mesh.tensor),
                partition_method=method,
            )
        self.config = config.model
        self.places = range(self.parts[mesh.pipe.rank], self.parts[mesh.pipe.rank + 1])
        """Of this stage's layers in the list of all."""
        self.far_capacity = 0
        """With which layouts are packed; grows during the run, on all stages at once."""
        self.attention_cores: tuple[str, ...] = ()
        """Which core computed each layer of this stage in the last forward pass."""
        self._parallel = _tensor_parallel(config, mesh)
        self._pattern = config.attention.prefill
        self._document_end_id = document_end_id
        self._core = config.attention.core
        self._recompute = Recompute.of(config.training)
        self._check_parts(method)
        initialise(self, config.model, seed=config.training.seed, shards=mesh.tensor)
        prepare_parameters(((weight_name(name), parameter) for name, parameter in self.named_parameters()), config.model, self._parallel)
        self._mark_what_counts(mesh)
        if config.training.compile:
            for block in self._blocks():
                block.compile(fullgraph=True)

    def forward(self, inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """As drawn at the top of this file: ``hidden [B, T, D]``, `TokenLayout.pack`'s tensor, ``logits [B, T, V]``."""
        packed = inputs if isinstance(inputs, Tensor) else inputs[1]
        layout = self._unpacked(packed)
        positions = Positions.of(layout, segment_end_ids=self.config.bipe_separator_ids if self.config.use_bipe else None)
        hidden_BTD = self._embedded(layout, positions) if isinstance(inputs, Tensor) else inputs[0]
        layers = range(*(min(max(place - FIRST_BLOCK, 0), self.config.num_layers) for place in (self.places.start, self.places.stop)))
        passes = layer_passes(
            layout, positions, self.config, like=hidden_BTD, core=self._core, is_training=self.training, layers=layers, parallel=self._parallel
        )
        self.attention_cores = tuple(of_layer.core for of_layer in passes)
        hidden_BTD = run_blocks(self._blocks(), hidden_BTD, passes, recompute=self._recompute if self.training else None)
        for place in (self.config.num_layers + 3, self.config.num_layers + 4):
            if place in self.places:
                hidden_BTD = self._layer(place)(hidden_BTD)
        return hidden_BTD if self.is_last else (hidden_BTD, packed)

    @property
    def is_last(self) -> bool:
        return self.places.stop == self.config.num_layers + 5

    def own_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this stage takes of the whole model's ``state``, under DeepSpeed's names; what no stage takes stays, to be complained of."""
        own = {weight_name(name): name for name, _ in self.named_parameters()}
        elsewhere = set(range(self.config.num_layers + 5)) - set(self.places)
        return {own.get(name, name): value for name, value in state.items() if name in own or place_of(name) not in elsewhere}

    def _layer(self, place: int) -> Any:
        return self.forward_funcs[place - self.places.start]

    def _blocks(self) -> list[nn.Module]:
        return [self._layer(place) for place in self.places if FIRST_BLOCK <= place < FIRST_BLOCK + self.config.num_layers]

    def _unpacked(self, packed: Tensor) -> TokenLayout:
        return TokenLayout.unpack(
            packed,
            self._pattern,
            length=self.config.seq_length,
            has_padding=self._pattern.padding_id is not None and not self._pattern.reference_padding,
            document_end_id=self._document_end_id,
        )

    def _embedded(self, layout: TokenLayout, positions: Positions) -> Tensor:
        embedding = cast(Embedding, self._layer(EMBEDDING))
        if embedding.position_embeddings is not None:
            positions.check_embedded(self.config.max_position_embeddings, offset=self.config.opt_pos_emb_offset)
        return embedding(layout.ids, positions.embedded)

    def _check_parts(self, method: str) -> None:
        """Every process sees all parts, so all of them raise."""
        has_weights = [EMBEDDING, *range(FIRST_BLOCK, FIRST_BLOCK + self.config.num_layers), self.config.num_layers + 3, self.config.num_layers + 4]
        for stage, (start, stop) in enumerate(zip(self.parts, self.parts[1:], strict=False)):
            if not any(start <= place < stop for place in has_weights):
                raise ValueError(
                    f"pipe_partition_method {method!r} leaves stage {stage} of {self.num_stages} without layers: use fewer stages "
                    "(pipe_parallel_size) or another method, such as parameters."
                )

    def _mark_what_counts(self, mesh: Mesh) -> None:
        """Marks the parameters that belong to the gradient's norm on this process, each once over all.

        In fp32 without ZeRO DeepSpeed clips by the parameters of the first stage and those marked as `model_parallel`, so that without the marks
        it clips by too small a norm. Everywhere else it goes by `ds_pipe_replicated`, its own mark of the tied embeddings' copy.
        """
        for parameter in self.parameters():
            if parameter.ds_pipe_replicated:
                parameter.model_parallel = parameter.tensor_model_parallel = False
            elif mesh.tensor.rank == 0:
                parameter.model_parallel = True

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        """DeepSpeed sends the tied embeddings to their copy, when they are made and loaded. It forgets to keep autograd out of it."""
        super()._synchronize_tied_weights()

    def _count_layer_params(self) -> list[int]:
        """What DeepSpeed cuts `parameters` into equal parts by. It would give every layer of the model its memory in order to count."""
        return [_parameter_count(spec) if isinstance(spec, LayerSpec) else 0 for spec in self._layer_specs]


def _specifications(config: Config, mesh: Mesh) -> list[object]:
    """The layer at each place, the places of GPT-NeoX's reshaping functions included."""
    layers: list[object] = [reshape] * (config.model.num_layers + 5)
    plans = layer_plans(config.model, parallel=_tensor_parallel(config, mesh))
    for place, plan in plans.items():
        layers[place] = _Layer(NAMED[plan.kind], **plan.arguments)
    if not config.model.no_weight_tying:
        shared = {"tied_weight_attr": "word_embeddings.weight", **plans[EMBEDDING].arguments}
        layers[EMBEDDING] = _TiedLayer(TIED, EmbeddingPipe, **shared)
        layers[-1] = _TiedLayer(TIED, TiedEmbedding, forward_fn=tied_logits, **shared)
    for layer in layers:
        if isinstance(layer, _Empty):
            layer.device, layer.dtype = mesh.device, DTYPES[config.precision.precision]
    return layers


def _parameter_count(spec: LayerSpec) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LayerSpec.build(spec).parameters())


def _tensor_parallel(config: Config, mesh: Mesh) -> TensorParallel:
    return TensorParallel(axis=mesh.tensor, is_sequence_cut=config.parallel.sequence_parallel)


def _loss(logits: Tensor, labels: tuple[Tensor, Tensor], *, in_fp32: bool, shards: Axis) -> Tensor:
    return cross_entropy(logits, *labels, in_fp32=in_fp32, shards=shards)

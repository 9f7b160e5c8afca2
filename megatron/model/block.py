"""One transformer layer: attention and MLP around the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.model.mlp import MLP
from megatron.model.norms import make_norm
from megatron.model.passes import LayerPass
from megatron.model.self_attention import SelfAttention
from megatron.parallel.random import dropout
from megatron.parallel.regions import TensorParallel
from sepllm.ops.layer_norm import Affine, two_layer_norms


class Block(nn.Module):
    """One layer in one of three forms, with norms n1 and n2.

        gpt_j_residual                   x + attention(n1(x)) + mlp(n2(x))
        gpt_j_residual and gpt_j_tied    x + attention(n1(x)) + mlp(n1(x))
        neither                          y = x + attention(n1(x)), then y + mlp(n2(y))

    Dropout follows each branch, bias included. Where tensor parallelism shards the layer, the branches of the parallel residual are parts
    of sums: all shards drop the same elements of theirs, and the parts of both are summed at once.
    """

    def __init__(self, config: ModelConfig, *, layer: int, parallel: TensorParallel = TensorParallel()) -> None:
        super().__init__()
        self.parallel = parallel
        self.is_parallel = config.gpt_j_residual
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = make_norm(config.norm, config.hidden_size, epsilon=config.norm_epsilon)
        self.attention = SelfAttention(config, layer=layer, parallel=parallel)
        has_one_norm = config.gpt_j_residual and config.gpt_j_tied
        self.post_attention_layernorm = None if has_one_norm else make_norm(config.norm, config.hidden_size, epsilon=config.norm_epsilon)
        self.mlp = MLP(config, parallel=parallel)
        self.fuses_norms = config.layernorm_fusion

    def forward(self, hidden_BTD: Tensor, shared: LayerPass) -> Tensor:
        if self.is_parallel:
            first, second = self._two_norms(hidden_BTD)
            return hidden_BTD + self.parallel.left(self._dropped(self.attention(first, shared)) + self._dropped(self.mlp(second)))
        assert self.post_attention_layernorm is not None
        hidden_BTD = hidden_BTD + self._dropped(self.attention(self.input_layernorm(hidden_BTD), shared))
        return hidden_BTD + self._dropped(self.mlp(self.post_attention_layernorm(hidden_BTD)))

    def _two_norms(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Of the parallel residual's one input, for attention and for the MLP."""
        first, second = self.input_layernorm, self.post_attention_layernorm
        if second is None:
            normed = first(hidden_BTD)
            return normed, normed
        if not (self.fuses_norms and isinstance(first, nn.LayerNorm) and isinstance(second, nn.LayerNorm)):
            return first(hidden_BTD), second(hidden_BTD)
        return two_layer_norms(hidden_BTD, Affine(first.weight, first.bias), Affine(second.weight, second.bias), epsilon=first.eps)

    def _dropped(self, branch: Tensor) -> Tensor:
        is_sharded = self.parallel.is_sequence_cut and not self.is_parallel
        return dropout(branch, self.hidden_dropout, is_training=self.training, parallel=self.parallel, is_sharded=is_sharded)

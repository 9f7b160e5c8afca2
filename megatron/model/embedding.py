"""The first layer: word embeddings, plus those of positions where they are learned (BiPE's places in a segment too) or sinusoidal."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.parallel.random import dropout
from megatron.parallel.regions import TensorParallel
from megatron.parallel.vocab import VocabularyEmbedding
from sepllm.positions import sinusoidal_table


class Embedding(nn.Module):
    """``dropout(word + position)``, ``[B, T, D]``; of a cut sequence, this shard's piece."""

    def __init__(self, config: ModelConfig, *, parallel: TensorParallel = TensorParallel()) -> None:
        super().__init__()
        if config.padded_vocab_size is None:
            raise ValueError("The model has no vocabulary size: give a tokenizer (vocab_file) or padded_vocab_size.")
        self.config = config
        self.parallel = parallel
        self.word_embeddings = VocabularyEmbedding(config.padded_vocab_size, config.hidden_size, parallel=parallel)
        has_table = config.pos_emb == "learned" or config.use_bipe
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size) if has_table else None

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """``ids``, ``positions`` ``[B, T]`` int64; the positions are `Positions.embedded`."""
        hidden_BTD: Tensor = self.word_embeddings(ids)
        if self.parallel.is_sequence_cut:
            positions = self.parallel.own(positions, dim=1)
        if self.position_embeddings is not None:
            hidden_BTD = hidden_BTD + self.position_embeddings(positions + self.config.opt_pos_emb_offset)
        elif self.config.pos_emb == "sinusoidal":
            hidden_BTD = hidden_BTD + sinusoidal_table(positions, self.config.hidden_size).to(hidden_BTD.dtype)
        return dropout(
            hidden_BTD,
            self.config.hidden_dropout,
            is_training=self.training,
            parallel=self.parallel,
            is_sharded=self.parallel.is_sequence_cut,
        )

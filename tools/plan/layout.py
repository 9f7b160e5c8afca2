"""How a run is laid out over devices, as one value that can be applied to a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.schema import Config
from megatron.config.vocabulary import padded_vocab_size

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    pipe: int = 1
    tensor: int = 1
    context: int = 1
    data: int = 1
    zero_stage: int = 1
    micro_batch: int = 1
    recompute: Recompute = "none"

    @classmethod
    def of(cls, config: Config) -> Layout:
        training = config.training
        return cls(
            pipe=max(1, config.parallel.pipe_parallel_size),
            tensor=config.parallel.model_parallel_size,
            context=config.parallel.context_parallel_size,
            data=config.batch.data_parallel_size,
            zero_stage=config.parallel.zero_stage,
            micro_batch=config.batch.train_micro_batch_size_per_gpu,
            recompute=training.recompute_granularity if training.checkpoint_activations else "none",
        )

    @property
    def devices(self) -> int:
        return self.pipe * self.tensor * self.context * self.data

    @property
    def shape(self) -> tuple[int, int, int]:
        """Pipeline stages, tensor shards, pieces of a sequence."""
        return self.pipe, self.tensor, self.context

    @property
    def complexity(self) -> tuple[int, int, int]:
        """What has to be understood to run it: kinds of parallelism beside data, weights in pieces, what is computed again."""
        kinds = sum(size > 1 for size in self.shape)
        return kinds, max(self.zero_stage, 1), ("none", "selective", "full").index(self.recompute)

    def keys(self, config: Config) -> dict[str, object]:
        """The YAML keys, or members of blocks, that stand for it."""
        return {
            **self._parallel(config),
            "zero_optimization.stage": self.zero_stage,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            **self._recompute(),
        }

    def applied_to(self, config: Config) -> Config:
        """The same run with the same ``train_batch_size`` in this layout. The batch must divide."""
        total = config.batch.train_batch_size
        steps, rest = divmod(total, self.micro_batch * self.data)
        assert rest == 0, f"{total} samples do not divide into {self}"
        batch = {"train_micro_batch_size_per_gpu": self.micro_batch, "gradient_accumulation_steps": steps, "data_parallel_size": self.data}
        return config.model_copy(
            update={
                "model": config.model.model_copy(update={"padded_vocab_size": self._padded_vocab_size(config)}),
                "parallel": config.parallel.model_copy(update={**self._parallel(config), "zero_stage": self.zero_stage}),
                "batch": config.batch.model_copy(update=batch),
                "training": config.training.model_copy(update=self._recompute()),
                "runtime": config.runtime.model_copy(update={"world_size": self.devices}),
            }
        )

    def _parallel(self, config: Config) -> dict[str, object]:
        """Tensor shards cut the sequence between them wherever it divides: the same bytes are sent and less is held."""
        return {
            "pipe_parallel_size": self.pipe if self.pipe > 1 else 0,
            "model_parallel_size": self.tensor,
            "sequence_parallel": self.tensor > 1 and config.model.seq_length // self.context % self.tensor == 0,
            "context_parallel_size": self.context,
        }

    def _recompute(self) -> dict[str, object]:
        return {"checkpoint_activations": self.recompute != "none", "recompute_granularity": "selective" if self.recompute == "selective" else "full"}

    def text(self) -> str:
        sizes = {"pp": self.pipe, "tp": self.tensor, "cp": self.context, "dp": self.data}
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "dp")
        recompute = "" if self.recompute == "none" else f", {self.recompute} recompute"
        return f"{shape}, ZeRO {self.zero_stage}, micro batch {self.micro_batch}{recompute}"

    def _padded_vocab_size(self, config: Config) -> int | None:
        model = config.model
        if model.vocab_size is None:
            return model.padded_vocab_size
        return padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by, self.tensor)

"""A tiny model, a tokenizer of bytes, and a process that is alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch

from megatron.config.schema import Config
from megatron.model.gpt import GPTModel, build_model
from megatron.parallel.mesh import Mesh
from sepllm.pattern import UNBOUNDED, AttentionPattern

MakeConfig = Callable[..., Config]
MakeModel = Callable[..., GPTModel]


class ByteTokenizer:
    """Token 0 ends a document; token ``1 + b`` is byte ``b``."""

    vocab_size = 257
    eod_id = 0

    def encode(self, text: str) -> list[int]:
        return [1 + byte for byte in text.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token - 1 for token in ids if token).decode(errors="replace")

    def token_text(self, token: int) -> str:
        return self.decode([token])


SEPARATORS = frozenset({1 + byte for byte in b" .,\n"})
SPARSE = AttentionPattern(initial_tokens=2, separator_ids=SEPARATORS, windows=(4, 7))
FULL = AttentionPattern.full(2)


def tiny(
    *,
    prefill: AttentionPattern = SPARSE,
    decode: AttentionPattern | None = None,
    groups: Mapping[str, Mapping[str, object]] | None = None,
    **model: object,
) -> Config:
    """A resolved configuration of a two-layer model; ``model`` replaces fields of its group, ``groups`` of the others."""
    values: dict[str, dict[str, object]] = {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_kv_heads": 4,
            "intermediate_size": 64,
            "seq_length": 48,
            "max_position_embeddings": 48,
            "pos_emb": "rotary",
            "rotary_pct": 0.5,
            "no_weight_tying": True,
            "gpt_j_residual": True,
            "init_method_std": 0.2,
            "vocab_size": 257,
            "padded_vocab_size": 264,
        }
        | model,
        "attention": {"prefill": prefill, "decode": decode or prefill, "mode": "full" if prefill.windows[0] == UNBOUNDED else "sepllm"},
        "tokenizer": {},
        "data": {},
        "optimizer": {},
        "schedule": {"lr": 1e-3, "lr_decay_iters": 10},
        "batch": {"train_batch_size": 3, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 1, "data_parallel_size": 1},
        "precision": {},
        "parallel": {},
        "training": {"train_iters": 10},
        "checkpoint": {},
        "logging": {},
        "launch": {},
        "generation": {},
        "evaluation": {},
        "runtime": {"world_size": 1, "device": "cpu"},
    }
    return Config.model_validate({name: fields | dict((groups or {}).get(name, {})) for name, fields in values.items()})


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two threads take longer over these shapes than one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    return tiny


@pytest.fixture
def make_model() -> MakeModel:
    """``make_model(prefill=FULL)``: a model with large random weights, so that its answers are far from uniform."""

    def make(**changes: object) -> GPTModel:
        torch.manual_seed(0)
        model = build_model(tiny(**changes)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
        return model

    return make


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def alone() -> Mesh:
    return Mesh(world_size=1, rank=0, local_rank=0, device=torch.device("cpu"))


@pytest.fixture
def sparse() -> AttentionPattern:
    return SPARSE


@pytest.fixture
def full() -> AttentionPattern:
    return FULL

"""Tiny models, and transformers' own GPT-NeoX with the same weights and any mask as the definition to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, GPTNeoXConfig, GPTNeoXForCausalLM

from sepllm.hf import SepLLMGPTNeoXConfig, SepLLMGPTNeoXForCausalLM
from sepllm.pattern import SelfAdjust

PER_LAYER = {"prefill_loc_win_size_list": [2048, 3, 2]}
MODES: dict[str, dict[str, object]] = {
    "full": {"USE_ORIGINAL_FULL_ATTEN": True},
    "sepllm": {},
    "windows that differ": {"prefill_local_window_size": 5, "generate_local_window_size": 2},
    "streaming": {"streamingLLM": True, "prefill_local_window_size": 4},
    "per layer": {"USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS": True, **PER_LAYER},
    "both per layer": {
        "USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS": True,
        **PER_LAYER,
        "USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS": True,
        "generate_win_loc_size_list": [2, 4, 2048],
    },
    "diagonal": {"EXCLUDE_DIAGONAL": False},
    "no initial tokens": {"init_tok_max_idx": -1},
    "sliding": {"sliding_window_width": 6},
    "grid": {"USE_FIXED_SEP_INTERVALs": True, "fixed_sep_intervals_list": [2, 3, 4]},
    "alibi": {"pos_emb": "alibi"},
    "bilevel": {"USE_BiPE": True, "BiPE_seps": [4, 5]},
    "bilevel alibi": {"USE_BiPE": True, "BiPE_seps": [4, 5], "pos_emb": "alibi", "USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS": True, **PER_LAYER},
    "self-adjust": {"USE_SA_SOFTMAX": True, "SA_Numerator_Bias": 0.05, "SA_Denominator_Bias": 0.1},
    "self-adjust of all causal keys": {"USE_SA_SOFTMAX": True, "SA_Extremes": "causal"},
    "self-adjust, full": {"USE_SA_SOFTMAX": True, "separator_token_ids": [-1], "prefill_local_window_size": 2048},
    "raw self-adjust, bilevel": {"USE_SA_SOFTMAX_NO_DENO": True, "USE_BiPE": True, "BiPE_seps": [3], "pos_emb": "alibi"},
}


@pytest.fixture
def tiny_config() -> Callable[..., SepLLMGPTNeoXConfig]:
    def make(**changes: object) -> SepLLMGPTNeoXConfig:
        values: dict[str, object] = {
            "vocab_size": 40,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "rotary_pct": 0.5,
            "use_parallel_residual": True,
            "initializer_range": 0.3,
            "separator_token_ids": [3, 4],
            "init_tok_max_idx": 1,
            "prefill_local_window_size": 3,
            "eos_token_id": None,
            "pad_token_id": 39,
        }
        return SepLLMGPTNeoXConfig(**values | changes)

    return make


@pytest.fixture
def tiny_model(tiny_config: Callable[..., SepLLMGPTNeoXConfig]) -> Callable[..., SepLLMGPTNeoXForCausalLM]:
    def make(**changes: object) -> SepLLMGPTNeoXForCausalLM:
        torch.manual_seed(0)
        model = SepLLMGPTNeoXForCausalLM(tiny_config(**changes)).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                torch.nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.1)
        return model

    return make


@pytest.fixture(params=list(MODES))
def mode(request: pytest.FixtureRequest) -> dict[str, object]:
    return MODES[request.param]


def own_gpt_neox(model: SepLLMGPTNeoXForCausalLM) -> GPTNeoXForCausalLM:
    """transformers' GPT-NeoX with the weights of the model."""
    c = model.config
    config = GPTNeoXConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        intermediate_size=c.intermediate_size,
        hidden_act=c.hidden_act,
        max_position_embeddings=c.max_position_embeddings,
        rope_parameters=c.rope_parameters,
        use_parallel_residual=c.use_parallel_residual,
        tie_word_embeddings=c.tie_word_embeddings,
        layer_norm_eps=c.layer_norm_eps,
        attn_implementation="eager",
    )
    own = GPTNeoXForCausalLM(config).eval()
    weights = {own_name(name): value for name, value in model.state_dict().items()}
    own.load_state_dict({name: value for name, value in weights.items() if name != PLACES})
    return own


PLACES = "gpt_neox.position_embeddings.weight"
"""BiPE's embeddings of places in a segment, which GPT-NeoX lacks."""


def own_name(name: str) -> str:
    return name.replace("sepllm_gpt_neox.", "gpt_neox.").replace("embed_out.", "lm_head.")


@torch.no_grad()
def defined_logits(model: SepLLMGPTNeoXForCausalLM, text: list[int], num_prompt: int) -> Tensor:
    """Logits ``[T, V]`` of one unpadded text by definition: the first ``num_prompt`` tokens read under the prefill pattern, the rest
    under the decode pattern, pair by pair, in transformers' own blocks."""
    own, config = own_gpt_neox(model), model.config
    hidden = own.gpt_neox.embed_in(torch.tensor([text]))
    places = torch.arange(len(text))
    if config.USE_BiPE:
        places, in_segment = bilevel(text, config.BiPE_seps)
        hidden = hidden + model.sepllm_gpt_neox.position_embeddings.weight[in_segment]
    rotary = own.gpt_neox.rotary_emb(hidden, places[None])
    bias = torch.zeros(config.num_attention_heads, len(text), len(text))
    if config.pos_emb == "alibi":
        rotary = torch.ones_like(rotary[0]), torch.zeros_like(rotary[1])
        bias = -(0.25 ** torch.arange(1, 5)[:, None, None]) * (places[:, None] - places)
    prefill, decode = config.prefill_pattern(), config.decode_pattern()
    if isinstance(prefill.softmax, SelfAdjust):
        own.config._attn_implementation, own.config.self_adjust = "self_adjust", prefill.softmax
    for number, layer in enumerate(own.gpt_neox.layers):
        reads = [
            [(prefill if q < num_prompt else decode).reads(query=q, key=k, key_id=text[k], layer=number) for k in range(len(text))]
            for q in range(len(text))
        ]
        hidden = layer(hidden, attention_mask=bias.masked_fill(~torch.tensor(reads), UNREAD)[None], position_embeddings=rotary)
    return own.lm_head(own.gpt_neox.final_layer_norm(hidden))[0]


UNREAD = torch.finfo(torch.float32).min


def bilevel(text: list[int], separators: list[int]) -> tuple[Tensor, Tensor]:
    """Number of each token's segment, and its place in it (arXiv 2401.16421), counted one by one."""
    segments, places, segment, place = [], [], 0, 0
    for token in text:
        segments.append(segment)
        places.append(place)
        segment, place = (segment + 1, 0) if token in separators else (segment, place + 1)
    return torch.tensor(segments), torch.tensor(places)


def self_adjusting(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor, scaling: float, dropout: float = 0.0, **_: object
) -> tuple[Tensor, None]:
    """An attention function of transformers: the weights of the softmax times the scores, as arXiv 2502.18277 has it."""
    softmax, reads = module.config.self_adjust, attention_mask > UNREAD
    scores = q @ k.transpose(2, 3) * scaling + attention_mask.masked_fill(~reads, 0)
    weights = scores.masked_fill(~reads, UNREAD).softmax(-1).masked_fill(~reads, 0)
    if softmax.kind == "normalised":
        counts = reads if softmax.extremes == "read" else torch.ones_like(reads).tril()
        low = scores.masked_fill(~counts, torch.inf).amin(-1, keepdim=True).clamp(max=0)
        high = (scores.masked_fill(~counts, -torch.inf).amax(-1, keepdim=True) + softmax.denominator_bias).clamp(min=0) + softmax.denominator_bias
        scores = (scores - low + softmax.numerator_bias) / (high - low)
    return (weights * scores @ v).transpose(1, 2), None


AttentionInterface.register("self_adjust", self_adjusting)


@pytest.fixture
def definition() -> Callable[[SepLLMGPTNeoXForCausalLM, list[int], int], Tensor]:
    return defined_logits


@pytest.fixture
def same_weights() -> Callable[[SepLLMGPTNeoXForCausalLM], GPTNeoXForCausalLM]:
    return own_gpt_neox


@pytest.fixture
def random_text() -> Callable[..., list[int]]:
    """A text in which every fifth token or so is a separator."""

    def make(length: int, *, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 39, (length,), generator=generator)
        separators = torch.randint(3, 5, (length,), generator=generator)
        return torch.where(torch.rand(length, generator=generator) < 0.2, separators, ids).tolist()

    return make


@pytest.fixture
def saved(tmp_path: Path, tiny_model: Callable[..., SepLLMGPTNeoXForCausalLM]) -> Path:
    """A folder with a saved tiny model."""
    tiny_model().save_pretrained(tmp_path / "saved-1.0")
    return tmp_path / "saved-1.0"

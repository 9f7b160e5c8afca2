"""Every attention and position mode the way a user takes it: YAML, training, a resume, conversion, transformers, generation."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from megatron.config.loader import load_config
from megatron.config.schema import Config
from megatron.inference.loading import load_model
from megatron.inference.sampler import generate
from megatron.training.trainer import train
from sepllm.hf import SepLLMGPTNeoXForCausalLM
from tests.megatron.training.running import losses_of, same_weights, weights_of, without_launcher
from tools.ckpts.convert_neox_to_hf import Converted, convert
from tools.ckpts.saved_config import run_config

BASE: dict[str, object] = {
    "num-layers": 3,
    "hidden-size": 32,
    "num-attention-heads": 4,
    "seq-length": 64,
    "max-position-embeddings": 64,
    "pos-emb": "rotary",
    "rotary_pct": 0.5,
    "no-weight-tying": True,
    "gpt_j_residual": True,
    "hidden-dropout": 0.1,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01, "betas": [0.9, 0.95]}},
    "precision": "fp32",
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "gas": 2,
    "train-iters": 20,
    "lr-decay-iters": 20,
    "eval-interval": 100,
    "eval-iters": 0,
    "checkpoint-factor": 10,
    "tokenizer-type": "CharLevelTokenizer",
    "split": "80,10,10",
    "num-workers": 0,
}
SEPARATORS = {"separator_token_ids": [44, 46, 50], "init_tok_max_idx": 1}
SEPLLM = {**SEPARATORS, "prefill_local_window_size": 8, "generate_local_window_size": 8}
PREFILL_LIST, GENERATE_LIST = "prefill_loc_win_size_list", "generate_win_loc_size_list"
PER_LAYER = {**SEPARATORS, "USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS": True, "USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS": True}
BIPE = {"USE_BiPE": True, "BiPE_seps": [44, 46, 51, 52]}

MODES: dict[str, dict[str, object]] = {
    "full": {"USE_ORIGINAL_FULL_ATTEN": True},
    "streaming": {"streamingLLM": True, "init_tok_max_idx": 1, "prefill_local_window_size": 8, "generate_local_window_size": 8},
    "sepllm": SEPLLM,
    "H": {**PER_LAYER, PREFILL_LIST: [2048, 8, 8], GENERATE_LIST: [2048, 8, 8]},
    "HT": {**PER_LAYER, PREFILL_LIST: [2048, 8, 2048], GENERATE_LIST: [2048, 8, 2048]},
    "fixllm": {**SEPLLM, "USE_FIXED_SEP_INTERVALs": True, "fixed_sep_intervals_list": [5, 6, 7]},
    "self-adjust": {"USE_SA_SOFTMAX": True, "SA_Numerator_Bias": 1e-10, "SA_Denominator_Bias": 1e-7},
    "self-adjust over separators": {**SEPLLM, "USE_SA_SOFTMAX": True, "SA_Extremes": "causal"},
    "raw self-adjust": {"USE_SA_SOFTMAX_NO_DENO": True},
    "raw self-adjust over separators": {**SEPLLM, "USE_SA_SOFTMAX_NO_DENO": True},
    "bilevel rotary": {**SEPLLM, **BIPE},
    "bilevel alibi": {**SEPLLM, **BIPE, "pos-emb": "alibi"},
    "bilevel self-adjust": {**SEPLLM, **BIPE, "pos-emb": "alibi", "USE_SA_SOFTMAX": True},
    "alibi": {**SEPLLM, "pos-emb": "alibi"},
    "packed documents": {**SEPLLM, **BIPE, "reset_attention_mask": True},
}
CLOSE = {"rtol": 0.0, "atol": 1e-4}


def resolved(keys: dict[str, object], folder: Path, prefix: str, *, world_size: int = 1, **overrides: object) -> Config:
    """The configuration of a file with the base keys and these, saving below ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {**BASE, **keys, "data-path": prefix, "save": str(folder / "save")}
    (folder / "run.yml").write_text(json.dumps(content))
    return load_config([folder / "run.yml"], overrides=overrides, world_size=world_size, device="cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    config: Config
    folder: Path
    converted: Converted

    @property
    def save(self) -> Path:
        return self.folder / "save"

    def transformers_model(self) -> SepLLMGPTNeoXForCausalLM:
        model = AutoModelForCausalLM.from_pretrained(self.converted.directory).eval()
        assert isinstance(model, SepLLMGPTNeoXForCausalLM)
        return model


@pytest.fixture(scope="module", params=list(MODES))
def trained(request: pytest.FixtureRequest, token_prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of 20 steps of each mode, and the transformers folder made from what it saved."""
    folder = tmp_path_factory.mktemp("mode")
    config = resolved(MODES[request.param], folder, token_prefix)
    with without_launcher():
        train(config)
    saved = run_config(folder / "save")
    return Trained(config=config, folder=folder, converted=convert(saved, input_dir=folder / "save", output_dir=folder / "hf", save_tokenizer=False))


def text(rows: int, length: int) -> Tensor:
    return torch.randint(32, 60, (rows, length), generator=torch.Generator().manual_seed(0))


def test_it_learns(trained: Trained) -> None:
    losses = losses_of(trained.config)
    assert len(losses) == 20
    assert sum(losses[-5:]) < sum(losses[:5]) - 1


def test_a_resumed_run_repeats_the_losses_and_weights(trained: Trained, token_prefix: str, tmp_path: Path) -> None:
    keys = json.loads((trained.folder / "run.yml").read_text())
    second = resolved(keys, tmp_path, token_prefix, load=str(trained.save), iteration=10)
    train(second)
    assert losses_of(second) == losses_of(trained.config)[10:]
    assert same_weights(weights_of(second, 20), weights_of(trained.config, 20))


def test_the_transformers_folder_gives_the_same_logits(trained: Trained) -> None:
    assert trained.converted.largest_difference is not None
    assert trained.converted.largest_difference < 1e-5
    config = trained.transformers_model().config
    assert (config.prefill_pattern(), config.decode_pattern()) == (trained.config.attention.prefill, trained.config.attention.decode)


@torch.no_grad()
def test_decoding_with_a_cache_is_reading_the_text_anew(trained: Trained) -> None:
    model, ids = trained.transformers_model(), text(2, 40)
    cache = DynamicCache()
    parts = [model(part, past_key_values=cache).logits for part in ids.split([16, 9, *[1] * 15], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids, use_cache=False).logits, **CLOSE)


def test_both_models_write_the_same_text(trained: Trained) -> None:
    attention, prompt = trained.config.attention, text(1, 20)
    theirs = trained.transformers_model().generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False, eos_token_id=None
    )
    ours = load_model(
        trained.config.model_copy(update={"checkpoint": trained.config.checkpoint.model_copy(update={"load": str(trained.save)})}),
        torch.device("cpu"),
    )
    for recompute in (False, True):
        (completion,) = generate(
            ours.model,
            prompt.tolist(),
            prefill=attention.prefill,
            decode=attention.decode,
            maximum_tokens=10,
            max_length=64,
            recompute=recompute,
        )
        assert theirs[0, 20:].tolist() == list(completion.ids)


@pytest.mark.parametrize("mode", ["self-adjust over separators", "raw self-adjust", "bilevel alibi", "bilevel rotary"])
def test_it_trains_in_bfloat16(mode: str, token_prefix: str, tmp_path: Path) -> None:
    """The reference's self-adjust softmax runs in fp16 alone."""
    config = resolved({**MODES[mode], "precision": "bfloat16", "train-iters": 5}, tmp_path, token_prefix)
    train(config)
    losses = losses_of(config)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("mode", ["fixllm", "streaming"])
def test_the_kept_ratio_that_is_logged_is_the_patterns(mode: str, token_prefix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both patterns keep the same pairs whatever the text says."""
    config = resolved({**MODES[mode], "PRINT_KV_RATIO": True, "print_ratio_intervals": 1, "train-iters": 1}, tmp_path, token_prefix)
    train(config)
    said = re.search(r"kept/total of the KV: ([\d.]+) .*kept/total of the attention map: ([\d.]+) ", capfd.readouterr().out)
    assert said is not None
    pattern, length = config.attention.prefill, config.model.seq_length
    reads = [[pattern.reads(query=q, key=k, key_id=9, layer=layer) for k in range(length)] for layer in range(3) for q in range(length)]
    assert float(said[1]) == pytest.approx(sum(map(sum, reads[length - 1 :: length])) / (3 * length), abs=5e-5)
    assert float(said[2]) == pytest.approx(sum(map(sum, reads)) / (3 * length * (length + 1) / 2), abs=5e-5)

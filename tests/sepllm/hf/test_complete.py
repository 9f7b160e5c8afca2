"""Text from a converted model is the text of its checkpoint: the same loop, the same draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from megatron.config.loader import load_config
from megatron.config.schema import Config
from megatron.inference.loading import load_model
from megatron.inference.sampler import generate
from megatron.model.gpt import GPTModel, build_model
from sepllm.completion import Completion
from sepllm.hf import SepCache, SepLLMGPTNeoXForCausalLM, complete
from sepllm.sampling import Sampling
from tools.ckpts.convert_neox_to_hf import convert

PROMPTS = ([65], [72, 46, 33, 32, 97, 44, 104], [46, 100, 101, 102, 32, 104, 44, 105, 106, 107, 46, 109, 110])
SAMPLED = Sampling(temperature=0.8, top_k=40, top_p=0.9)
TOKENS = 30
MODES: dict[str, dict[str, object]] = {
    "full": {"USE_ORIGINAL_FULL_ATTEN": True},
    "sepllm": {"generate_local_window_size": 8},
    "a narrower window in decoding": {"generate_local_window_size": 3},
    "windows by layer": {
        "USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS": True,
        "prefill_loc_win_size_list": [64, 4],
        "USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS": True,
        "generate_win_loc_size_list": [5, 2],
    },
    "streaming": {"streamingLLM": True, "generate_local_window_size": 8},
}
SETTINGS: dict[str, object] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "no_weight_tying": True,
    "tokenizer_type": "CharLevelTokenizer",
    "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
    "train_micro_batch_size_per_gpu": 2,
    "train_iters": 10,
    "separator_token_ids": [32, 44, 46],
    "prefill_local_window_size": 8,
    "init_method_std": 0.2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Both:
    """A checkpoint's model, and what became of it."""

    config: Config
    model: GPTModel
    converted: SepLLMGPTNeoXForCausalLM

    def from_checkpoint(self, **options: object) -> list[Completion]:
        attention = self.config.attention
        return generate(
            self.model,
            PROMPTS,
            prefill=attention.prefill,
            decode=attention.decode,
            maximum_tokens=TOKENS,
            max_length=64,
            **options,  # type: ignore[arg-type]
        )

    def from_converted(self, **options: object) -> list[Completion]:
        return complete(self.converted, PROMPTS, maximum_tokens=TOKENS, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=list(MODES))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("both")
    return make_both(folder, MODES[request.param])


def make_both(folder: Path, changes: Mapping[str, object]) -> Both:
    path = folder / "run.yml"
    path.write_text(yaml.safe_dump(SETTINGS | changes | {"load": str(folder / "checkpoints")}))
    config = load_config([path], world_size=1, device="cpu")
    step = folder / "checkpoints" / "global_step3"
    step.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save({"module": build_model(config).state_dict()}, step / "mp_rank_00_model_states.pt")
    convert(config, input_dir=step, output_dir=folder / "hf", save_tokenizer=False, verify=False)
    return Both(
        config=config, model=load_model(config, torch.device("cpu")).model, converted=AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    )


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_gets_the_same_text_before_and_after_conversion(both: Both, sampling: Sampling) -> None:
    """Rows end at different places, and the draws of the others go on as if they were alone in the batch."""
    unstopped = both.from_checkpoint(sampling=sampling, generator=seeded(), vocab_size=300)
    stop = {unstopped[1].ids[5]}
    ours = both.from_checkpoint(sampling=sampling, generator=seeded(), stop_ids=stop, vocab_size=300)
    theirs = both.from_converted(sampling=sampling, generator=seeded(), stop_ids=stop, vocab_size=300)
    assert [(row.ids, row.finished) for row in theirs] == [(row.ids, row.finished) for row in ours]
    assert len({row.ids for row in ours}) == 3
    assert {len(row.ids) for row in ours} != {TOKENS}


def test_the_logits_of_each_choice_agree(both: Both) -> None:
    ours, theirs = both.from_checkpoint(return_logits=True), both.from_converted(return_logits=True)
    for one, other in zip(ours, theirs, strict=True):
        assert one.logits is not None
        assert other.logits is not None
        assert torch.allclose(one.logits, other.logits, atol=1e-4)


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_transformers_own_generate_draws_the_same_text_from_the_same_seed(both: Both, sampling: Sampling) -> None:
    """Where no row ends before the others: its generate draws for rows that are done, too."""
    prompt = torch.tensor([PROMPTS[2]])
    generator = torch.Generator().manual_seed(3)
    ours = complete(both.converted, [PROMPTS[2]], maximum_tokens=TOKENS, sampling=sampling, generator=generator)
    options: dict[str, object] = {"do_sample": False}
    if sampling.temperature:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    torch.manual_seed(3)
    text = both.converted.generate(prompt, max_new_tokens=TOKENS, eos_token_id=None, pad_token_id=0, **options)
    assert text[0, len(PROMPTS[2]) :].tolist() == list(ours[0].ids)


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_a_sep_cache_that_drops_nothing_changes_no_text_of_full_attention(tmp_path: Path, sampling: Sampling) -> None:
    both = make_both(tmp_path, MODES["full"])
    sizes = {"separator_token_ids": [32, 44, 46], "PADDING_ID": 0, "layer_num": 2, "USE_MAX_SEP_CACHE": True}
    cache = SepCache(init_cache_size=2, sep_cache_size=4, local_size=8, cache_size=64, **sizes)  # type: ignore[arg-type]
    ours = both.from_checkpoint(sampling=sampling, generator=seeded())
    theirs = both.from_converted(sampling=sampling, generator=seeded(), cache=cache)
    assert [row.ids for row in theirs] == [row.ids for row in ours]


def test_of_a_prompt_only_the_last_logits_are_computed(tmp_path: Path) -> None:
    both = make_both(tmp_path, MODES["sepllm"])
    lengths: list[int] = []
    both.converted.embed_out.register_forward_hook(lambda module, args, logits: lengths.append(logits.shape[1]))
    both.from_converted()
    assert lengths == [1] * TOKENS


def test_rows_leave_a_small_sep_cache_without_changing_the_others(tmp_path: Path) -> None:
    both = make_both(tmp_path, MODES["sepllm"])
    sizes = {"separator_token_ids": [32, 44, 46], "PADDING_ID": 0, "layer_num": 2, "USE_MAX_SEP_CACHE": True}

    def written(prompts: tuple[list[int], ...], **options: object) -> list[tuple[int, ...]]:
        cache = SepCache(init_cache_size=2, sep_cache_size=4, local_size=5, cache_size=14, **sizes)  # type: ignore[arg-type]
        return [row.ids for row in complete(both.converted, prompts, maximum_tokens=TOKENS, cache=cache, **options)]  # type: ignore[arg-type]

    stop = {written(PROMPTS)[1][5]}
    assert written(PROMPTS, stop_ids=stop) == [written((prompt,), stop_ids=stop)[0] for prompt in PROMPTS]


def test_what_cannot_be_continued_is_said(tmp_path: Path) -> None:
    both = make_both(tmp_path, {})
    with pytest.raises(ValueError, match="Prompt 1 has no tokens"):
        complete(both.converted, [[5], []], maximum_tokens=2)
    with pytest.raises(ValueError, match="Prompt 0 has 65 tokens, but the model reads at most 64"):
        complete(both.converted, [[5] * 65], maximum_tokens=2)
    cache = SepCache(layer_num=2, separator_token_ids=[32], PADDING_ID=0)
    complete(both.converted, [[5]], maximum_tokens=2, cache=cache)
    with pytest.raises(ValueError, match="give an empty one"):
        complete(both.converted, [[5]], maximum_tokens=2, cache=cache)

"""A SepCache in a model that was trained as SepLLM: it says what later tokens read, as it does in GPT-NeoX with the same weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sepllm.hf import SepCache, SepLLMGPTNeoXForCausalLM, attach
from sepllm.streaming.model import as_gpt_neox

Make = Callable[..., SepLLMGPTNeoXForCausalLM]
Text = Callable[..., list[int]]
SIZES: dict[str, object] = {"init_cache_size": 2, "sep_cache_size": 4, "local_size": 6, "cache_size": 20, "USE_MAX_SEP_CACHE": True}
SIZES |= {"layer_num": 3, "separator_token_ids": [3, 4], "PADDING_ID": 39}
NEW = 40


def padded(random_text: Text) -> tuple[Tensor, Tensor]:
    """Two prompts, the second one shorter, with padding before it."""
    texts = [random_text(25), random_text(14, seed=1)]
    ids = torch.tensor([[39] * (25 - len(text)) + text for text in texts])
    return ids, torch.tensor([[0] * (25 - len(text)) + [1] * len(text) for text in texts])


@pytest.mark.parametrize("changes", [{}, {"APPLY_PE_SHIFT": True}, {"cache_size": [20, 30, 25]}, {"compress_prefill": True}], ids=str)
@pytest.mark.parametrize("beams", [1, 2])
def test_generates_what_an_attached_gpt_neox_of_these_weights_generates(
    tiny_model: Make, random_text: Text, changes: dict[str, object], beams: int
) -> None:
    model, (ids, mask) = tiny_model(max_position_embeddings=128), padded(random_text)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "num_beams": beams, "pad_token_id": 39}
    with attach(as_gpt_neox(model), model.config.prefill_pattern()) as other:
        expected = other.model.generate(ids, past_key_values=SepCache(**SIZES | changes), **options)
    cache = SepCache(**SIZES | changes)
    assert model.generate(ids, past_key_values=cache, **options).tolist() == expected.tolist()
    assert cache.get_usable_length() < 25 + NEW
    assert cache.kv_ratio() < 1


@pytest.mark.parametrize("changes", [{}, {"streamingLLM": True}, {"USE_SA_SOFTMAX": True}, {"sliding_window_width": 6}], ids=str)
def test_while_nothing_is_dropped_later_tokens_read_everything(tiny_model: Make, random_text: Text, changes: dict[str, object]) -> None:
    everything = {"generate_local_window_size": 128}
    model, ids = tiny_model(max_position_embeddings=128, **everything | changes), torch.tensor([random_text(20)])
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert (
        model.generate(ids, max_new_tokens=NEW, do_sample=False, past_key_values=SepCache(**SIZES | {"cache_size": 100})).tolist()
        == expected.tolist()
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"USE_BiPE": True, "BiPE_seps": [3]}, r"bilevel positions \(USE_BiPE\) count the separators"),
        ({"pos_emb": "alibi"}, "pos_emb is alibi"),
        ({"pos_emb": "learned"}, "pos_emb is learned"),
        ({"USE_SA_SOFTMAX": True, "SA_Extremes": "causal"}, "SA_Extremes: causal looks at the scores of all keys"),
    ],
)
def test_what_a_sep_cache_does_not_remember_is_refused_by_name(tiny_model: Make, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot use the SepCache: .*{reason}"):
        tiny_model(**changes)(torch.tensor([[5, 6]]), past_key_values=SepCache(**SIZES))


def test_a_cache_that_does_not_fit_the_model_is_refused(tiny_model: Make) -> None:
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="made for layer_num 3, but the model has 2 layers"):
        tiny_model(num_hidden_layers=2)(ids, past_key_values=SepCache(**SIZES))
    with pytest.raises(ValueError, match="leave APPLY_PES_INSIDE on"):
        tiny_model()(ids, past_key_values=SepCache(**SIZES, APPLY_PE_SHIFT=True, APPLY_PES_INSIDE=False))
    with pytest.raises(ValueError, match="reference_compat is set, and this model has a sliding window"):
        tiny_model(sliding_window_width=4)(ids, past_key_values=SepCache(**SIZES, reference_compat=True))


def test_a_failed_pass_leaves_the_cache_to_direct_calls(tiny_model: Make) -> None:
    model, cache = tiny_model(), SepCache(**SIZES)
    with pytest.raises(IndexError):
        model(torch.tensor([[5, 60]]), past_key_values=cache)
    with pytest.raises(ValueError, match="needs the token ids"):
        cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)


def test_attach_says_that_it_is_not_needed(tiny_model: Make) -> None:
    with pytest.raises(ValueError, match="takes a SepCache as it is: leave attach out"):
        attach(tiny_model())

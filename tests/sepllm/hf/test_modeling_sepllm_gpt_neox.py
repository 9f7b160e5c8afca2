"""The model against definitions: transformers' own GPT-NeoX, the pattern pair by pair, and itself row by row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GPTNeoXForCausalLM, StaticCache
from transformers.utils import logging as transformers_logging

from sepllm.hf import SepLLMGPTNeoXForCausalLM

Make = Callable[..., SepLLMGPTNeoXForCausalLM]
Text = Callable[..., list[int]]
Definition = Callable[[SepLLMGPTNeoXForCausalLM, list[int], int], Tensor]
CLOSE = {"rtol": 0.0, "atol": 1e-5}
STATES = ({}, {"USE_BiPE": True, "BiPE_seps": [4, 9]}, {"USE_BiPE": True, "BiPE_seps": [4, 9], "pos_emb": "alibi"}, {"USE_SA_SOFTMAX": True})
"""What a cache has to go on with: separators and places, or the numbers of segments too."""


@torch.no_grad()
def cached_logits(model: SepLLMGPTNeoXForCausalLM, text: list[int], chunks: list[int], cache: DynamicCache | None = None) -> Tensor:
    """Logits ``[T, V]`` of a text that is fed in chunks of these lengths."""
    cache = DynamicCache() if cache is None else cache
    parts = torch.tensor([text]).split(chunks, dim=1)
    return torch.cat([model(part, past_key_values=cache).logits[0] for part in parts])


def padded(texts: list[list[int]], *, side: str) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of a padded batch."""
    length = max(map(len, texts))
    ids = torch.full((len(texts), length), 39)
    mask = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(length - len(text), length)
        ids[row, where], mask[row, where] = torch.tensor(text), 1
    return ids, mask


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_full_attention_is_transformers_gpt_neox_forward_and_backward(
    tiny_model: Make,
    same_weights: Callable[[SepLLMGPTNeoXForCausalLM], GPTNeoXForCausalLM],
    random_text: Text,
    parallel: bool,
    tied: bool,
    activation: str,
) -> None:
    model = tiny_model(USE_ORIGINAL_FULL_ATTEN=True, use_parallel_residual=parallel, tie_word_embeddings=tied, hidden_act=activation)
    own = same_weights(model)
    ids = torch.tensor([random_text(50), random_text(50, seed=1)])
    ours, theirs = model(ids, labels=ids), own(ids, labels=ids)
    torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
    torch.testing.assert_close(ours.loss, theirs.loss, **CLOSE)
    ours.loss.backward()
    theirs.loss.backward()
    gradients = {name.replace("gpt_neox.", "sepllm_gpt_neox.").replace("lm_head", "embed_out"): p.grad for name, p in own.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("length", [20, 48])
def test_prompts_read_the_prefill_pattern(tiny_model: Make, definition: Definition, random_text: Text, mode: dict[str, object], length: int) -> None:
    model, text = tiny_model(**mode), random_text(length)
    torch.testing.assert_close(model(torch.tensor([text])).logits[0], definition(model, text, len(text)), **CLOSE)


@pytest.mark.parametrize("chunks", [[12] + [1] * 8, [1] * 20, [1, 19], [7, 6, 1, 6]], ids=str)
def test_tokens_after_cached_ones_read_the_decode_pattern(
    tiny_model: Make, definition: Definition, random_text: Text, mode: dict[str, object], chunks: list[int]
) -> None:
    model, text = tiny_model(**mode), random_text(20)
    torch.testing.assert_close(cached_logits(model, text, chunks), definition(model, text, chunks[0]), **CLOSE)


def test_the_eager_implementation_is_the_same_mathematics(tiny_model: Make, random_text: Text, mode: dict[str, object]) -> None:
    ids = torch.tensor([random_text(48)])
    eager = tiny_model(**mode, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(ids).logits, tiny_model(**mode)(ids).logits, **CLOSE)


@pytest.mark.parametrize("pos_emb", ["learned", "alibi", "none"])
def test_other_positions_decode_as_they_score(tiny_model: Make, random_text: Text, pos_emb: str) -> None:
    model, text = tiny_model(pos_emb=pos_emb), random_text(20)
    torch.testing.assert_close(cached_logits(model, text, [9] + [1] * 11), model(torch.tensor([text])).logits[0], **CLOSE)


def test_two_conversations_on_one_model_do_not_meet(tiny_model: Make, random_text: Text) -> None:
    model = tiny_model(prefill_local_window_size=5, generate_local_window_size=2)
    texts, caches = [random_text(16, seed=seed) for seed in (1, 2)], [DynamicCache(), DynamicCache(config=model.config)]
    alone = [cached_logits(model, text, [6] + [1] * 10) for text in texts]
    with torch.no_grad():
        turns = [[model(torch.tensor([text[:6]]), past_key_values=cache).logits[0]] for text, cache in zip(texts, caches, strict=True)]
        for step in range(6, 16):
            for text, cache, logits in zip(texts, caches, turns, strict=True):
                logits.append(model(torch.tensor([[text[step]]]), past_key_values=cache).logits[0])
    for expected, logits in zip(alone, turns, strict=True):
        torch.testing.assert_close(torch.cat(logits), expected, **CLOSE)


@pytest.mark.parametrize("changes", STATES, ids=str)
def test_a_cropped_cache_goes_on_as_if_the_rest_had_never_been(tiny_model: Make, random_text: Text, changes: dict[str, object]) -> None:
    model, text, wrong = tiny_model(**changes), random_text(14), random_text(6, seed=3)
    cache = DynamicCache()
    cached_logits(model, text[:8] + wrong, [8, 6], cache)
    cache.crop(-6)
    torch.testing.assert_close(cached_logits(model, text[8:], [6], cache), cached_logits(model, text, [8, 6])[8:], **CLOSE)


@pytest.mark.parametrize("empty", [lambda cache: cache.reset(), lambda cache: cache.crop(-9)], ids=["reset", "crop"])
def test_an_emptied_cache_starts_a_new_prompt(tiny_model: Make, random_text: Text, empty: Callable[[DynamicCache], None]) -> None:
    model, cache = tiny_model(generate_local_window_size=1), DynamicCache()
    cached_logits(model, random_text(9, seed=5), [9], cache)
    empty(cache)
    text = random_text(12)
    torch.testing.assert_close(cached_logits(model, text, [8, 4], cache), cached_logits(model, text, [8, 4]), **CLOSE)


@pytest.mark.parametrize("changes", STATES, ids=str)
def test_rows_of_a_cache_can_be_selected_repeated_and_reordered(tiny_model: Make, random_text: Text, changes: dict[str, object]) -> None:
    model, cache = tiny_model(**changes), DynamicCache()
    texts = [random_text(12, seed=seed) for seed in range(3)]
    expected = [cached_logits(model, text, [8, 4])[8:] for text in texts]
    with torch.no_grad():
        model(torch.tensor([text[:8] for text in texts]), past_key_values=cache)
        cache.batch_repeat_interleave(2)  # 0 0 1 1 2 2
        cache.reorder_cache(torch.tensor([4, 0, 2, 3, 1, 5]))  # 2 0 1 1 0 2
        cache.batch_select_indices(torch.tensor([0, 2, 4]))  # 2 1 0
        logits = model(torch.tensor([texts[row][8:] for row in (2, 1, 0)]), past_key_values=cache).logits
    for row, text in enumerate((2, 1, 0)):
        torch.testing.assert_close(logits[row], expected[text], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_scores_as_its_rows(tiny_model: Make, random_text: Text, mode: dict[str, object], side: str) -> None:
    model, texts = tiny_model(**mode), [random_text(length, seed=length) for length in (41, 1, 9)]
    ids, mask = padded(texts, side=side)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        for row, text in enumerate(texts):
            torch.testing.assert_close(logits[row, mask[row].bool()], model(torch.tensor([text])).logits[0], **CLOSE)


def test_right_padding_without_a_mask_scores_as_the_rows(tiny_model: Make, random_text: Text) -> None:
    model, texts = tiny_model(), [random_text(length, seed=length) for length in (17, 1, 9)]
    ids, _ = padded(texts, side="right")
    with torch.no_grad():
        logits = model(ids).logits
        for row, text in enumerate(texts):
            torch.testing.assert_close(logits[row, : len(text)], model(torch.tensor([text])).logits[0], **CLOSE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_a_left_padded_batch_generates_what_its_rows_generate(
    tiny_model: Make, random_text: Text, mode: dict[str, object], options: dict[str, int]
) -> None:
    model = tiny_model(**mode)
    options = options | {"max_new_tokens": 8, "do_sample": False}
    texts = [random_text(length, seed=length) for length in (11, 1, 6)]
    ids, mask = padded(texts, side="left")
    together = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    alone = [model.generate(torch.tensor([text]), **options)[:, len(text) :] for text in texts]
    assert together.tolist() == torch.cat(alone).tolist()


@pytest.mark.parametrize("changes", STATES, ids=str)
def test_a_prompt_in_chunks_generates_the_same_where_the_windows_agree(tiny_model: Make, random_text: Text, changes: dict[str, object]) -> None:
    model = tiny_model(**changes)
    ids, mask = padded([random_text(length, seed=length) for length in (11, 1, 6)], side="left")
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert model.generate(ids, prefill_chunk_size=4, **options).tolist() == model.generate(ids, **options).tolist()


def test_greedy_and_sampled_text_do_not_depend_on_the_cache_where_the_windows_agree(tiny_model: Make, random_text: Text) -> None:
    model, ids = tiny_model(), torch.tensor([random_text(9)])
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 5}, {"num_beams": 4}):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(7)
            texts.append(model.generate(ids, max_new_tokens=12, use_cache=use_cache, **options).tolist())
        assert texts[0] == texts[1], options


@pytest.mark.parametrize("changes", STATES, ids=str)
def test_speculative_generation_is_plain_generation(tiny_model: Make, random_text: Text, changes: dict[str, object]) -> None:
    model, ids = tiny_model(generate_local_window_size=2, **changes), torch.tensor([random_text(9) * 2])
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert model.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4).tolist() == plain.tolist()


def test_a_second_turn_of_generate_goes_on_from_the_cache(tiny_model: Make, random_text: Text) -> None:
    model, cache = tiny_model(), DynamicCache()
    first = model.generate(torch.tensor([random_text(9)]), max_new_tokens=4, do_sample=False, past_key_values=cache)
    longer = torch.cat([first, torch.tensor([random_text(5, seed=2)])], 1)
    second = model.generate(longer, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert second.tolist() == model.generate(longer, max_new_tokens=4, do_sample=False).tolist()


def test_position_ids_are_counted_from_the_first_text_token(tiny_model: Make, random_text: Text) -> None:
    model = tiny_model()
    ids, mask = padded([random_text(9), random_text(4, seed=1)], side="left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, model(ids, attention_mask=mask, position_ids=positions).logits, **CLOSE)


def test_reference_padding_starts_initial_tokens_at_column_zero(tiny_model: Make, random_text: Text) -> None:
    model = tiny_model(reference_padding=True, streamingLLM=True, prefill_local_window_size=2)
    ids, mask = padded([random_text(9), random_text(5, seed=1)], side="left")
    with torch.no_grad():
        wrong = model(ids, attention_mask=mask).logits[1, -1]
        right = model(torch.tensor([random_text(5, seed=1)])).logits[0, -1]
        cache = DynamicCache()
        model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
        assert model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits.isfinite().all()
    assert (wrong - right).abs().max() > 1e-3


@pytest.mark.parametrize("use_cache", [True, False])
def test_trains_under_autocast(use_cache: bool, tiny_model: Make, random_text: Text) -> None:
    model, ids = tiny_model().train(), torch.tensor([random_text(30)])
    wanted = model(ids, labels=ids, use_cache=use_cache).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids, use_cache=use_cache).loss
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=0.02, atol=0)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_gradient_checkpointing_changes_no_gradient(tiny_model: Make, random_text: Text) -> None:
    ids = torch.tensor([random_text(20)])
    plain, checkpointed = tiny_model().train(), tiny_model().train()
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        model(ids, labels=ids).loss.backward()
    for (name, ours), theirs in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_hidden_states_are_those_of_every_layer(tiny_model: Make, random_text: Text) -> None:
    model = tiny_model()
    out = model(torch.tensor([random_text(7)]), output_hidden_states=True)
    assert [tuple(hidden.shape) for hidden in out.hidden_states] == [(1, 7, 32)] * 4
    torch.testing.assert_close(model.embed_out(out.hidden_states[-1]), out.logits)


def test_logits_to_keep_are_the_last_ones(tiny_model: Make, random_text: Text) -> None:
    model, ids = tiny_model(), torch.tensor([random_text(7)])
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


def test_embeddings_may_stand_for_ids_where_no_pattern_looks_at_ids(tiny_model: Make, random_text: Text) -> None:
    ids = torch.tensor([random_text(12)])
    for model in (tiny_model(USE_ORIGINAL_FULL_ATTEN=True), tiny_model(streamingLLM=True)):
        torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)
    with pytest.raises(ValueError, match="inputs_embeds do not say which tokens are separators"):
        tiny_model()(inputs_embeds=model.get_input_embeddings()(ids))


def test_tensor_names_in_memory_and_on_disk_are_the_published_ones(tiny_model: Make, saved: Path) -> None:
    names = set(load_file(saved / "model.safetensors"))
    assert names == set(tiny_model().state_dict())
    assert {"embed_out.weight", "sepllm_gpt_neox.embed_in.weight", "sepllm_gpt_neox.final_layer_norm.bias"} < names
    block = {name.removeprefix("sepllm_gpt_neox.layers.2.") for name in names if ".layers.2." in name}
    modules = "input_layernorm post_attention_layernorm attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"
    assert block == {f"{module}.{kind}" for module in modules.split() for kind in ("weight", "bias")}


def test_an_output_matrix_called_lm_head_is_accepted_and_saved_as_embed_out(saved: Path, tmp_path: Path) -> None:
    original = load_file(saved / "model.safetensors")
    renamed = original | {"lm_head.weight": original["embed_out.weight"], "sepllm_gpt_neox.layers.0.attention.masked_bias": torch.zeros(())}
    del renamed["embed_out.weight"]
    save_file(renamed, saved / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert isinstance(model, SepLLMGPTNeoXForCausalLM)
    torch.testing.assert_close(model.embed_out.weight.data, original["embed_out.weight"])
    model.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(original)


def test_tied_weights_are_one_tensor_after_a_round_trip(tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "embed_out.weight" not in load_file(tmp_path / "model.safetensors")
    again = SepLLMGPTNeoXForCausalLM.from_pretrained(tmp_path)
    assert again.embed_out.weight is again.sepllm_gpt_neox.embed_in.weight
    torch.testing.assert_close(again.embed_out.weight, model.embed_out.weight)


def test_the_ratios_are_reported_at_their_interval(tiny_model: Make, random_text: Text, caplog: pytest.LogCaptureFixture) -> None:
    model, ids = tiny_model(PRINT_KV_RATIO=True, print_ratio_intervals=2, USE_ORIGINAL_FULL_ATTEN=True), torch.tensor([random_text(8)])
    transformers_logging.enable_propagation()
    for _ in range(5):
        model(ids)
    transformers_logging.disable_propagation()
    lines = [record.message for record in caplog.records if "attention map" in record.message]
    assert len(lines) == 2
    assert lines[0].startswith("Forward pass 2: 100.00% of the attention map")


@pytest.mark.parametrize("changes", [{"USE_BiPE": True, "BiPE_seps": [3]}, {"pos_emb": "learned"}], ids=str)
def test_a_position_beyond_the_table_is_refused(tiny_model: Make, random_text: Text, changes: dict[str, object]) -> None:
    model, text = tiny_model(max_position_embeddings=8, **changes), [9] * 9
    with pytest.raises(ValueError, match="Position 8 has no embedding: max_position_embeddings is 8"):
        model(torch.tensor([text]))
    cache = DynamicCache()
    cached_logits(model, text[:8], [7, 1], cache)
    with pytest.raises(ValueError, match="Position 8 has no embedding"):
        cached_logits(model, text[8:], [1], cache)


def test_segments_may_follow_one_another_beyond_the_table(tiny_model: Make) -> None:
    model, text = tiny_model(max_position_embeddings=8, USE_BiPE=True, BiPE_seps=[3]), [9, 10, 11, 3] * 5
    torch.testing.assert_close(cached_logits(model, text, [5] + [1] * 15), model(torch.tensor([text])).logits[0], **CLOSE)


def test_bilevel_positions_are_counted_whatever_position_ids_say(tiny_model: Make, random_text: Text) -> None:
    model, ids = tiny_model(USE_BiPE=True, BiPE_seps=[3, 4]), torch.tensor([random_text(9)])
    torch.testing.assert_close(model(ids, position_ids=torch.full_like(ids, 7)).logits, model(ids).logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match="inputs_embeds do not say"):
        tiny_model(USE_BiPE=True, USE_FIXED_SEP_INTERVALs=True, fixed_sep_intervals_list=[2, 2, 2])(inputs_embeds=torch.zeros(1, 3, 32))


def test_the_table_of_bilevel_positions_has_the_published_name_and_shape(tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model(USE_BiPE=True)
    model.save_pretrained(tmp_path)
    table = load_file(tmp_path / "model.safetensors")["sepllm_gpt_neox.position_embeddings.weight"]
    assert tuple(table.shape) == (64, 32)
    torch.testing.assert_close(SepLLMGPTNeoXForCausalLM.from_pretrained(tmp_path).sepllm_gpt_neox.position_embeddings.weight, table)


def test_what_a_cache_or_mask_cannot_mean_is_refused(tiny_model: Make, random_text: Text) -> None:
    model, ids = tiny_model(), torch.tensor([random_text(8)])
    filled = DynamicCache()
    filled.update(torch.zeros(1, 4, 3, 8), torch.zeros(1, 4, 3, 8), 0)
    with pytest.raises(ValueError, match="holds keys of tokens that are not known"):
        model(ids, past_key_values=filled)
    with pytest.raises(ValueError, match="StaticCache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=16))
    with pytest.raises(ValueError, match="never forms the attention weights"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="exactly one of"):
        model()
    with pytest.raises(ValueError, match="give one entry for each"):
        model(ids, attention_mask=torch.ones(1, 5))
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="changed on tokens that are cached"):
        model(ids[:, :1], past_key_values=cache, attention_mask=torch.tensor([[0] + [1] * 8]))
    with pytest.raises(ValueError, match="between a row's text and what continues it"):
        model(ids[:, :2], past_key_values=cache, attention_mask=torch.tensor([[1] * 8 + [0, 1]]))

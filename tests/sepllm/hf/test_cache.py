"""SepCache used directly, as the reference's documentation shows it; in models it is tested with `attach`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sepllm.hf import SepCache
from sepllm.hf import cache as module
from sepllm.hf.separators import PRESETS, separators_of
from sepllm.positions import rotary_table

TRACES: list[dict[str, Any]] = json.loads((Path(__file__).parents[2] / "golden" / "sepcache.json").read_text(encoding="utf-8"))
SHIFTED: list[dict[str, Any]] = json.loads((Path(__file__).parents[2] / "golden" / "sepcache_pe_shift.json").read_text(encoding="utf-8"))


def cache_of(case: dict[str, Any], **changes: object) -> SepCache:
    params = case["params"]
    settings: dict[str, Any] = {
        "init_cache_size": params["a"],
        "sep_cache_size": params["s"],
        "local_size": params["w"],
        "cache_size": params["c"],
        "SEP_ACCUMULATION": params.get("accumulate", True),
        "USE_MAX_SEP_CACHE": params.get("use_max", False),
        "SEP_PADDING_IN_BATCH": params.get("pad_in_batch", False),
        "separator_token_ids": params["seps"],
        "PADDING_ID": 0,
        "layer_num": params.get("layers", 1),
    }
    return SepCache(**settings | changes)


def numbered(rows: int, tokens: list[int]) -> Tensor:
    """Keys ``[B, 2, T, 3]`` that say which token they belong to."""
    return torch.tensor(tokens, dtype=torch.float32)[None, None, :, None].expand(rows, 2, -1, 3).contiguous()


@pytest.mark.parametrize("case", [case for case in TRACES if not any("error" in step for step in case["steps"])], ids=lambda case: case["name"])
def test_reference_compat_stores_the_keys_of_the_published_traces(case: dict[str, Any]) -> None:
    cache, ids = cache_of(case, reference_compat=True), torch.tensor(case["ids"])
    for step in case["steps"]:
        for layer, expected in enumerate(step["layers"]):
            new = numbered(len(ids), step["tokens"])
            keys, values = cache.update(
                key_states=new, value_states=-new, input_ids=ids[:, step["tokens"]], layer_idx=layer, PREFILLING_FLAG=step["prefill"]
            )
            assert keys[:, 0, :, 0].tolist() == expected["kept"]
            assert torch.equal(values, -keys)
            assert torch.equal(cache.key_cache[layer], keys)
    assert cache.get_seq_length() == len(case["ids"][0])


def test_budgets_are_refused_at_construction_and_padding_before_it_harms() -> None:
    cases = {case["name"]: case for case in TRACES}
    with pytest.raises(ValueError, match="must be less than cache_size"):
        cache_of(cases["violates_budget"])
    for name, sizes in (("cache_size", [9, 9, 9]), ("local_size", [1])):
        with pytest.raises(ValueError, match=f"{name} has {len(sizes)} entries but layer_num is 2"):
            cache_of(cases["per_layer_sizes"], **{name: sizes})
    with pytest.raises(ValueError, match="layer_num is None"):
        SepCache(model_type="llama")
    with pytest.raises(ValueError, match="reference_compat and compress_prefill"):
        cache_of(cases["bounded"], reference_compat=True, compress_prefill=True)


@pytest.mark.parametrize("case", SHIFTED, ids=lambda case: case["name"])
@pytest.mark.parametrize("is_reference", [True, False])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_positions_are_shifted_once_and_never_written_back(case: dict[str, Any], is_reference: bool, axis: int) -> None:
    cache = cache_of(case, reference_compat=is_reference, APPLY_PE_SHIFT=True, pe_dim=case["pe_dim"], base=case["base"], k_seq_dim=axis)
    ids, num_padding = torch.tensor(case["ids"]), (torch.tensor(case["ids"]) == 0).sum(1).tolist()
    raw_keys, raw_queries = (torch.tensor(case[name])[:, None] for name in ("raw_keys", "raw_queries"))
    for number, step in enumerate(case["steps"]):
        new = step["tokens"]
        positions = torch.tensor(case["prefill_position_ids"]) if number == 0 else torch.full((len(ids), 1), new[0])
        keys, _, queries = cache.update(
            key_states=raw_keys[:, :, new].transpose(2, axis),
            value_states=raw_keys[:, :, new],
            query_states=raw_queries[:, :, new].transpose(2, axis),
            input_ids=ids[:, new],
            layer_idx=0,
            position_ids=positions,
            PREFILLING_FLAG=number == 0,
            cache_kwargs={"partial_rotation_size": case["partial_rotation_size"]},
        )
        keys, queries, stored = keys.transpose(2, axis), queries.transpose(2, axis), cache.key_cache[0].transpose(2, axis)
        if is_reference:
            kept = torch.tensor(step["kept"])[:, None, :, None].expand_as(stored)
            assert torch.equal(stored, raw_keys.gather(2, kept)), "what is stored is not rotated"
        elif any(num_padding):
            continue  # rows keep other tokens than in the reference: tests of `attach` compare them with rows alone
        torch.testing.assert_close(keys[:, 0], torch.tensor(step["keys"]), rtol=0.0, atol=2e-6)
        torch.testing.assert_close(queries[:, 0], torch.tensor(step["queries"]), rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("rows", [1, 2])
def test_cosines_from_outside_give_what_is_computed_inside(rows: int) -> None:
    size, ids = 8, torch.tensor([[5, 9, 6, 9, 7, 5, 9, 6, 7, 5, 5, 5, 9, 5]]).expand(rows, -1)
    settings: dict[str, Any] = {"separator_token_ids": [9], "PADDING_ID": 0, "layer_num": 1, "APPLY_PE_SHIFT": True, "pe_dim": size}
    settings |= {"init_cache_size": 1, "sep_cache_size": 2, "local_size": 2, "cache_size": 8, "USE_MAX_SEP_CACHE": True}
    inside, outside = SepCache(**settings), SepCache(**settings, APPLY_PES_INSIDE=False)
    angle = torch.arange(20)[:, None] * 10000.0 ** -(torch.arange(0, size, 2) / size)
    angle = torch.cat([angle, angle], -1)[None].expand(rows, -1, -1)
    q, k, v = torch.randn(3, rows, 2, 14, size, generator=torch.Generator().manual_seed(0))
    for new in (slice(0, 5), *(slice(t, t + 1) for t in range(5, 14))):
        call: dict[str, Any] = {
            "key_states": k[:, :, new],
            "value_states": v[:, :, new],
            "query_states": q[:, :, new],
            "input_ids": ids[:, new],
            "layer_idx": 0,
            "position_ids": torch.arange(14)[None, new].expand(rows, -1),
        }
        for ours, theirs in zip(inside.update(**call), outside.update(**call, cache_kwargs={"cos": angle.cos(), "sin": angle.sin()}), strict=True):
            torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="give cos and sin"):
        outside.update(**call)


def test_a_prompt_is_kept_whole_and_several_tokens_can_be_told_not_to_be_one() -> None:
    case = {case["name"]: case for case in TRACES}["prompt_longer_than_cache"]
    ids = torch.tensor(case["ids"])
    whole = cache_of(case)
    whole.update(numbered(1, list(range(12))), numbered(1, list(range(12))), 0, ids[:, :12])
    assert whole.get_usable_length() == 12
    for settings, flag in (({"compress_prefill": True}, None), ({}, False)):
        early = cache_of(case, **settings)
        keys, _ = early.update(numbered(1, list(range(12))), numbered(1, list(range(12))), 0, ids[:, :12], PREFILLING_FLAG=flag)
        assert keys.shape[2] == 12, "the prompt reads itself whole"
        assert early.key_cache[0][0, 0, :, 0].tolist() == [0, 4, 7, 9, 10, 11]


def test_how_far_keys_are_turned_is_worked_out_for_new_columns_only() -> None:
    """Until a compression or another order of rows moves the others; once for layers that store the same."""
    cache = SepCache(1, 2, 2, 16, USE_MAX_SEP_CACHE=True, separator_token_ids=[9], PADDING_ID=0, layer_num=2, APPLY_PE_SHIFT=True)
    generator, new, asked = torch.Generator().manual_seed(0), torch.zeros(2, 2, 1, 4), []

    def make(turns: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(turns.shape[1])
        return rotary_table(turns, rotary_dims=4, base=100.0, dtype=torch.float32)

    for place in range(40):
        cache.begin_pass(torch.randint(7, 11, (2, 1), generator=generator), attention_mask=torch.tensor([[place > 2], [True]]))
        for layer in range(2):
            cache.update(new, new, layer)
            found, stored = cache.pass_turns(layer, make), cache.histories[0].step.reads
            if found is not None:
                expected = rotary_table(stored.slots() - stored.positions, rotary_dims=4, base=100.0, dtype=torch.float32)
                assert all(map(torch.equal, found, expected))
        cache.end_pass()
        if place == 25:
            cache.reorder_cache(torch.tensor([1, 1]))
    assert not any(asked[1::2]), "the second layer's columns are the first one's"
    assert asked[::2].count(1) > len(asked[::2]) // 2
    assert max(asked) > 4, "a compression moved all of them"


@pytest.mark.parametrize("shifts", [False, True])
def test_layers_may_lie_on_several_devices(shifts: bool) -> None:
    """The second layer's is one that holds no numbers: it refuses tensors of another, as every device does."""
    cache = SepCache(1, 2, 2, 8, USE_MAX_SEP_CACHE=True, separator_token_ids=[9], PADDING_ID=0, layer_num=2, APPLY_PE_SHIFT=shifts, pe_dim=8)
    for place in range(20):
        ids, positions = torch.full((2, 1), 7 + place % 4), torch.full((2, 1), place)
        for layer, device in enumerate(("cpu", "meta")):
            new = torch.zeros(2, 2, 1, 8, device=device)
            read = cache.update(new, new, layer, input_ids=ids, query_states=new, position_ids=positions)
            assert {tensor.device.type for tensor in read} == {device}
    assert cache.get_usable_length() < 20


def test_rows_with_fewer_tokens_are_told_apart_by_the_mask() -> None:
    ids = torch.tensor([[0, 0, 0, 5, 9, 5], [9, 5, 9, 5, 9, 5]])
    cache = SepCache(1, 2, 2, 6, USE_MAX_SEP_CACHE=True, separator_token_ids=[9], PADDING_ID=0, layer_num=1, compress_prefill=True)
    cache.update(numbered(2, list(range(6))), numbered(2, list(range(6))), 0, ids)
    assert cache.key_mask().tolist() == [[False, False, False, True, True, True], [True] * 6]
    keys, _ = cache.update(numbered(2, [6]), numbered(2, [6]), 0, torch.tensor([[5], [5]]))
    assert [keys[row, 0, :, 0][cache.key_mask()[row]].tolist() for row in range(2)] == [[3, 4, 5, 6], [0, 2, 4, 5, 6]]
    by_mask = SepCache(1, 2, 2, 6, separator_token_ids=[9], PADDING_ID=7, layer_num=1)
    by_mask.update(numbered(2, list(range(6))), numbered(2, list(range(6))), 0, ids, cache_kwargs={"attention_mask": ids != 0})
    assert by_mask.key_mask().tolist() == [[False, False, False, True, True, True], [True] * 6]


@pytest.mark.parametrize(("k_axis", "v_axis"), [(1, 1), (2, 3), (3, 2), (1, 2)])
def test_keys_and_values_keep_their_own_layout(k_axis: int, v_axis: int) -> None:
    text = [5, 9, 6, 9, 7, 5, 9, 6, 7, 5, 5, 5, 9, 5]
    settings: dict[str, Any] = {"separator_token_ids": [9], "PADDING_ID": 0, "layer_num": 1, "init_cache_size": 1, "sep_cache_size": 2}
    settings |= {"local_size": 2, "cache_size": 8}
    plain, other = SepCache(**settings), SepCache(**settings, k_seq_dim=k_axis, v_seq_dim=v_axis)
    k, v = torch.randn(2, 1, 3, 14, 4, generator=torch.Generator().manual_seed(0))
    for new in (slice(0, 5), *(slice(t, t + 1) for t in range(5, 14))):
        ids = torch.tensor([text[new]])
        expected = plain.update(k[:, :, new], v[:, :, new], 0, ids)
        found = other.update(k[:, :, new].transpose(2, k_axis), v[:, :, new].transpose(2, v_axis), 0, ids)
        assert torch.equal(found[0], expected[0].transpose(2, k_axis))
        assert torch.equal(found[1], expected[1].transpose(2, v_axis))


def test_a_resumed_cache_goes_on_like_one_that_never_stopped() -> None:
    case = {case["name"]: case for case in TRACES}["per_layer_sizes"]
    ids, whole = torch.tensor(case["ids"]), cache_of(case)

    def step(cache: SepCache, new: list[int]) -> list[Tensor]:
        return [cache.update(numbered(1, new), numbered(1, new), layer, ids[:, new])[0] for layer in range(2)]

    step(whole, [0, 1, 2, 3])
    for token in range(4, 9):
        step(whole, [token])
    resumed = cache_of(case, past_tok_ids=whole.past_tok_ids, key_cache=whole.key_cache, value_cache=whole.value_cache, _seen_tokens=9)
    assert resumed.get_seq_length() == 9
    for token in range(9, 16):
        for ours, expected in zip(step(resumed, [token]), step(whole, [token]), strict=True):
            assert torch.equal(ours, expected)
    with pytest.raises(ValueError, match="one tensor for each of the 2 layers"):
        cache_of(case, key_cache=whole.key_cache)


def test_known_families_and_tokenizers_bring_their_separators() -> None:
    for family in PRESETS:
        SepCache(model_type=f"my-{family}-7b", layer_num=1)
    with pytest.raises(ValueError, match="'bert' is none of llama, pythia, gpt_neox, falcon"):
        SepCache(model_type="bert", layer_num=1)
    with pytest.raises(ValueError, match="Which tokens separate is not known"):
        SepCache(layer_num=1)
    words = {"<end>": 0, "a": 1, ".": 2, "Ġ.": 3, "Ġ": 4, "Ċ": 5, "▁,": 6, "<0x09>": 7, "..": 8, "Ġa": 9}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")), eos_token="<end>")
    assert separators_of(tokenizer) == ((2, 3, 4, 5, 6, 7), 0)
    SepCache(tokenizer=tokenizer, layer_num=1)


def test_deprecated_doors_still_open() -> None:
    with pytest.warns(FutureWarning, match="call SepCache"):
        cache = SepCache.from_legacy_cache(None, layer_num=1, model_type="llama")
    cache.update(numbered(1, [0, 1]), numbered(1, [0, 1]), 0, torch.tensor([[5, 6]]))
    with pytest.warns(FutureWarning, match="key_cache"):
        ((keys, _, ids, seen),) = cache.to_legacy_cache()
    assert (keys.shape, ids.tolist(), seen) == ((1, 2, 2, 3), [[5, 6]], 2)
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match="takes no past_key_values"):
        SepCache.from_legacy_cache(((keys, keys),), layer_num=1, model_type="llama")


def test_wrong_calls_are_explained() -> None:
    cache = SepCache(layer_num=2, model_type="llama")
    new = numbered(1, [0, 1])
    with pytest.raises(ValueError, match=r"update\(\.\.\., input_ids=\.\.\.\)"):
        cache.update(new, new, 0)
    with pytest.raises(ValueError, match="layer_idx"):
        cache.update(new, new, input_ids=torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="keys of 1 rows of 2 tokens"):
        cache.update(new, new, 0, torch.tensor([[5, 6, 7]]))
    cache.update(new, new, 0, torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="every layer must be updated once"):
        cache.update(new[:, :, :1], new[:, :, :1], 1, torch.tensor([[5]]))
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(ValueError, match=r"call sepllm\.hf\.attach\(model\) first"):
        model(torch.tensor([[5, 6]]), past_key_values=SepCache(layer_num=2, model_type="llama"))


def test_ratio_is_reported_every_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(module.logger, "warning", lines.append)
    cache = SepCache(layer_num=2, model_type="llama", PRINT_KV_RATIO_INSIDE=True, print_KV_inside_per_steps=2)
    for _ in range(4):
        for layer in range(2):
            cache.update(numbered(1, [0]), numbered(1, [0]), layer, torch.tensor([[5]]))
    assert lines == ["SepCache stores 100.00% of the keys (2 of 2 now).", "SepCache stores 100.00% of the keys (4 of 4 now)."]


def test_memory_is_that_of_the_budget_however_long_the_text() -> None:
    sizes = {"init_cache_size": 4, "sep_cache_size": 16, "local_size": 64, "cache_size": 128, "USE_MAX_SEP_CACHE": True}
    cache = SepCache(**sizes, separator_token_ids=[9], PADDING_ID=0, layer_num=1, compress_prefill=True)
    ids = torch.randint(5, 12, (2, 3000), generator=torch.Generator().manual_seed(0))
    cache.update(torch.zeros(2, 1, 2000, 4), torch.zeros(2, 1, 2000, 4), 0, ids[:, :2000])
    for place in range(2000, 3000):
        cache.update(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4), 0, ids[:, place, None])
        assert cache.key_cache[0].untyped_storage().nbytes() <= 2 * 256 * 4 * 4
    assert cache.get_seq_length() == 3000


def test_a_reset_cache_is_a_new_one() -> None:
    case = TRACES[0]
    ids, cache = torch.tensor(case["ids"]), cache_of(case)
    runs = []
    for _ in range(2):
        runs.append([cache.update(numbered(1, [t]), numbered(1, [t]), 0, ids[:, t, None])[0] for t in range(12)])
        cache.reset()
        assert cache.get_seq_length() == cache.get_usable_length() == 0
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_a_cache_restored_from_a_file_goes_on_like_the_one_that_was_saved(tmp_path: Path) -> None:
    text = torch.tensor([[5, 9, 6, 9, 7, 5, 9, 6, 7, 5, 5, 5, 9, 5]])
    settings: dict[str, Any] = {"separator_token_ids": [9], "PADDING_ID": 0, "layer_num": 2, "USE_MAX_SEP_CACHE": True}
    settings |= {"init_cache_size": 1, "sep_cache_size": 2, "local_size": [2, 3], "cache_size": [7, 8]}

    def read(cache: SepCache, places: range) -> list[list[float]]:
        """The keys of both layers after each token."""
        updates = [cache.update(numbered(1, [p]), -numbered(1, [p]), layer, text[:, p : p + 1])[0] for p in places for layer in range(2)]
        return [keys[0, 0, :, 0].tolist() for keys in updates]

    saved, restored = SepCache(**settings), SepCache(**settings)
    read(saved, range(9))
    torch.save(saved.state(), tmp_path / "cache.pt")
    restored.restore(torch.load(tmp_path / "cache.pt", weights_only=True), "cpu")
    assert read(restored, range(9, 14)) == read(saved, range(9, 14))
    assert restored.kv_ratio() == saved.kv_ratio()
    with pytest.raises(ValueError, match="without reference_compat"):
        SepCache(**settings, reference_compat=True).state()

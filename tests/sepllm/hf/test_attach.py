"""Attached models against definitions: the model's own attention under masks that are written out pair by pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    CohereConfig,
    DynamicCache,
    FalconConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertDecoderConfig,
    MptConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from sepllm.hf import SepCache, attach, attachment_of, detach
from sepllm.hf.falcon import use_interface
from sepllm.pattern import AttentionPattern

VOCAB, LAYERS = 40, 3
SEPARATORS = (3, 4)
SLIDING = 7
CLOSE = {"rtol": 0.0, "atol": 2e-5}
END_TOKENS = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")

_SHARED = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "initializer_range": 0.25}
_SHARED |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
_GLU = _SHARED | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_GLU),
    "gpt_neox": lambda: GPTNeoXConfig(**_SHARED, intermediate_size=48, rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    "falcon": lambda: FalconConfig(**_SHARED, new_decoder_architecture=False, multi_query=True, parallel_attn=True),
    "falcon new": lambda: FalconConfig(**_SHARED, new_decoder_architecture=True, num_kv_heads=2),
    "mistral": lambda: MistralConfig(**_GLU, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_GLU),
    "gemma": lambda: GemmaConfig(**_GLU, head_dim=16),
    "mistral sliding": lambda: MistralConfig(**_GLU, sliding_window=SLIDING),
    "qwen2 sliding": lambda: Qwen2Config(**_GLU, use_sliding_window=True, sliding_window=SLIDING, max_window_layers=1),
}
SIX = ("llama", "gpt_neox", "falcon", "mistral", "qwen2", "gemma")
SLIDING_LAYERS = {"mistral sliding": (0, 1, 2), "qwen2 sliding": (1, 2)}
PATTERN = AttentionPattern(initial_tokens=2, separator_ids=SEPARATORS, windows=(4, 6, 3))
SMALL = {"init_cache_size": 2, "sep_cache_size": 3, "local_size": 4, "cache_size": 12, "USE_MAX_SEP_CACHE": True}
LARGE = {"cache_size": 10**6}


def make_model(kind: str, implementation: str = "eager") -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config._attn_implementation = implementation
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") and kind != "gemma" else 0.0, 0.1)
    return model


def cache_of(**changes: object) -> SepCache:
    return SepCache(**{"layer_num": LAYERS, "separator_token_ids": SEPARATORS, "PADDING_ID": 0} | SMALL | changes)


def random_text(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (length,), generator=generator)
    return torch.where(torch.rand(length, generator=generator) < 0.3, 3, ids).tolist()


def padded(texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of a batch that is padded on the left."""
    length = max(map(len, texts))
    ids = torch.tensor([[0] * (length - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (length - len(text)) + [1] * len(text) for text in texts])
    return ids, mask


@torch.no_grad()
def defined_logits(kind: str, text: list[int], reads: Tensor) -> Tensor:
    """Logits ``[T, V]`` of the model's own eager attention, where query q of a layer reads key k if ``reads[layer, q, k]``.

    The model makes the same mask for all layers, so each layer is given its own by a hook.
    """
    model = make_model(kind)
    allowed = reads & torch.ones(len(text), len(text), dtype=torch.bool).tril()
    for layer in SLIDING_LAYERS.get(kind, ()):
        allowed[layer] &= torch.ones(len(text), len(text), dtype=torch.bool).triu(1 - SLIDING)

    def use_own_mask(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[tuple[object, ...], dict[str, object]]:
        bias = torch.zeros(1, 1, len(text), len(text)).masked_fill(~allowed[module.layer_idx], torch.finfo(torch.float32).min)
        return args, kwargs | {"attention_mask": bias}

    for module in model.modules():
        if hasattr(module, "layer_idx") and "Attention" in type(module).__name__:
            module.register_forward_pre_hook(use_own_mask, with_kwargs=True)
    return model(torch.tensor([text]), use_cache=False).logits[0]


def pattern_reads(text: list[int], pattern: AttentionPattern, decode: AttentionPattern | None = None, num_prompt: int = 10**9) -> Tensor:
    reads = torch.zeros(LAYERS, len(text), len(text), dtype=torch.bool)
    for layer, q, k in product(range(LAYERS), range(len(text)), range(len(text))):
        now = pattern if q < num_prompt else decode or pattern
        reads[layer, q, k] = now.reads(query=q, key=k, key_id=text[k], layer=layer)
    return reads


def cache_reads(
    text: list[int],
    num_prompt: int,
    sizes: list[tuple[int, int, int, int]],
    *,
    pattern: AttentionPattern | None = None,
    compress_prefill: bool = False,
) -> Tensor:
    """What each query reads if the prompt reads under the pattern and every later token what a bounded cache of these sizes has kept."""
    reads = torch.ones(LAYERS, len(text), len(text), dtype=torch.bool) if pattern is None else pattern_reads(text, pattern)
    for layer, (a, s, w, c) in enumerate(sizes):
        stored: list[int] = list(range(num_prompt))

        def compressed(stored: list[int], newest: int, a: int = a, s: int = s, w: int = w, c: int = c) -> list[int]:
            if len(stored) < c:
                return stored
            separators = [p for p in stored if a <= p <= newest - w and text[p] in SEPARATORS]
            return list(range(a)) + separators[-s:] + list(range(newest - w + 1, newest + 1))

        if compress_prefill:
            stored = compressed(stored, num_prompt - 1)
        for place in range(num_prompt, len(text)):
            stored = compressed([*stored, place], place)
            reads[layer, place] = False
            reads[layer, place, stored] = True
    return reads


@torch.no_grad()
def stepwise_logits(model: PreTrainedModel, text: list[int], num_prompt: int, cache: object, chunk: int | None = None) -> Tensor:
    """Logits ``[T, V]``: the prompt at once or in chunks, then one token after the other."""
    pieces = torch.tensor([text[:num_prompt]]).split(chunk or num_prompt, 1) + torch.tensor([text[num_prompt:]]).split(1, 1)
    return torch.cat([model(piece, past_key_values=cache).logits[0] for piece in pieces if piece.numel()])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [*SIX, "falcon new", "mistral sliding", "qwen2 sliding"])
def test_a_large_cache_generates_what_the_model_generates_by_itself(kind: str, implementation: str) -> None:
    model = make_model(kind, implementation)
    ids, mask = padded([random_text(12), random_text(9, seed=1)])
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
    with attach(model):
        found = model.generate(ids, past_key_values=cache_of(**LARGE), **options)
        by_mask = model.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)
    torch.testing.assert_close(torch.stack(by_mask.logits), torch.stack(expected.logits), **CLOSE)


@pytest.mark.parametrize("kind", [*SIX, "falcon new", "mistral sliding", "qwen2 sliding"])
def test_a_prompt_reads_under_the_pattern(kind: str) -> None:
    text = random_text(40)
    model = make_model(kind)
    with attach(model, PATTERN), torch.no_grad():
        found = model(torch.tensor([text])).logits[0]
        uncached = model(torch.tensor([text]), use_cache=False).logits[0]
    expected = defined_logits(kind, text, pattern_reads(text, PATTERN))
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(uncached, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "falcon", "qwen2 sliding"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_tokens_after_a_dynamic_cache_read_under_the_decode_pattern(kind: str, chunk: int | None) -> None:
    text, num_prompt = random_text(40), 20
    model = make_model(kind)
    decode = AttentionPattern(initial_tokens=2, separator_ids=SEPARATORS, windows=(2, 9, 5))
    with attach(model, PATTERN, decode_pattern=decode):
        found = stepwise_logits(model, text, num_prompt, DynamicCache(config=model.config), chunk)
    expected = defined_logits(kind, text, pattern_reads(text, PATTERN, decode, chunk or num_prompt))
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("pattern", [None, PATTERN])
@pytest.mark.parametrize("compress_prefill", [False, True])
@pytest.mark.parametrize("num_prompt", [1, 5, 20])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "falcon", "gemma", "qwen2 sliding"])
def test_a_small_cache_equals_masks_of_what_it_kept(kind: str, num_prompt: int, compress_prefill: bool, pattern: AttentionPattern | None) -> None:
    text = random_text(50)
    model = make_model(kind)
    with attach(model, pattern):
        cache = cache_of(compress_prefill=compress_prefill)
        found = stepwise_logits(model, text, num_prompt, cache)
    reads = cache_reads(text, num_prompt, [(2, 3, 4, 12)] * LAYERS, pattern=pattern, compress_prefill=compress_prefill)
    torch.testing.assert_close(found, defined_logits(kind, text, reads), **CLOSE)
    assert cache.get_seq_length() == 50
    assert cache.get_usable_length() <= 11


def test_every_layer_may_have_its_own_budget() -> None:
    text, num_prompt = random_text(60), 10
    sizes = [(2, 3, 4, 12), (0, 1, 2, 9), (1, 4, 8, 30)]
    a, s, w, c = map(list, zip(*sizes, strict=True))
    model = make_model("llama")
    with attach(model):
        found = stepwise_logits(model, text, num_prompt, cache_of(init_cache_size=a, sep_cache_size=s, local_size=w, cache_size=c))
    torch.testing.assert_close(found, defined_logits("llama", text, cache_reads(text, num_prompt, sizes)), **CLOSE)


@pytest.mark.parametrize("kind", SIX)
@pytest.mark.parametrize("compress_prefill", [False, True])
@pytest.mark.parametrize("shifts", [False, True])
def test_rows_of_a_padded_batch_generate_what_they_generate_alone(kind: str, compress_prefill: bool, shifts: bool) -> None:
    model = make_model(kind)
    texts = [random_text(length, seed) for seed, length in enumerate((14, 5, 9, 1))]
    ids, mask = padded(texts)
    settings = {"compress_prefill": compress_prefill, "APPLY_PE_SHIFT": shifts}
    options = {"max_new_tokens": 25, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with attach(model, PATTERN):
        together = model.generate(ids, attention_mask=mask, past_key_values=cache_of(**settings), **options)
        for row, text in enumerate(texts):
            prompt = torch.tensor([text])
            alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache_of(**settings), **options)
            torch.testing.assert_close(torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0], rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("make_cache", [cache_of, lambda: cache_of(USE_MAX_SEP_CACHE=False), lambda: cache_of(APPLY_PE_SHIFT=True), DynamicCache])
def test_beams_carry_their_own_keys(make_cache: Callable[[], object]) -> None:
    model = make_model("llama")
    ids, mask = padded([random_text(12), random_text(9, seed=1)])
    options = {"max_new_tokens": 25, "num_beams": 3, "num_return_sequences": 3, "do_sample": False, "pad_token_id": 0}
    with attach(model, PATTERN):
        out = model.generate(ids, attention_mask=mask, past_key_values=make_cache(), output_scores=True, return_dict_in_generate=True, **options)
        for row, sequence in enumerate(out.sequences):
            text = sequence[int((mask[row // 3] == 0).sum()) :].tolist()
            num_prompt = int(mask[row // 3].sum())
            logits = stepwise_logits(model, text, num_prompt, make_cache())
            logs = logits.log_softmax(-1)[num_prompt - 1 : -1].gather(1, torch.tensor(text[num_prompt:])[:, None])
            torch.testing.assert_close(out.sequences_scores[row], logs.mean(), rtol=0.0, atol=1e-4)


def test_sampling_and_chunked_prompts_work() -> None:
    model = make_model("llama")
    ids, mask = padded([random_text(23), random_text(9, seed=1)])
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with attach(model):
        whole = model.generate(ids, past_key_values=cache_of(), **options)
        chunked = model.generate(ids, past_key_values=cache_of(), prefill_chunk_size=5, **options)
        torch.testing.assert_close(torch.stack(chunked.logits), torch.stack(whole.logits), **CLOSE)
        sampled = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=True, past_key_values=cache_of())
        assert sampled.shape == (2, 43)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}])
def test_assisted_decoding_is_refused_with_a_reason(options: dict[str, object]) -> None:
    model = make_model("llama")
    if options.pop("assistant", False):
        options["assistant_model"] = make_model("llama")
    with attach(model), pytest.raises(ValueError, match="Assisted decoding takes rejected tokens back"):
        model.generate(torch.tensor([random_text(12)]), past_key_values=cache_of(), max_new_tokens=10, **options)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "falcon"])
def test_shifted_positions_count_the_stored_tokens(kind: str) -> None:
    text, num_prompt = random_text(50), 6
    model = make_model(kind)
    with attach(model):
        found = stepwise_logits(model, text, num_prompt, cache_of(APPLY_PE_SHIFT=True))
    reads = cache_reads(text, num_prompt, [(2, 3, 4, 12)] * LAYERS)
    for place in (20, 33, 49):
        expected = one_layer_after_the_other(kind, text[: place + 1], reads, num_prompt)
        torch.testing.assert_close(found[place], expected, **CLOSE)


@torch.no_grad()
def one_layer_after_the_other(kind: str, text: list[int], reads: Tensor, num_prompt: int) -> Tensor:
    """Logits ``[V]`` of the last token by definition: for every query, keys and query are rotated by their slots among what it reads."""
    model = make_model(kind)
    frequencies = model.base_model.rotary_emb.inv_freq

    def turned(x: Tensor, slots: Tensor) -> Tensor:
        angle = torch.cat([slots[:, None] * frequencies] * 2, -1)
        first, second = x[..., : angle.shape[1]].chunk(2, -1)
        return torch.cat([x[..., : angle.shape[1]] * angle.cos() + torch.cat([-second, first], -1) * angle.sin(), x[..., angle.shape[1] :]], -1)

    def attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: object
    ) -> tuple[Tensor, None]:
        out = torch.zeros_like(query)
        groups = query.shape[1] // key.shape[1]
        for q in range(query.shape[2]):
            kept = [k for k in range(q + 1) if q < num_prompt or reads[module.layer_idx, q, k]]
            slots = torch.arange(len(kept))
            keys = turned(key[:, :, kept], slots).repeat_interleave(groups, 1)
            weights = (turned(query[:, :, q : q + 1], slots[-1:]) @ keys.transpose(2, 3) * scaling).softmax(-1)
            out[:, :, q : q + 1] = weights @ value[:, :, kept].repeat_interleave(groups, 1)
        return out.transpose(1, 2), None

    use_interface(model)
    AttentionInterface.register("by slots", attention)
    model.config._attn_implementation_internal = "by slots"
    still = torch.zeros(1, len(text), dtype=torch.long)
    return model(torch.tensor([text]), position_ids=still, use_cache=False).logits[0, -1]


def test_fed_positions_stay_below_the_cache_size_for_ever() -> None:
    model, fed = make_model("llama"), []
    model.base_model.rotary_emb.register_forward_pre_hook(lambda module, args, kwargs: fed.append(kwargs["position_ids"]), with_kwargs=True)
    with attach(model):
        fed.clear()
        stepwise_logits(model, random_text(100), 6, cache_of(APPLY_PE_SHIFT=True))
    assert max(int(positions.max()) for positions in fed) < SMALL["cache_size"]


def test_a_model_that_pairs_neighbouring_dimensions_cannot_shift_positions() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CohereConfig(**_GLU, logit_scale=1.0)).eval()
    ids = torch.tensor([random_text(12)])
    with attach(model, PATTERN):
        model(ids, past_key_values=cache_of())
        with pytest.raises(ValueError, match="does not pair the dimensions of its rotary embeddings half by half"):
            model(ids, past_key_values=cache_of(APPLY_PE_SHIFT=True))


def test_an_unbounded_cache_keeps_every_separator() -> None:
    text, num_prompt = random_text(60), 6
    reads = torch.ones(LAYERS, len(text), len(text), dtype=torch.bool)
    stored, separators, growth = list(range(num_prompt)), 0, 0
    for place in range(num_prompt, len(text)):
        stored.append(place)
        if len(stored) >= 12 + growth:
            between = [p for p in stored[2:] if p <= place - 4 and text[p] in SEPARATORS]
            stored, separators = [0, 1, *between, *range(place - 3, place + 1)], len(between)
            growth = max(growth, separators - 3)
        reads[:, place] = False
        reads[:, place, stored] = True
    assert separators > 3
    with attach(model := make_model("llama")):
        found = stepwise_logits(model, text, num_prompt, cache_of(USE_MAX_SEP_CACHE=False))
    torch.testing.assert_close(found, defined_logits("llama", text, reads), **CLOSE)


def test_the_references_reading_of_a_row_alone_is_ours() -> None:
    text, model = random_text(60), make_model("llama")
    with attach(model, PATTERN):
        ours = stepwise_logits(model, text, 6, cache_of())
        theirs = stepwise_logits(model, text, 6, cache_of(reference_compat=True))
        torch.testing.assert_close(theirs, ours, **CLOSE)
        ids, mask = padded([random_text(9), random_text(7, seed=1)])
        out = model.generate(ids, attention_mask=mask, past_key_values=cache_of(reference_compat=True, cache_size=16), max_new_tokens=30)
        assert out.shape == (2, 39)


def test_a_leading_run_of_the_patterns_padding_id_is_padding_without_a_mask() -> None:
    ids, mask = padded([random_text(14), random_text(9, seed=1)])
    model = make_model("llama")
    with attach(model, replace(PATTERN, padding_id=0)), torch.no_grad():
        for make_cache in (cache_of, DynamicCache):
            with_mask, without = make_cache(), make_cache()
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            model(ids, attention_mask=mask, position_ids=positions, past_key_values=with_mask)
            model(ids, position_ids=positions, past_key_values=without)
            token = torch.tensor([[7], [8]])
            expected = model(token, attention_mask=torch.cat([mask, mask[:, -1:]], 1), past_key_values=with_mask).logits
            torch.testing.assert_close(model(token, past_key_values=without).logits, expected, **CLOSE)


@pytest.mark.parametrize("changes", [{"separator_ids": SEPARATORS}, {"padding_id": 0}], ids=str)
def test_embeddings_do_not_say_what_a_pattern_looks_for(changes: dict[str, object]) -> None:
    model, ids = make_model("llama"), torch.tensor([random_text(12)])
    embeddings = model.get_input_embeddings()(ids)
    with attach(model, AttentionPattern(initial_tokens=2, windows=(4,))), torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(ids).logits)
    with (
        attach(model, AttentionPattern(initial_tokens=2, windows=(4,), **changes)),
        pytest.raises(ValueError, match="inputs_embeds do not say which"),
    ):
        model(inputs_embeds=embeddings)


def test_a_conversation_goes_on_in_the_same_cache() -> None:
    text, model = random_text(30), make_model("llama")
    with attach(model):
        cache = cache_of()
        first = model.generate(torch.tensor([text]), past_key_values=cache, max_new_tokens=10, do_sample=False)
        longer = torch.cat([first, torch.tensor([random_text(8, seed=1)])], 1)
        second = model.generate(longer, past_key_values=cache, max_new_tokens=10, do_sample=False)
        assert second.shape == (1, 58)
        assert cache.get_seq_length() == 57
        by_steps = cache_of()
        pieces = [first[:, :30], *first[:, 30:39].split(1, 1), longer[:, 39:], *second[:, 48:57].split(1, 1)]
        logits = [model(piece, past_key_values=by_steps).logits[0, -1] for piece in pieces]
        assert [int(row.argmax()) for row in logits[-10:]] == second[0, 48:].tolist()


def test_the_examples_of_the_reference_run_with_another_import() -> None:
    model, ids = make_model("llama"), torch.tensor([random_text(12)])
    with attach(model):
        past_key_values = SepCache(
            init_cache_size=4,
            sep_cache_size=128,
            local_size=256,
            cache_size=512,
            USE_MAX_SEP_CACHE=True,
            APPLY_PE_SHIFT=False,
            APPLY_PES_INSIDE=False,
            pe_dim=8,
            max_position_embeddings=256,
            k_seq_dim=2,
            v_seq_dim=2,
            layer_num=LAYERS,
            model_type="llama",
        )
        outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=past_key_values, use_cache=True)
        assert outputs.past_key_values is past_key_values
    k, v, q = torch.randn(3, 1, 2, 5, 8).unbind()
    past_key_values = SepCache(layer_num=1, model_type="llama", APPLY_PE_SHIFT=True, pe_dim=8)
    for new in (slice(0, 4), slice(4, 5)):
        key_states, value_states, query_states = past_key_values.update(
            key_states=k[:, :, new],
            value_states=v[:, :, new],
            query_states=q[:, :, new],
            input_ids=ids[:, new],
            layer_idx=0,
            position_ids=torch.arange(12)[None, new],
            PREFILLING_FLAG=new.start == 0,
            cache_kwargs=None,
        )
    assert (key_states.shape, value_states.shape, query_states.shape) == (k.shape, v.shape, q[:, :, 4:].shape)


@pytest.mark.parametrize("core", ["dense", "chunked"])
def test_the_core_can_be_chosen(core: str) -> None:
    text, model = random_text(40), make_model("llama")
    with attach(model, PATTERN, core=core):
        found = stepwise_logits(model, text, 20, cache_of())
    with attach(model, PATTERN):
        torch.testing.assert_close(found, stepwise_logits(model, text, 20, cache_of()), **CLOSE)
    with pytest.raises(ValueError, match="core 'sparse' is not known"):
        attach(model, core="sparse")
    assert attachment_of(model) is None


def test_half_precision_models_can_be_attached_to() -> None:
    ids = torch.tensor([random_text(40)])
    model = make_model("llama").bfloat16()
    with attach(model, PATTERN):
        out = model.generate(ids, past_key_values=cache_of(APPLY_PE_SHIFT=True), max_new_tokens=20, do_sample=False)
    assert out.shape == (1, 60)


@pytest.mark.parametrize("kind", SIX)
def test_detach_restores_the_model_exactly(kind: str) -> None:
    model = make_model(kind, "sdpa")
    ids = torch.tensor([random_text(20)])
    before, classes = model(ids).logits, [type(module) for module in model.modules()]
    attachment = attach(model, PATTERN)
    assert attachment_of(model) is attachment
    assert not torch.equal(model(ids).logits, before)
    detach(model)
    assert attachment_of(model) is None
    assert torch.equal(model(ids).logits, before)
    assert classes == [type(module) for module in model.modules()]
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="has no attachment"):
        detach(model)


def test_a_model_whose_attention_is_its_own_is_refused_and_left_as_it_was() -> None:
    torch.manual_seed(0)
    falcon = AutoModelForCausalLM.from_config(FalconConfig(**_SHARED, alibi=True)).eval()
    with pytest.raises(ValueError, match="ALiBi"):
        attach(falcon)
    llama = make_model("llama")
    own = type(llama.base_model.layers[1].self_attn)

    class Another(own):
        def forward(self, *args: object, **kwargs: object) -> tuple[Tensor, None]:
            name, self.config._attn_implementation_internal = self.config._attn_implementation, "eager"
            out = super().forward(*args, **kwargs)
            self.config._attn_implementation_internal = name
            return out

    llama.base_model.layers[1].self_attn.__class__ = Another
    with pytest.raises(ValueError, match=r"does not use the attention interface of transformers in layers \[1\]"):
        attach(llama)
    assert llama.config._attn_implementation == "eager"
    assert attachment_of(llama) is None


def test_gradients_reach_the_weights_through_the_pattern() -> None:
    model = make_model("llama").train()
    ids = torch.tensor([random_text(30)])
    with attach(model, PATTERN):
        model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_wrong_uses_are_explained() -> None:
    model = make_model("llama")
    ids = torch.tensor([random_text(12)])
    with pytest.raises(ValueError, match=r"sepllm\.hf\.attach\(model\)"):
        model(ids, past_key_values=cache_of())
    with pytest.raises(ValueError, match="2 windows but the model has 3 layers"):
        attach(model, AttentionPattern(windows=(3, 4)))
    unknown = DynamicCache()
    for layer in range(LAYERS):
        unknown.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), layer)
    with attach(model):
        with pytest.raises(ValueError, match="has an attachment"):
            attach(model)
        with pytest.raises(ValueError, match="layer_num 5, but the model has 3 layers"):
            model(ids, past_key_values=cache_of(layer_num=5))
        with pytest.raises(ValueError, match="padding on the left only"):
            model(ids, attention_mask=torch.tensor([[1] * 10 + [0] * 2]), past_key_values=cache_of())
        with pytest.raises(ValueError, match="output_attentions"):
            model(ids, output_attentions=True)
        with pytest.raises(ValueError, match="no prepared masks"):
            model(ids, attention_mask=torch.zeros(1, 1, 12, 12))
        with pytest.raises(ValueError, match="holds keys of tokens that are not known"):
            model(ids, past_key_values=unknown)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=LAYERS, n_head=4, bos_token_id=None, eos_token_id=None),
        OPTConfig(**_SHARED | {"initializer_range": 0.02}, ffn_dim=48, word_embed_proj_dim=32),
    ],
    ids=["gpt2", "opt"],
)
def test_models_with_learned_positions_read_under_patterns_but_cannot_shift_positions(config: PreTrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([random_text(12)])
    with attach(model):
        model.generate(ids, past_key_values=cache_of(), max_new_tokens=20, pad_token_id=0)
        with pytest.raises(ValueError, match="no rotary embeddings"):
            model(ids, past_key_values=cache_of(APPLY_PE_SHIFT=True))


def test_texts_that_positions_pack_into_one_row_are_refused() -> None:
    model, texts = make_model("llama"), (random_text(5), random_text(7, seed=1))
    packed = {"input_ids": torch.tensor([texts[0] + texts[1]]), "position_ids": torch.tensor([[*range(5), *range(7)]]), "use_cache": False}
    with torch.no_grad():
        assert torch.allclose(model(**packed).logits[:, 5:], model(torch.tensor([texts[1]])).logits, **CLOSE)
        with attach(model, PATTERN), pytest.raises(ValueError, match="position_ids do not go on within a row"):
            model(**packed)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=64), "does not run when its attention function is another"),
        (ModernBertDecoderConfig(**_SHARED | dict.fromkeys(END_TOKENS, 0), intermediate_size=48), "is no plain language model"),
    ],
    ids=["mpt", "modernbert-decoder"],
)
def test_models_of_other_forms_are_refused_and_left_as_they_were(config: PreTrainedConfig, reason: str) -> None:
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([random_text(12)])
    before = model(ids, use_cache=False)[0]
    with pytest.raises(ValueError, match=reason):
        attach(model)
    assert torch.equal(model(ids, use_cache=False)[0], before)


def test_what_changes_scores_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(Gemma2Config(**_GLU, head_dim=8))
    with pytest.raises(ValueError, match="Gemma2Attention uses softcap"):
        attach(model)


@pytest.mark.parametrize("kind", list(SLIDING_LAYERS))
def test_ratio_counts_what_the_models_own_window_leaves(kind: str) -> None:
    model, text = make_model(kind), random_text(40)
    reads = pattern_reads(text, PATTERN)[:, -1]
    for layer in SLIDING_LAYERS[kind]:
        reads[layer, :-SLIDING] = False
    with attach(model, PATTERN) as attachment:
        model(torch.tensor([text]))
        assert attachment.kv_ratio() == pytest.approx(float(reads.float().mean()))


def test_ratios_are_those_of_the_pattern_and_of_the_cache() -> None:
    model, text = make_model("llama"), random_text(40)
    with attach(model, PATTERN) as attachment:
        model(torch.tensor([text]))
        assert attachment.kv_ratio() == pytest.approx(float(pattern_reads(text, PATTERN)[:, -1].float().mean()))
        cache = cache_of()
        stepwise_logits(model, text, 5, cache)
        reads = cache_reads(text, 5, [(2, 3, 4, 12)] * LAYERS)[0]
        kept = 5 + sum(int(reads[place, : place + 1].sum()) for place in range(5, 40))
        assert attachment.kv_ratio() == cache.kv_ratio() == pytest.approx(kept / sum(range(5, 41)))

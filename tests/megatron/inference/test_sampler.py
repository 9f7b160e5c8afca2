from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from megatron.inference.sampler import generate
from megatron.model.gpt import GPTModel
from sepllm.completion import Completion
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern, SelfAdjust, Softmax, Standard
from sepllm.sampling import Sampling

MakeModel = Callable[..., GPTModel]
PROMPTS = ([5], [10, 33, 70, 33, 12, 90, 47, 3], [200, 33, 100, 101, 102, 103, 104, 33, 105, 106, 107, 108, 109, 110])


def write(model: GPTModel, prompts: Sequence[Sequence[int]], pattern: AttentionPattern, **changes: object) -> list[Completion]:
    values: dict[str, object] = {"prefill": pattern, "decode": pattern, "maximum_tokens": 20, "max_length": 48, "return_logits": True}
    return generate(model, prompts, **values | changes)  # type: ignore[arg-type]


def close(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    assert ours is not None
    assert theirs is not None
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-4)


@torch.no_grad()
def by_definition(model: GPTModel, prompt: Sequence[int], pattern: AttentionPattern, count: int) -> list[int]:
    """Greedy decoding of one prompt: the whole text through the model, again and again."""
    ids = list(prompt)
    for _ in range(count):
        row = torch.tensor([ids])
        ids.append(int(model(row, TokenLayout.from_ids(row, pattern))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("position", ["rotary", "learned", "alibi", "bilevel rotary", "bilevel alibi"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["sparse", "full"])
def test_greedy_text_of_a_batch_is_that_of_each_prompt_alone(
    make_model: MakeModel, request: pytest.FixtureRequest, name: str, recompute: bool, position: str
) -> None:
    pattern = request.getfixturevalue(name)
    bilevel = {"use_bipe": True, "bipe_separator_ids": (33, 47, 101)} if position.startswith("bilevel") else {}
    model = make_model(prefill=pattern, pos_emb=position.removeprefix("bilevel "), **bilevel)
    together = write(model, PROMPTS, pattern, recompute=recompute)
    assert [list(row.ids) for row in together] == [by_definition(model, prompt, pattern, 20) for prompt in PROMPTS]


@pytest.mark.parametrize("softmax", [Standard(), SelfAdjust(kind="normalised", extremes="causal"), SelfAdjust(kind="raw")], ids=str)
def test_the_cache_changes_no_logit(make_model: MakeModel, sparse: AttentionPattern, softmax: Softmax) -> None:
    model, pattern = make_model(), replace(sparse, softmax=softmax)
    cached, recomputed = (write(model, PROMPTS, pattern, recompute=recompute) for recompute in (False, True))
    for ours, theirs in zip(cached, recomputed, strict=True):
        assert ours.ids == theirs.ids
        assert close(ours.logits, theirs.logits)


def test_tokens_after_the_prompt_follow_the_decode_pattern(make_model: MakeModel, sparse: AttentionPattern, full: AttentionPattern) -> None:
    """The first new token is the prefill pattern's; each later one reads every key that was cached."""
    model = make_model()
    prompt = list(PROMPTS[2])
    row = write(model, [prompt], sparse, decode=full, maximum_tokens=2)[0]
    assert row.ids[0] == by_definition(model, prompt, sparse, 1)[0]
    narrow = write(model, [prompt], sparse, maximum_tokens=2)[0]
    assert row.ids[0] == narrow.ids[0]
    assert not close(row.logits, narrow.logits)


@pytest.mark.parametrize("recompute", [False, True])
def test_of_each_pass_only_the_last_logits_are_computed(
    make_model: MakeModel, sparse: AttentionPattern, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, lengths, logits_of = make_model(), [], GPTModel._logits

    def noted(model: GPTModel, hidden: torch.Tensor) -> torch.Tensor:
        lengths.append(hidden.shape[1])
        return logits_of(model, hidden)

    monkeypatch.setattr(GPTModel, "_logits", noted)
    write(model, PROMPTS, sparse, recompute=recompute)
    assert lengths == [1] * 20


def test_a_row_ends_at_a_stop_token_which_is_not_part_of_it(make_model: MakeModel, sparse: AttentionPattern) -> None:
    model = make_model()
    unstopped = write(model, PROMPTS, sparse)
    stop = unstopped[1].ids[6]
    for row, whole in zip(write(model, PROMPTS, sparse, stop_ids={stop}), unstopped, strict=True):
        expected = whole.ids[: whole.ids.index(stop)] if stop in whole.ids else whole.ids
        assert row.ids == expected
        assert row.finished == (stop in whole.ids)
        assert whole.logits is not None
        assert close(row.logits, whole.logits[: len(expected)])


def test_a_row_ends_where_should_stop_says_so(make_model: MakeModel, sparse: AttentionPattern) -> None:
    rows = write(make_model(), PROMPTS, sparse, should_stop=lambda ids: len(ids) == 5)
    assert [(len(row.ids), row.finished) for row in rows] == [(5, True)] * 3


@pytest.mark.parametrize("pos_emb", ["rotary", "learned"])
def test_no_row_grows_beyond_the_models_length(make_model: MakeModel, sparse: AttentionPattern, pos_emb: str) -> None:
    prompts = [[7] * length for length in (1, 40, 47, 48)]
    rows = write(make_model(pos_emb=pos_emb), prompts, sparse, maximum_tokens=100)
    assert [(len(row.ids), row.finished) for row in rows] == [(47, False), (8, False), (1, False), (0, False)]


def test_ids_beyond_the_vocabulary_are_never_chosen(make_model: MakeModel, sparse: AttentionPattern) -> None:
    rows = write(make_model(), PROMPTS, sparse, vocab_size=50, sampling=Sampling(temperature=50.0))
    assert max(max(row.ids) for row in rows) < 50


def test_a_seed_repeats_its_text(make_model: MakeModel, sparse: AttentionPattern) -> None:
    model = make_model()

    def draw(seed: int) -> list[tuple[int, ...]]:
        generator = torch.Generator().manual_seed(seed)
        return [row.ids for row in write(model, PROMPTS, sparse, sampling=Sampling(temperature=1.0, top_p=0.9), generator=generator)]

    assert draw(1) == draw(1) != draw(2)


def test_document_starts_cut_off_the_text_before_them(make_model: MakeModel, sparse: AttentionPattern) -> None:
    """With `document_end_id` a prompt's answer is that of its last document."""
    model = make_model()
    after_another, alone = write(model, [[9, 8, 33, 7, 0, 60, 61, 62], [60, 61, 62]], sparse, document_end_id=0)
    assert after_another.ids[:1] == alone.ids[:1]
    assert after_another.logits is not None
    assert alone.logits is not None
    assert close(after_another.logits[:1], alone.logits[:1])


@pytest.mark.parametrize(("prompts", "words"), [([[1], []], "Prompt 1 has no tokens"), ([[1] * 49], "49 tokens.*at most 48")])
def test_unreadable_prompts_are_named(make_model: MakeModel, sparse: AttentionPattern, prompts: list[list[int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write(make_model(), prompts, sparse)


def test_every_forward_pass_is_seen_with_what_it_reads(make_model: MakeModel, sparse: AttentionPattern) -> None:
    passes: list[tuple[int, int]] = []
    write(make_model(), PROMPTS[:2], sparse, maximum_tokens=3, on_pass=lambda layout: passes.append((layout.num_queries, layout.ids.shape[1])))
    assert passes == [(8, 8), (1, 9), (1, 10)]

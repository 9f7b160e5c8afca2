from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from lm_eval.api.instance import Instance

from megatron.config.schema import Config
from megatron.data.tokenizer import Tokenizer
from megatron.inference.lm_eval import GPTLanguageModel
from megatron.model.gpt import GPTModel
from megatron.parallel.mesh import Axis, Mesh
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern

MakeConfig = Callable[..., Config]
MakeModel = Callable[..., GPTModel]
MakeLM = Callable[..., GPTLanguageModel]
PAIRS = [
    ("The house stands", " on a hill."),
    ("The house stands", " on a lake."),
    ("", "No context at all"),
    ("A context that ends in blanks  ", "and goes on"),
    ("Words, words, words. " * 4, "The context is cut on the left."),
    ("x", "y"),
    ("x", "z"),
    ("x", "y"),
]


def instances(kind: str, arguments: Sequence[tuple[object, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=argument, idx=index) for index, argument in enumerate(arguments)]


@pytest.fixture
def make_lm(make_config: MakeConfig, make_model: MakeModel, tokenizer: Tokenizer, alone: Mesh) -> MakeLM:
    def make(*, batch_size: int = 3, mesh: Mesh = alone, **changes: object) -> GPTLanguageModel:
        return GPTLanguageModel(make_model(**changes), tokenizer, make_config(**changes).attention, batch_size=batch_size, mesh=mesh)

    return make


@torch.no_grad()
def logprobs(lm: GPTLanguageModel, ids: Sequence[int], pattern: AttentionPattern) -> torch.Tensor:
    row = torch.tensor([list(ids)])
    return lm.model(row, TokenLayout.from_ids(row, pattern))[0].log_softmax(-1)


def defined_score(lm: GPTLanguageModel, context: str, continuation: str, pattern: AttentionPattern) -> tuple[float, bool]:
    """One request alone: the last tokens that fit, an end-of-document token where there is no context."""
    after = lm.tok_encode(continuation)
    ids = (lm.tok_encode(context) or [0]) + after
    table = logprobs(lm, ids[-49:-1], pattern)[-len(after) :]
    return sum(float(table[i, token]) for i, token in enumerate(after)), table.argmax(-1).tolist() == after


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("name", ["sparse", "full"])
def test_loglikelihood_is_the_definition_in_every_batch_size(make_lm: MakeLM, request: pytest.FixtureRequest, name: str, batch_size: int) -> None:
    pattern = request.getfixturevalue(name)
    lm = make_lm(prefill=pattern, batch_size=batch_size)
    scores = lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    for (score, is_greedy), (context, continuation) in zip(scores, PAIRS, strict=True):
        blanks = context[len(context.rstrip()) :]
        expected = defined_score(lm, context.rstrip(), blanks + continuation, pattern)
        assert score == pytest.approx(expected[0], abs=1e-3)
        assert is_greedy == expected[1]


def test_what_greedy_decoding_writes_is_known_as_greedy(make_lm: MakeLM) -> None:
    lm = make_lm()
    context = lm.tok_encode("The house")
    ids = list(context)
    for _ in range(4):
        ids.append(int(logprobs(lm, ids, lm.attention.prefill)[-1].argmax()))
    right, wrong = lm._loglikelihood_tokens([(None, context, ids[len(context) :]), (None, context, [*ids[len(context) : -1], 5])])
    assert (right[1], wrong[1]) == (True, False)


def test_padding_of_the_batch_is_not_taken_for_padding_of_the_pattern(make_lm: MakeLM, sparse: AttentionPattern) -> None:
    """A pattern that counts padding tokens anywhere in a row sees none that only the batch brought."""
    counting = replace(sparse, padding_id=0, reference_padding=True)
    requests = instances("loglikelihood", PAIRS)
    alone, together = (make_lm(prefill=counting, batch_size=size).loglikelihood(requests, disable_tqdm=True) for size in (1, 8))
    assert [score for score, _ in alone] == pytest.approx([score for score, _ in together], abs=1e-3)


@pytest.mark.parametrize("length", [0, 1, 47, 48, 49, 50, 96, 97, 200])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_rolling_loglikelihood_scores_every_token_once_with_all_the_context_that_fits(make_lm: MakeLM, length: int, batch_size: int) -> None:
    lm = make_lm(batch_size=batch_size)
    text = ("It was a dark night. The rain fell, " * 10)[:length]
    ids = lm.tok_encode(text)
    expected = 0.0
    for start in range(0, length, 48):  # whole windows, but for the last, which looks back as far as it can
        end = min(start + 48, length)
        begin = max(end - 48, 0)
        table = logprobs(lm, ([0, *ids])[begin:end], lm.attention.prefill)
        expected += sum(float(table[i - begin, ids[i]]) for i in range(start, end))
    (score,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    assert score == pytest.approx(expected, abs=2e-3)


def test_generation_is_greedy_text_up_to_the_stop_string(make_lm: MakeLM) -> None:
    lm = make_lm()
    contexts = ["Once upon a time", "In", "A much longer context, which is cut on its left side to leave room for the answer"]
    whole = lm.generate_until(instances("generate_until", [(c, {"until": [], "max_gen_toks": 12}) for c in contexts]), disable_tqdm=True)
    for text, context in zip(whole, contexts, strict=True):
        ids = lm.tok_encode(context)[-36:]
        for _ in range(12):
            ids.append(int(logprobs(lm, ids, lm.attention.prefill)[-1].argmax()))
        assert text == lm.tok_decode(ids[-12:])
    stop = whole[0][3:5]
    stopped = lm.generate_until(instances("generate_until", [(c, {"until": [stop], "max_gen_toks": 12}) for c in contexts]), disable_tqdm=True)
    assert stopped == [text.split(stop)[0] for text in whole]


def test_a_stop_string_may_be_given_alone_and_never_appears(make_lm: MakeLM) -> None:
    lm = make_lm()
    (whole,) = lm.generate_until(instances("generate_until", [("So", {"max_gen_toks": 16})]), disable_tqdm=True)
    (stopped,) = lm.generate_until(instances("generate_until", [("So", {"until": whole[5], "max_gen_toks": 16})]), disable_tqdm=True)
    assert stopped == whole[: whole.index(whole[5])]


@pytest.mark.parametrize("processes", [2, 3, 11])
def test_processes_share_the_requests_and_all_get_every_answer(make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    """Each process answers its own neighbours; put together in the order of ranks they are the answers of one process."""
    requests = instances("loglikelihood", PAIRS)
    expected = [score for score, _ in make_lm().loglikelihood(requests, disable_tqdm=True)]
    shares: list[list[tuple[float, bool]]] = []
    monkeypatch.setattr("megatron.inference.lm_eval.gather_objects", lambda mine, mesh: [shares.append(mine) or mine])
    for rank in range(processes):
        mesh = Mesh(world_size=processes, rank=rank, local_rank=rank, device=torch.device("cpu"), data=Axis(size=processes, rank=rank))
        make_lm(mesh=mesh).loglikelihood(requests, disable_tqdm=True)
    assert [score for share in shares for score, _ in share] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_gen_toks": 48}, "max_gen_toks .48. must be less"),
        ({"max_gen_toks": 4, "num_beams": 3}, "num_beams"),
        ({"max_gen_toks": 4, "do_sample": True, "temperature": -1.0}, "temperature"),
    ],
)
def test_generation_arguments_that_cannot_be_honoured_are_named(make_lm: MakeLM, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_lm().generate_until(instances("generate_until", [("So", arguments)]), disable_tqdm=True)


@pytest.mark.parametrize("continuation", ["", "x" * 49])
def test_continuations_that_cannot_be_scored_are_named(make_lm: MakeLM, continuation: str) -> None:
    with pytest.raises(ValueError, match=f"{len(continuation)} tokens cannot be scored"):
        make_lm().loglikelihood(instances("loglikelihood", [("So", continuation)]), disable_tqdm=True)


def test_scores_are_those_of_text_that_no_other_request_touches(make_lm: MakeLM) -> None:
    """A probability is one: exp of the scores of every next byte sums to at most 1."""
    lm = make_lm()
    context = lm.tok_encode("So")
    scores = lm._loglikelihood_tokens([(None, context, [token]) for token in range(264)], disable_tqdm=True)
    assert sum(math.exp(score) for score, _ in scores) == pytest.approx(1.0, abs=1e-4)

"""Our model as lm-eval sees one. `evaluate` runs tasks with it.

Answers are those of ``lm_eval --model hf`` on the converted checkpoint: the same token ids, the same truncation (the last
`max_position_embeddings` tokens), the end-of-document token before a text without context, the log-softmax in the dtype of the
logits. On several processes each computes its share of the requests, and all of them get every answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from megatron.config.schema import AttentionConfig
from megatron.data.tokenizer import Tokenizer
from megatron.inference.sampler import generate
from megatron.model.gpt import GPTModel
from megatron.parallel.collectives import gather_objects
from megatron.parallel.mesh import Mesh
from sepllm.layout import TokenLayout
from sepllm.sampling import Sampling

Scored = tuple[float, bool]
"""Log-likelihood of a continuation, and whether greedy decoding would write it."""
Tokens = tuple[tuple[str, str] | None, list[int], list[int]]
"""Context and continuation as text (None: a window of a longer text), then the ids of each."""
T = TypeVar("T")
R = TypeVar("R")

GENERATED_TOKENS = 256
"""Of a `generate_until` request that names no number: lm-eval's own models do the same."""
GENERATION_ARGUMENTS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


class GPTLanguageModel(TemplateLM):
    """Log-likelihoods and texts of a `GPTModel` for lm-eval's requests, ``batch_size`` at a time."""

    def __init__(self, model: GPTModel, tokenizer: Tokenizer, attention: AttentionConfig, *, batch_size: int, mesh: Mesh, seed: int = 1234) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"eval_batch_size is {batch_size}: it counts requests and must be 1 or more.")
        self.model = model.eval()
        self.attention = attention
        self.batch_size = batch_size
        self.mesh = mesh
        self.encoder = tokenizer
        self._device = mesh.device
        self._generator = torch.Generator(mesh.device).manual_seed(seed)
        self._document_end_id = tokenizer.eod_id if attention.reset_at_document_end else None

    @property
    def eot_token_id(self) -> int:
        return self.encoder.eod_id

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at once: `max_position_embeddings`, which is what the converted checkpoint tells lm-eval."""
        return self.model.config.max_position_embeddings

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        return self.encoder.encode(string)

    def tok_decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens; ids that only pad the output matrix stand for none."""
        return self.encoder.decode([token for token in ids if token < self.encoder.vocab_size])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Scored]:
        """Log-likelihood of each continuation after its context."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self.mesh.is_first)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, in windows that score every token once."""
        windows: list[Tokens] = []
        counts: list[int] = []
        for request in requests:
            rolling = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1)
            before = len(windows)
            windows.extend((None, *make_disjoint_window(window)) for window in rolling)
            counts.append(len(windows) - before)
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop string, the end-of-document token or `max_gen_toks`."""
        return self._shared([request.args for request in requests], lambda mine: self._generate_mine(mine, disable_tqdm))

    def _loglikelihood_tokens(self, requests: list[Tokens], disable_tqdm: bool = False, **_: object) -> list[Scored]:
        for texts, context, continuation in requests:
            if not context or not continuation or len(continuation) > self.max_length:
                raise ValueError(
                    f"A continuation of {len(continuation)} tokens cannot be scored ({(texts or ('', ''))[1][:60]!r}): it must have at least one "
                    f"and at most max_position_embeddings ({self.max_length}), and something before it."
                )
        return self._shared(requests, lambda mine: self._score_mine(mine, disable_tqdm))

    def _shared(self, requests: Sequence[T], compute: Callable[[Sequence[T]], list[R]]) -> list[R]:
        """``compute`` of all requests, of which each process computes a run of neighbours."""
        size, rank = self.mesh.world_size, self.mesh.rank
        mine = requests[len(requests) * rank // size : len(requests) * (rank + 1) // size]
        return [answer for answers in gather_objects(compute(mine), self.mesh) for answer in answers]

    def _score_mine(self, requests: Sequence[Tokens], disable_tqdm: bool) -> list[Scored]:
        """Longest first; requests that differ in their last token only are one row."""
        order = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1] + request[2]), request[1] + request[2]),
            group_by="contexts",
            group_fn=lambda request: request[1] + request[2][:-1],
        )
        answers: list[Scored] = []
        bar = self._progress("log-likelihoods", len(requests), disable_tqdm)
        for batch in order.get_batched(n=self.batch_size):
            for (texts, context, continuation), logprobs in zip(batch, self._logprobs(batch), strict=True):
                for _, ids, row in order.get_cache(req_str=texts, cxt_toks=context, cont_toks=continuation, logits=logprobs[None]):
                    answers.append(_score(row[0], ids))
                    bar.update()
        bar.close()
        return order.get_original(answers)

    @torch.inference_mode()
    def _logprobs(self, batch: Sequence[Tokens]) -> list[Tensor]:
        """Log-probabilities ``[len(continuation), V]`` before each token of each continuation.

        Rows are padded on the right, where no token of theirs can look, so that a row's answer does not depend on the others'.
        """
        rows = [(context + continuation)[-(self.max_length + 1) : -1] for _, context, continuation in batch]
        width = max(map(len, rows))
        pattern = self.attention.prefill
        filler = 1 if pattern.padding_id == 0 else 0  # filled with padding_id, reference_padding would move every row's initial tokens
        ids = torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=self._device)
        logits = self.model(ids, TokenLayout.from_ids(ids, pattern, document_end_id=self._document_end_id))
        ends = [(len(row) - len(continuation), len(row)) for row, (_, _, continuation) in zip(rows, batch, strict=True)]
        return [torch.log_softmax(logits[index, start:end], -1) for index, (start, end) in enumerate(ends)]

    def _generate_mine(self, requests: Sequence[tuple[str, dict[str, object]]], disable_tqdm: bool) -> list[str]:
        order = Collator(
            requests,
            sort_fn=lambda request: (-len(self.tok_encode(request[0])), request[0]),
            group_by="gen_kwargs",
            group_fn=lambda request: request[1],
        )
        texts: list[str] = []
        bar = self._progress("texts", len(requests), disable_tqdm)
        for batch in order.get_batched(n=self.batch_size):
            texts += self._generate_batch([context for context, _ in batch], batch[0][1])
            bar.update(len(batch))
        bar.close()
        return order.get_original(texts)

    def _generate_batch(self, contexts: Sequence[str], arguments: dict[str, object]) -> list[str]:
        wanted = normalize_gen_kwargs(arguments, GENERATED_TOKENS)
        until = [stop for stop in handle_stop_sequences(wanted["until"], eos=None) if stop]
        maximum_tokens = wanted["max_gen_toks"]
        room = self.max_length - maximum_tokens
        if room < 1:
            raise ValueError(
                f"max_gen_toks ({maximum_tokens}) must be less than max_position_embeddings ({self.max_length}), so that a context fits before it: "
                "set generation_kwargs: {max_gen_toks: ...} in the task."
            )
        completions = generate(
            self.model,
            [(self.tok_encode(context) or [self.prefix_token_id])[-room:] for context in contexts],
            prefill=self.attention.prefill,
            decode=self.attention.decode,
            maximum_tokens=maximum_tokens,
            max_length=self.max_length,
            document_end_id=self._document_end_id,
            stop_ids={self.eot_token_id},
            should_stop=lambda ids: _holds(self._tail(ids, until), until),
            sampling=_sampling(wanted),
            generator=self._generator,
        )
        return [postprocess_generated_text(self.tok_decode(completion.ids), until, None) for completion in completions]

    def _tail(self, ids: Sequence[int], until: Sequence[str]) -> str:
        """The end of a text in the making, long enough to hold any stop string that the last token completes."""
        longest = max((len(stop.encode()) for stop in until), default=0)
        return self.tok_decode(ids[-(longest + 8) :]) if until else ""

    def _progress(self, what: str, count: int, disabled: bool) -> tqdm:
        return tqdm(total=count, desc=what, disable=disabled or not self.mesh.is_first)


def _score(logprobs: Tensor, ids: list[int]) -> Scored:
    """Of the continuation ``ids``, which the last rows of ``logprobs [T, V]`` predict."""
    predicted = logprobs[-len(ids) :]
    wanted = torch.tensor(ids, device=logprobs.device)
    return float(predicted.gather(1, wanted[:, None]).sum()), bool((predicted.argmax(1) == wanted).all())


def _holds(text: str, stops: Sequence[str]) -> bool:
    return any(stop in text for stop in stops)


def _sampling(wanted: Mapping[str, Any]) -> Sampling:
    """Of lm-eval's generation arguments; those that mean nothing here are refused, so that no score hides one."""
    unknown = sorted(set(wanted) - GENERATION_ARGUMENTS)
    if unknown:
        raise ValueError(f"generation_kwargs {', '.join(unknown)} are not supported: use {', '.join(sorted(GENERATION_ARGUMENTS))}.")
    if not wanted.get("do_sample"):
        return Sampling()
    return Sampling(temperature=float(wanted.get("temperature", 1.0)), top_k=int(wanted.get("top_k", 0)), top_p=float(wanted.get("top_p", 0.0)))

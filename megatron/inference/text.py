"""Texts from a checkpoint: unconditional, for a file with one prompt a line, or in conversation with a terminal. Behind generate.py."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TextIO

import torch

from megatron.config.schema import Config
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.inference.loading import load_model
from megatron.inference.sampler import generate
from megatron.model.gpt import GPTModel
from megatron.parallel.mesh import Mesh
from megatron.training.ratios import RatioReport, Ratios
from sepllm.completion import Completion
from sepllm.layout import TokenLayout
from sepllm.sampling import Sampling


def generate_texts(config: Config) -> None:
    """Do what `text_gen_type` asks for with the checkpoint that `load` names. Of several processes the first does it."""
    check_generation(config)
    tokenizer = build_tokenizer(config.tokenizer)
    mesh = Mesh.start(config)
    if mesh.is_first:
        loaded = load_model(config, mesh.device)
        print(f"Generating with {loaded.folder} ({config.precision.precision}, {mesh.device})", file=sys.stderr)
        write_texts(Writer(model=loaded.model, tokenizer=tokenizer, config=config), terminal_in=sys.stdin, terminal_out=sys.stdout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One generated text, as a line of the output file holds it."""

    context: str
    """The prompt; empty when there was none."""
    text: str
    """What the model wrote after it."""
    length: int
    """Tokens of ``text``."""
    finished: bool
    """Whether the model ended the text itself, with the end-of-document token."""
    message: str | None
    """Why ``text`` is empty or short, where the reason is neither its end nor `maximum_tokens`."""
    duration_seconds: float
    """Time of the batch that this text was part of."""
    logits: list[list[float]] | None = None
    """What each token was chosen from, ``[length][vocabulary]``. Only with `return_logits`."""

    def to_json(self) -> str:
        fields = {name: getattr(self, name) for name in ("context", "text", "length", "finished", "message", "duration_seconds")}
        return json.dumps(fields | ({} if self.logits is None else {"logits": self.logits}), ensure_ascii=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """Completes prompts in batches, the way the `generation` group of the configuration says."""

    model: GPTModel
    tokenizer: Tokenizer
    config: Config
    generator: torch.Generator = field(init=False)
    ratios: RatioReport = field(init=False)
    """Counts every forward pass, of prompts and of new tokens, where `PRINT_KV_RATIO` asks for it."""

    def __post_init__(self) -> None:
        device = next(self.model.parameters()).device
        object.__setattr__(self, "generator", torch.Generator(device).manual_seed(self.config.training.seed))
        every = self.config.attention.print_ratio_intervals
        object.__setattr__(self, "ratios", RatioReport(every=every, say=lambda text: print(text, file=sys.stderr)))

    def complete(self, contexts: Iterable[str]) -> Iterator[Record]:
        """A record for each context, in order; an empty context starts a new document."""
        remaining = iter(contexts)
        while batch := list(islice(remaining, self.config.batch.train_micro_batch_size_per_gpu)):
            yield from self._complete_batch(batch)

    def _complete_batch(self, contexts: Sequence[str]) -> list[Record]:
        started_s = time.perf_counter()
        prompts = [self.tokenizer.encode(context) or [self.tokenizer.eod_id] for context in contexts]
        readable = [index for index, prompt in enumerate(prompts) if len(prompt) < self._max_length]
        completions = dict(zip(readable, self._generate([prompts[index] for index in readable]), strict=True))
        elapsed_s = time.perf_counter() - started_s
        return [self._record(context, len(prompts[i]), completions.get(i), elapsed_s) for i, context in enumerate(contexts)]

    def _generate(self, prompts: Sequence[Sequence[int]]) -> list[Completion]:
        wanted, attention = self.config.generation, self.config.attention
        return generate(
            self.model,
            prompts,
            prefill=attention.prefill,
            decode=attention.decode,
            maximum_tokens=wanted.maximum_tokens,
            max_length=self._max_length,
            vocab_size=self.tokenizer.vocab_size,
            document_end_id=self.tokenizer.eod_id if attention.reset_at_document_end else None,
            stop_ids={self.tokenizer.eod_id},
            sampling=Sampling(temperature=wanted.temperature, top_k=wanted.top_k, top_p=wanted.top_p),
            generator=self.generator,
            recompute=wanted.recompute,
            return_logits=wanted.return_logits,
            on_pass=self._note_ratios if attention.print_kv_ratio else None,
        )

    def _note_ratios(self, layout: TokenLayout) -> None:
        self.ratios.note(Ratios.of(layout), passes=1, what="forward pass")

    def _record(self, context: str, prompt_length: int, completion: Completion | None, elapsed_s: float) -> Record:
        if completion is None:
            return Record(
                context=context,
                text="",
                length=0,
                finished=False,
                message=f"The prompt has {prompt_length} tokens, which leaves no room in the {self._max_length} that the model reads.",
                duration_seconds=elapsed_s,
                logits=[] if self.config.generation.return_logits else None,
            )
        length = len(completion.ids)
        is_full = not completion.finished and length < self.config.generation.maximum_tokens
        return Record(
            context=context,
            text=self.tokenizer.decode(completion.ids),
            length=length,
            finished=completion.finished,
            message=f"Stopped at the {self._max_length} tokens that the model reads." if is_full else None,
            duration_seconds=elapsed_s,
            logits=None if completion.logits is None else completion.logits.tolist(),
        )

    @property
    def _max_length(self) -> int:
        return self.config.model.max_position_embeddings


def check_generation(config: Config) -> None:
    """ValueError for what can be known to fail before a model is loaded."""
    wanted = config.generation
    Sampling(temperature=wanted.temperature, top_k=wanted.top_k, top_p=wanted.top_p)
    if wanted.text_gen_type == "precompute":
        raise ValueError(
            "text_gen_type: precompute is refused: it stores reference log-probabilities for DPO and KTO, which are not supported. "
            "Use unconditional, input-file or interactive."
        )
    if wanted.text_gen_type == "input-file":
        if wanted.sample_input_file is None:
            raise ValueError("text_gen_type: input-file needs sample_input_file (or --sample_input_file): a text file with one prompt a line.")
        if not Path(wanted.sample_input_file).is_file():
            raise ValueError(f"sample_input_file {wanted.sample_input_file} does not exist: give a text file with one prompt a line.")
        if Path(wanted.sample_input_file).resolve() == Path(wanted.sample_output_file).resolve():
            raise ValueError(f"sample_output_file is sample_input_file ({wanted.sample_input_file}), which it would replace: name another file.")
    if wanted.text_gen_type != "interactive" and not Path(wanted.sample_output_file).absolute().parent.is_dir():
        raise ValueError(f"sample_output_file {wanted.sample_output_file}: its folder does not exist; create it, or name another.")


def write_texts(writer: Writer, *, terminal_in: TextIO, terminal_out: TextIO) -> None:
    """What `text_gen_type` asks for: a file of records, or a conversation."""
    wanted = writer.config.generation
    if wanted.text_gen_type == "interactive":
        converse(writer, terminal_in=terminal_in, terminal_out=terminal_out)
        return
    contexts = read_prompts(Path(str(wanted.sample_input_file))) if wanted.text_gen_type == "input-file" else [""] * wanted.num_samples
    with open(wanted.sample_output_file, "w", encoding="utf-8") as out:
        for record in writer.complete(contexts):
            out.write(record.to_json() + "\n")
            out.flush()
    print(f"{len(contexts)} texts in {wanted.sample_output_file}", file=terminal_out)


def read_prompts(path: Path) -> list[str]:
    """The lines of the file that hold something, each without its line end and otherwise as it is."""
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"sample_input_file {path} is not UTF-8 ({error}): write it anew as UTF-8.") from error


def converse(writer: Writer, *, terminal_in: TextIO, terminal_out: TextIO) -> None:
    """Answer prompts until the input ends. A prompt goes up to `prompt_end`."""
    prompt_end = writer.config.generation.prompt_end
    while (prompt := _read_prompt(prompt_end, terminal_in, terminal_out)) is not None:
        for record in writer.complete([prompt]):
            print(record.text if record.message is None else f"{record.text}\n[{record.message}]", file=terminal_out, flush=True)


def _read_prompt(prompt_end: str, terminal_in: TextIO, terminal_out: TextIO) -> str | None:
    """The text before `prompt_end`, over as many lines as it takes; None when the input is over."""
    print("Prompt >>> ", end="", file=terminal_out, flush=True)
    text = ""
    for line in iter(terminal_in.readline, ""):
        text += line
        for ending in (prompt_end, prompt_end + "\n"):
            if text.endswith(ending):
                return text.removesuffix(ending)
    return text or None

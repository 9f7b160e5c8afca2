"""What the demo shows of its runs: a picture of the losses and one table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from megatron.config.schema import Config
from megatron.data.build import build_datasets, sample_counts
from megatron.data.gpt_dataset import read_samples
from megatron.data.indexed import IndexedDataset
from tools.demo.bigram import bigram_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One trained, converted and scored model."""

    title: str
    parameters: int
    tokens: int
    train_loss: dict[int, float]
    valid_loss: dict[int, float]
    test_loss: float
    """Nats per token of the held-out test split."""
    kept_share: float
    """Of the causal attention map, computed in training."""
    tokens_per_s: float
    scores: dict[str, float]
    passage: str
    save: Path
    converted: Path

    @classmethod
    def read(cls, title: str, save: Path, *, results: dict[str, dict[str, Any]], converted: Path, prompt: str) -> Run:
        """Collect what the run left in its folders, and let the converted model write a passage."""
        rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if "train/lm_loss" in row]
        parameters, passage = sample(converted, prompt)
        return cls(
            title=title,
            parameters=parameters,
            tokens=round(sum(row["runtime/tokens_per_sec"] * row["runtime/iteration_time"] for row in steps)),
            train_loss={row["iteration"]: row["train/lm_loss"] for row in steps},
            valid_loss={row["iteration"]: row["validation/lm_loss"] for row in rows if "validation/lm_loss" in row},
            test_loss=next(row["test/lm_loss"] for row in reversed(rows) if "test/lm_loss" in row),
            kept_share=float(np.mean([row["runtime/kept_ratio"] for row in steps])),
            tokens_per_s=median(row["runtime/tokens_per_sec"] for row in steps),
            scores=readable_scores(results),
            passage=passage,
            save=save,
            converted=converted,
        )


def bigram_floor(config: Config, *, held_out: Path) -> float:
    """Loss on ``held_out`` of the bigram model of just those samples that the run trains on. Nats per token."""
    samples = sample_counts(train_iters=config.training.train_iters, eval_interval=1, eval_iters=0, train_batch_size=config.batch.train_batch_size)
    train = build_datasets(config.data, seq_length=config.model.seq_length, samples=samples, seed=config.training.seed).train
    assert train is not None
    assert samples.train is not None
    assert config.model.vocab_size is not None
    read = read_samples(train, range(samples.train)).text[:, :-1].ravel()
    documents = IndexedDataset(held_out)
    tokens = np.concatenate([documents[place] for place in range(len(documents))])
    return bigram_loss(read, tokens, vocab_size=config.model.vocab_size)


def sample(folder: Path, prompt: str, *, tokens: int = 120) -> tuple[int, str]:
    """Number of parameters of a converted model, and how it goes on from ``prompt`` (seeded)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer(prompt.rstrip(), return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=True, temperature=0.8, top_k=40, pad_token_id=tokenizer.eos_token_id)
    return sum(parameter.numel() for parameter in model.parameters()), tokenizer.decode(out[0], skip_special_tokens=True)


def readable_scores(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The figures of the table out of lm-eval's results."""
    return {
        "word perplexity": results["demo_perplexity"]["word_perplexity,none"],
        "bits per byte": results["demo_perplexity"]["bits_per_byte,none"],
        "next sentence, accuracy of 4": results["demo_next_sentence"]["acc,none"],
    }


def table(runs: Sequence[Run], *, bigram: float) -> str:
    """One line a figure, one column a run."""
    lines = [
        ("parameters", *(f"{run.parameters:,}" for run in runs)),
        ("training tokens", *(f"{run.tokens:,}" for run in runs)),
        ("training loss, last 50 steps", *(f"{np.mean(list(run.train_loss.values())[-50:]):.3f}" for run in runs)),
        ("held-out loss", *(f"{run.test_loss:.4f}" for run in runs)),
        ("held-out perplexity", *(f"{math.exp(run.test_loss):.1f}" for run in runs)),
        ("  of a bigram model of the same tokens", *(f"{bigram:.4f}" for _ in runs)),
        ("attention map computed", *(f"{run.kept_share:.1%}" for run in runs)),
        ("training tokens/s", *(f"{run.tokens_per_s:,.0f}" for run in runs)),
        *((name, *(f"{run.scores[name]:.3f}" for run in runs)) for name in runs[0].scores),
        ("checkpoints", *(str(run.save) for run in runs)),
        ("Hugging Face folder", *(str(run.converted) for run in runs)),
    ]
    rows = [("", *(run.title for run in runs)), *lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(runs) + 1)]
    text = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows]
    difference = runs[0].test_loss / runs[-1].test_loss - 1
    text.append(f"\n{runs[0].title} against {runs[-1].title}: held-out loss {difference:+.2%}.")
    text += [f"\n{run.title} writes:\n{run.passage}" for run in runs]
    return "\n".join(text)


def draw(runs: Sequence[Run], path: Path, *, bigram: float) -> Path:
    """Training losses (thin), validation losses (dots) and the bigram floor over the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.8), dpi=120, layout="constrained")
    for run in runs:
        steps = sorted(run.train_loss)
        (line,) = axes.plot(steps, smooth([run.train_loss[step] for step in steps]), label=f"{run.title}, {run.kept_share:.0%} of the map", lw=1.2)
        axes.plot(list(run.valid_loss), list(run.valid_loss.values()), "o", color=line.get_color(), ms=5)
    axes.axhline(bigram, color="grey", ls=":", lw=1, label="bigram model, held-out")
    axes.set(ylim=(None, 6.5), xlabel="step", ylabel="loss (nats per token)", title="Training loss (mean of 10 steps); dots: validation loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    plt.close(figure)
    return path


def smooth(values: Sequence[float], *, width: int = 10) -> list[float]:
    """Mean of each value and up to ``width - 1`` before it."""
    return [float(np.mean(values[max(0, i - width + 1) : i + 1])) for i in range(len(values))]

"""How many separators a text has, and what SepLLM keeps of it.

    python -m tools.sepllm.density data/demo/train --tokenizer data/demo/tokenizer.json
    python -m tools.sepllm.density --text book.txt --tokenizer tokenizer.json --seq-length 4096

Kept ratios are exact counts of the rows: the (query, key) pairs that are computed over all causal ones (the paper's Attn %), and the keys
that the last token of a row reads over all keys (its r.KV). The far capacity is how many columns the rows of one batch need for initial
tokens and separators.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from megatron.data.tokenizer import Tokenizer
from megatron.training.ratios import Ratios
from sepllm.layout import TokenLayout, far_capacity
from sepllm.pattern import AttentionPattern
from tools.command import exit_status
from tools.sepllm.rows import ArrayTokens, DatasetTokens, Tokens, row_blocks
from tools.sepllm.separators import separator_ids
from tools.sepllm.vocabulary import open_tokenizer, readable

WINDOWS = (64, 128, 256)
QUANTILES = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Of one window."""

    attention_map: float
    kv: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Density:
    """Separators of a text cut into rows."""

    name: str
    rows: int
    seq_length: int
    share: float
    """Of all tokens."""
    row_shares: dict[str, float]
    """Quantiles of the share over the rows."""
    counts: dict[int, int]
    """By separator id, in the order given."""
    most_far_keys: int
    """Separators and initial tokens of the row that has most."""
    far_capacity: int
    kept: dict[int, Kept]
    """By window."""

    @classmethod
    def of(cls, name: str, blocks: Iterable[Tensor], separators: Sequence[int], *, initial_tokens: int = 3) -> Density:
        """Of rows ``[b, S]``, all of one length."""
        pattern = AttentionPattern(initial_tokens=initial_tokens, separator_ids=frozenset(separators), windows=WINDOWS)
        shares: list[float] = []
        counts: Counter[int] = Counter()
        kept = [Ratios() for _ in WINDOWS]
        most = length = 0
        for ids in blocks:
            layout, length = TokenLayout.from_ids(ids, pattern), ids.shape[1]
            shares += layout.is_separator.float().mean(1).tolist()
            found, times = ids[layout.is_separator].unique(return_counts=True)
            counts.update(dict(zip(found.tolist(), times.tolist(), strict=True)))
            most = max(most, int(layout.is_far(0).sum(1).max()))
            kept = [before + Ratios.of(layout, layers=[layer]) for layer, before in enumerate(kept)]
        quantiles = np.quantile(shares, list(QUANTILES.values())).tolist()
        return cls(
            name=name,
            rows=len(shares),
            seq_length=length,
            share=float(np.mean(shares)),
            row_shares=dict(zip(QUANTILES, quantiles, strict=True)),
            counts={token: counts[token] for token in separators},
            most_far_keys=most,
            far_capacity=far_capacity(most, length),
            kept={window: Kept(attention_map=of_window.attention_map, kv=of_window.kv) for window, of_window in zip(WINDOWS, kept, strict=True)},
        )

    def text(self, tokenizer: Tokenizer | None) -> str:
        """For people."""
        total = max(sum(self.counts.values()), 1)
        shares = ", ".join(f"{label} {100 * share:.2f}" for label, share in self.row_shares.items())
        lines = [
            f"{self.name}: {self.rows} rows of {self.seq_length} tokens, {100 * self.share:.2f} % of them separators",
            f"per row, %: {shares}",
            "",
            *(
                f"{token:>6}  {'' if tokenizer is None else readable(tokenizer.token_text(token)):<4}{count:>12,}  {100 * count / total:5.1f} %"
                for token, count in self.counts.items()
            ),
            "",
            f"{'window':>6}  {'attention map %':>15}  {'KV of the last token %':>22}",
            *(f"{window:>6}  {100 * kept.attention_map:>15.2f}  {100 * kept.kv:>22.2f}" for window, kept in self.kept.items()),
            "",
            f"far keys of the row with most: {self.most_far_keys}, so a batch that holds it has {self.far_capacity} far columns",
        ]
        return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    flags = argparse.ArgumentParser(prog="tools.sepllm.density", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = flags.add_mutually_exclusive_group(required=True)
    source.add_argument("data", nargs="?", metavar="DATA", help="prefix of a .bin/.idx pair")
    source.add_argument("--text", type=Path, metavar="FILE", help="a text file instead; needs --tokenizer")
    flags.add_argument("--tokenizer", metavar="TOKENIZER", help="tokenizer.json, .model, a folder with one of them, bytes, or a name of tiktoken")
    flags.add_argument("--separators", type=int, nargs="+", metavar="ID", help="default: SepLLM's nine characters, looked up in --tokenizer")
    flags.add_argument("--seq-length", type=int, default=2048, help="default: %(default)s")
    flags.add_argument("--initial-tokens", type=int, default=3, help="default: %(default)s")
    flags.add_argument("--rows", type=int, metavar="COUNT", help="look at so many rows, spread evenly (default: at all)")
    flags.add_argument("--json", action="store_true", help="print JSON")
    arguments = flags.parse_args(argv)
    return exit_status(lambda: report(arguments))


def report(arguments: argparse.Namespace) -> None:
    tokenizer = None if arguments.tokenizer is None else open_tokenizer(arguments.tokenizer)
    if tokenizer is None and (arguments.text is not None or arguments.separators is None):
        raise ValueError("--tokenizer is missing: it makes tokens of --text, and names the separators where --separators does not.")
    if arguments.text is not None:
        assert tokenizer is not None
        tokens: Tokens = ArrayTokens.of_text(arguments.text, tokenizer)
    else:
        tokens = DatasetTokens(arguments.data)
    separators = arguments.separators
    if separators is None:
        assert tokenizer is not None
        separators = separator_ids(tokenizer)
    blocks = row_blocks(tokens, seq_length=arguments.seq_length, most=arguments.rows)
    density = Density.of(tokens.name, blocks, separators, initial_tokens=arguments.initial_tokens)
    print(json.dumps(asdict(density), indent=2) if arguments.json else density.text(tokenizer))


if __name__ == "__main__":
    sys.exit(main())

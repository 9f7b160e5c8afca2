"""Table 3 of the SepLLM paper (arXiv 2412.12094) from data: the attention map and the operations of each published setting.

    python -m tools.sepllm.flops
    python -m tools.sepllm.flops --data data/pile/train --separator-ids 15 13 32 2 28 27 209 186 187
    python -m tools.sepllm.flops -d configs size/160m my-method.yml run/pile --data data/pile/train

Attn %    the (query, key) pairs that are computed over all causal ones: exact counts of the rows, the mean over all layers.
FLOPs %   operations of the blocks with that attention over those with the whole S x S square, the output matrix left out. That is how the
          paper counts: its figures follow from its Attn % within 0.12. Causal attention, which computes half the square, has 84.6.
step %    operations of the whole step by GPT-NeoX's formula, output matrix included, over those with causal attention, which is what a good
          dense kernel computes.

Separators of the text decide the rest, so the default text (the demo's, 16 % separators) does not give the paper's Attn % where there are
separators; StreamingLLM's is the same for every text. Configurations are one run, as for deepy.py, and add a row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megatron.config.loader import load_config
from megatron.config.schema import Config, ModelConfig
from megatron.launch.kept import expected_kept_ratio
from megatron.training.flops import step_flops
from megatron.training.ratios import Ratios
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern
from tools.bench.text import DENSITY, PYTHIA_SEPARATORS, demo_stream
from tools.command import exit_status
from tools.sepllm.rows import ArrayTokens, DatasetTokens, Tokens, row_blocks

CONFIGS = Path(__file__).parents[2] / "configs"
VOCAB_SIZE = 50277
"""Of the Pythia tokenizer, with which the published models were trained."""
DEVICES = 8
"""A number that divides the published batch of 1024."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A setting of the paper, and its figures where Table 3 has them."""

    name: str
    method: str
    """File in configs/method."""
    attention: float | None = None
    """Per cent."""
    flops: float | None = None
    """Per cent."""


PUBLISHED = (
    Published(name="StreamingLLM n=64", method="streamingllm-n64", attention=6.43, flops=70.11),
    Published(name="SepLLM n=64", method="sepllm-n64", attention=17.21, flops=71.77),
    Published(name="SepLLM n=128", method="sepllm-n128", attention=22.48, flops=72.58),
    Published(name="SepLLM n=256", method="sepllm-n256"),
    Published(name="SepLLM n=64, H", method="sepllm-n64H", attention=24.11, flops=72.83),
    Published(name="SepLLM n=64, HT", method="sepllm-n64HT", attention=31.01, flops=73.90),
    Published(name="SepLLM n=64, HMT", method="sepllm-n64HMT"),
    Published(name="SepLLM n=128, HT", method="sepllm-n128HT"),
    Published(name="SepLLM n=128, HMT", method="sepllm-n128HMT"),
    Published(name="SepLLM n=256, HMT", method="sepllm-n256HMT"),
    Published(name="full attention", method="full", attention=100.0, flops=100.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One setting on one text."""

    name: str
    attention: float
    """Kept pairs over causal pairs."""
    flops: float
    """Of the blocks, over those with the S x S square."""
    step: float
    """Of the whole step, over that with causal attention."""
    published: Published | None = None

    @classmethod
    def of(cls, name: str, model: ModelConfig, ratios: Ratios, published: Published | None = None) -> Row:
        """Where nothing is skipped, the paper computes the square and has 100 %."""
        kept = ratios.attention_map
        executed = None if published is not None and published.method == "full" else kept
        return cls(name=name, attention=kept, flops=block_flops(model, executed), step=whole_flops(model, kept), published=published)

    def cells(self) -> tuple[str, ...]:
        paper = (None, None) if self.published is None else (self.published.attention, self.published.flops)
        in_paper = ["" if figure is None else f"{figure:.2f}" for figure in paper]
        return self.name, f"{100 * self.attention:.2f}", in_paper[0], f"{100 * self.flops:.2f}", in_paper[1], f"{100 * self.step:.2f}"


def block_flops(model: ModelConfig, kept_ratio: float | None) -> float:
    """Operations of the blocks alone over those with the whole S x S square of scores."""
    blocks = model.model_copy(update={"padded_vocab_size": None})
    return step_flops(blocks, samples=1, recomputes=False, kept_ratio=kept_ratio) / step_flops(blocks, samples=1, recomputes=False)


def whole_flops(model: ModelConfig, kept_ratio: float) -> float:
    """Operations of a step, output matrix included, over those with causal attention."""
    return step_flops(model, samples=1, recomputes=False, kept_ratio=kept_ratio) / step_flops(model, samples=1, recomputes=False, kept_ratio=1.0)


def expected_attention(*, length: int, window: int, initial_tokens: int, share: float) -> float:
    """The attention map of one layer where each token is a separator with probability ``share``: kept pairs over causal pairs."""
    pattern = AttentionPattern(initial_tokens=initial_tokens, separator_ids=frozenset({0}), windows=(window,))
    return expected_kept_ratio(pattern, length, share=share)


def share_behind(attention: float, *, length: int, window: int, initial_tokens: int) -> float:
    """The share of separators with which a layer computes that much of its attention map."""
    none, all_of_them = (expected_attention(length=length, window=window, initial_tokens=initial_tokens, share=share) for share in (0.0, 1.0))
    return (attention - none) / (all_of_them - none)


def published_configs() -> list[Config]:
    """The runs of `PUBLISHED`, on the 160m model."""
    files = ("size/160m", "method/{}", "run/pile")
    return [_load([CONFIGS / f"{name.format(published.method)}.yml" for name in files]) for published in PUBLISHED]


def _load(paths: Sequence[Path]) -> Config:
    return load_config(paths, world_size=DEVICES, vocab_size=VOCAB_SIZE)


def count(patterns: Sequence[AttentionPattern], blocks: Iterable[Tensor]) -> list[Ratios]:
    """What each pattern keeps of the rows ``[b, S]``."""
    totals = [Ratios() for _ in patterns]
    for ids in blocks:
        totals = [before + Ratios.of(TokenLayout.from_ids(ids, pattern)) for before, pattern in zip(totals, patterns, strict=True)]
    return totals


def with_separators(pattern: AttentionPattern, separators: Sequence[int]) -> AttentionPattern:
    """The pattern for a text whose tokenizer has other separator ids."""
    return replace(pattern, separator_ids=frozenset(separators)) if pattern.separator_ids else pattern


def table(rows: Sequence[Row]) -> str:
    cells = [("setting", "Attn %", "paper", "FLOPs %", "paper", "step %"), *(row.cells() for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, len(row)))]) for row in cells]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    flags = argparse.ArgumentParser(prog="tools.sepllm.flops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("configs", nargs="*", metavar="CONFIG.yml", help="the files of one run, which adds a row")
    flags.add_argument("-d", "--conf-dir", type=Path, default=Path(), help="folder of these files")
    flags.add_argument("--data", metavar="PREFIX", help="of a .bin/.idx pair (default: the demo's text)")
    flags.add_argument("--separator-ids", type=int, nargs="+", metavar="ID", help="of --data (default: the run's, else Pythia's)")
    flags.add_argument(
        "--density-target", type=float, default=DENSITY, metavar="SHARE", help="of separators, in the demo's text (default: %(default)s)"
    )
    flags.add_argument("--rows", type=int, default=512, help="at most so many, spread evenly over the text (default: %(default)s)")
    arguments = flags.parse_args(argv)
    return exit_status(lambda: report(arguments))


def report(arguments: argparse.Namespace) -> None:
    named = [(published.name, config, published) for published, config in zip(PUBLISHED, published_configs(), strict=True)]
    runs: list[tuple[str, Config, Published | None]] = list(named)
    own: tuple[int, ...] = ()
    if arguments.configs:
        paths = [_with_suffix(arguments.conf_dir / name) for name in arguments.configs]
        config = _load(paths)
        runs.append((" + ".join(path.stem for path in paths), config, None))
        own = tuple(sorted(config.attention.prefill.separator_ids))
    tokens, separators = _text(arguments, own or PYTHIA_SEPARATORS)
    rows: dict[str, Row] = {}
    for length in dict.fromkeys(config.model.seq_length for _, config, _ in runs):
        of_length = [run for run in runs if run[1].model.seq_length == length]
        patterns = [with_separators(config.attention.prefill, separators) for _, config, _ in of_length]
        counted = count(patterns, row_blocks(tokens, seq_length=length, most=arguments.rows))
        rows |= {name: Row.of(name, config.model, ratios, paper) for (name, config, paper), ratios in zip(of_length, counted, strict=True)}
    print(_what_was_counted(tokens, separators, runs[0][1].model.seq_length, arguments.rows))
    print(table([rows[name] for name, _, _ in runs]))
    print(f"\n{_what_the_paper_implies()}")


def _text(arguments: argparse.Namespace, separators: Sequence[int]) -> tuple[Tokens, Sequence[int]]:
    """The text and the ids of its separators."""
    if arguments.data is not None:
        return DatasetTokens(arguments.data), arguments.separator_ids or separators
    if arguments.separator_ids is not None:
        raise ValueError("--separator-ids are those of --data, which is missing: the demo's text has its own tokenizer and separators.")
    stream = demo_stream(target=arguments.density_target)
    return ArrayTokens(name=stream.name, ids=stream.ids), stream.separator_ids


def _what_was_counted(tokens: Tokens, separators: Sequence[int], length: int, most: int) -> str:
    found = total = 0
    pattern = AttentionPattern(separator_ids=frozenset(separators))
    for ids in row_blocks(tokens, seq_length=length, most=most):
        found, total = found + int(TokenLayout.from_ids(ids, pattern).is_separator.sum()), total + ids.numel()
    return f"{tokens.name}: {total // length} rows of {length} tokens, {100 * found / total:.2f} % separators\n"


def _what_the_paper_implies() -> str:
    shape = {"length": 2048, "initial_tokens": 3}
    share = share_behind(0.1721, window=64, **shape)
    wider = expected_attention(window=128, share=share, **shape)
    return (
        f"The paper's 17.21 for n=64 is what {100 * share:.1f} % separators give; with as many, n=128 has {100 * wider:.2f} (paper: 22.48), "
        f"H {(11 * 17.21 + 100) / 12:.2f} (24.11) and HT {(10 * 17.21 + 200) / 12:.2f} (31.01)."
    )


def _with_suffix(path: Path) -> Path:
    return path if path.suffix in (".yml", ".yaml") else path.with_name(f"{path.name}.yml")


if __name__ == "__main__":
    sys.exit(main())

"""A picture of what the tokens of a sentence read: the mask of a configuration, or the attention of a trained model.

    python -m tools.sepllm.show "The rain came, and he left." mask.png --tokenizer tokenizer.json --window 4
    python -m tools.sepllm.show "The rain came, and he left." mask.png --config configs/local/demo.yml configs/local/demo-sepllm.yml
    python -m tools.sepllm.show "The rain came, and he left." scores.png --model runs/demo/sepllm-hf --layers 0 3

The mask: a panel for each kind of layer, or for those of --layers. The attention of a model (the paper's Figure 2): the mean over its heads,
queries downwards and keys to the right, above it what each key receives from the queries after it, separators in blue. A separator is
readable for longer than another token, so beside the share of the attention that separators receive stands their share of the pairs that
are read at all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron.config.loader import load_config
from megatron.data.tokenizer import Tokenizer
from sepllm.layout import TokenLayout
from sepllm.pattern import UNBOUNDED, AttentionPattern
from tools.command import exit_status
from tools.plot.mask import COLOURS, UNREAD, Drawn, Kind, draw_mask, kinds_of, legend_of, tint
from tools.sepllm.separators import separator_ids
from tools.sepllm.vocabulary import open_tokenizer, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tools.sepllm.scores import Received

CELL = 0.13
"""Inches of a cell."""
WINDOW = 8
"""Short enough for a sentence to be longer."""
PANELS = 4
"""Layers of a model that are shown unless --layers says which."""
MOST_TOKENS = 120
OTHER = "#BBBBBB"
LABELS: dict[Kind, str] = {"initial": "initial token", "separator": "separator", "grid": "grid", "window": "other token"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a layer of a model gives to each key."""

    layer: int
    drawn: Drawn
    weights: NDArray[np.float64]
    """``[S, S]``"""
    received: Received


def main(argv: Sequence[str] | None = None) -> int:
    flags = argparse.ArgumentParser(prog="tools.sepllm.show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("sentence")
    flags.add_argument("out", type=Path, metavar="OUT.png")
    flags.add_argument("--tokenizer", metavar="TOKENIZER", help="default: that of the configuration, or the one in the model's folder")
    source = flags.add_mutually_exclusive_group()
    source.add_argument("--config", nargs="+", metavar="CONFIG.yml", help="files of one run, whose pattern is drawn")
    source.add_argument("--model", metavar="FOLDER", help="a Hugging Face folder, whose attention is drawn")
    flags.add_argument("--layers", type=int, nargs="+", metavar="LAYER", help="counted from 0")
    flags.add_argument("--initial-tokens", type=int, default=3, help="of the mask without --config (default: %(default)s)")
    flags.add_argument("--window", type=int, metavar="COUNT", help=f"of the mask, in all layers that are not full (default: {WINDOW}, or --config's)")
    arguments = flags.parse_args(argv)
    return exit_status(lambda: report(arguments))


def report(arguments: argparse.Namespace) -> None:
    if arguments.model is not None:
        scores = scores_of(
            arguments.model, arguments.sentence, tokenizer=open_tokenizer(arguments.tokenizer or arguments.model), layers=arguments.layers
        )
        print("\n".join(map(description, scores)))
        draw_scores(scores, arguments.out)
        return
    tokenizer, pattern = tokenizer_and_pattern(arguments)
    ids, texts = encoded(tokenizer, arguments.sentence)
    if pattern.is_full(len(ids)):
        print(f"The windows are as long as the sentence ({len(ids)} tokens), so all of it is read: --window draws shorter ones.", file=sys.stderr)
    draw_masks(masks(ids, texts, pattern, layers=arguments.layers), arguments.out)


def tokenizer_and_pattern(arguments: argparse.Namespace) -> tuple[Tokenizer, AttentionPattern]:
    """Of the configuration, or of the flags alone."""
    if arguments.config is not None:
        config = load_config(arguments.config, world_size=1, device="cpu")
        source = arguments.tokenizer or config.tokenizer.vocab_file
        if source is None:
            raise ValueError("The configuration names no vocab_file: give --tokenizer.")
        pattern = config.attention.prefill
        return open_tokenizer(source), pattern if arguments.window is None else with_window(pattern, arguments.window, full=config.model.seq_length)
    if arguments.tokenizer is None:
        raise ValueError("Give --tokenizer, --config or --model: something has to make tokens of the sentence.")
    tokenizer = open_tokenizer(arguments.tokenizer)
    separators = frozenset(separator_ids(tokenizer))
    return tokenizer, AttentionPattern(initial_tokens=arguments.initial_tokens, separator_ids=separators, windows=(arguments.window or WINDOW,))


def with_window(pattern: AttentionPattern, window: int, *, full: int) -> AttentionPattern:
    """The pattern with this window in every layer that is not full attention over ``full`` tokens."""
    return replace(pattern, windows=tuple(own if own >= full else window for own in pattern.windows))


def encoded(tokenizer: Tokenizer, sentence: str) -> tuple[Tensor, list[str]]:
    """The ids ``[S]`` of the sentence, and a label for each."""
    ids = tokenizer.encode(sentence)
    if not 0 < len(ids) <= MOST_TOKENS:
        raise ValueError(f"The sentence has {len(ids)} tokens: a picture holds 1 to {MOST_TOKENS}.")
    return torch.tensor(ids), [readable(tokenizer.token_text(token)) for token in ids]


def masks(ids: Tensor, texts: Sequence[str], pattern: AttentionPattern, *, layers: Sequence[int] | None = None) -> dict[str, Drawn]:
    """What the layers read, by a title; layers that read the same are one picture unless ``layers`` names them."""
    if layers is not None:
        return {_title([layer], pattern): Drawn.of(texts, ids, pattern, layer=layer) for layer in _known(layers, pattern.num_layers)}
    layout = TokenLayout.from_ids(ids[None], pattern)
    alike: dict[int, list[int]] = {}
    for layer in range(pattern.num_layers):
        alike.setdefault(id(layout.ranges(layer)), []).append(layer)
    return {_title(same, pattern): Drawn.of(texts, ids, pattern, layer=same[0]) for same in alike.values()}


def scores_of(folder: str, sentence: str, *, tokenizer: Tokenizer, layers: Sequence[int] | None = None) -> list[Scores]:
    """The attention of these layers of a model, by default of a few from the first to the last.

    Self-adjust weights may be negative; their magnitude is what is drawn.
    """
    from sepllm.hf.configuration_sepllm_gpt_neox import prefill_pattern
    from tools.sepllm.scores import Received, attention_weights, load_model

    model = load_model(folder)
    ids, texts = encoded(tokenizer, sentence)
    count = model.config.num_hidden_layers
    is_sparse = model.config.model_type == "sepllm_gpt_neox"
    pattern = prefill_pattern(model.config) if is_sparse else AttentionPattern.full(count)
    weights = attention_weights(model, ids).double().abs().numpy()
    marked = AttentionPattern(separator_ids=frozenset(pattern.separator_ids or separator_ids(tokenizer)), initial_tokens=pattern.initial_tokens or 1)
    kinds = kinds_of(TokenLayout.from_ids(ids[None], marked), layer=0)
    layout = TokenLayout.from_ids(ids[None], pattern)
    chosen = _known(layers, count) if layers is not None else sorted({round(i * (count - 1) / (PANELS - 1)) for i in range(PANELS)})
    scores = []
    for layer in chosen:
        drawn = Drawn(tokens=tuple(texts), kinds=kinds, ranges=layout.ranges(layer))
        received = Received.of(weights[layer], drawn.is_read(), kinds)
        scores.append(Scores(layer=layer, drawn=drawn, weights=weights[layer], received=received))
    return scores


def description(scores: Scores) -> str:
    """What separators receive in a layer, in words."""
    received = scores.received
    if "separator" not in received.share:
        return f"layer {scores.layer}: no separators"
    return (
        f"layer {scores.layer}: separators receive {100 * received.share['separator']:.0f} % of the attention, "
        f"in {100 * received.readable['separator']:.0f} % of the pairs"
    )


def draw_masks(panels: dict[str, Drawn], path: Path) -> None:
    """The masks side by side."""
    plt = _pyplot()
    tokens = len(next(iter(panels.values())).tokens)
    side = tokens * CELL + 0.9
    figure, axes = plt.subplots(1, len(panels), figsize=(max(side * len(panels), 4.5), side + 0.5), dpi=200, layout="constrained", squeeze=False)
    for place, (title, drawn) in zip(axes[0], panels.items(), strict=True):
        draw_mask(place, drawn)
        place.set_title(title, fontsize=9, loc="left", pad=_title_pad(drawn))
    kinds = [kind for drawn in panels.values() for kind in drawn.kinds]
    figure.legend(handles=legend_of(kinds), loc="outside lower center", ncols=5, fontsize=7.5, frameon=False, handlelength=1.2)
    _save(figure, path)


def draw_scores(panels: Sequence[Scores], path: Path) -> None:
    """Two charts for each layer, one above the other."""
    plt = _pyplot()
    from matplotlib.patches import Patch

    columns = len(panels) if len(panels) <= 3 else 2
    rows = -(-len(panels) // columns)
    side = len(panels[0].drawn.tokens) * CELL + 1.1
    figure = plt.figure(figsize=((side + 0.5) * columns, (side + 1.0) * rows), dpi=200, layout="constrained")
    grids = figure.subfigures(rows, columns, squeeze=False)
    for index, scores in enumerate(panels):
        above, below = grids[index // columns][index % columns].subplots(2, 1, height_ratios=(1.3, side), sharex=True)
        _draw_received(above, scores)
        _draw_weights(below, scores)
    kinds = [kind for scores in panels for kind in scores.drawn.kinds]
    handles = [Patch(color=OTHER if kind == "window" else COLOURS[kind], label=LABELS[kind]) for kind in LABELS if kind in kinds]
    handles.append(Patch(facecolor=UNREAD, label="not read"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=7.5, frameon=False, handlelength=1.2)
    _save(figure, path)


def _draw_received(axes: Axes, scores: Scores) -> None:
    """A bar for each key; what is in the window alone is grey, to leave the colours to the others."""
    kinds = scores.drawn.kinds
    colours = [OTHER if kind == "window" else COLOURS[kind] for kind in kinds]
    axes.bar(np.arange(len(kinds)) + 0.5, scores.received.by_key, width=0.84, color=colours)
    axes.set_title(description(scores), fontsize=8, loc="left", pad=4)
    axes.set_ylabel("mean weight\nreceived", fontsize=6)
    axes.tick_params(labelsize=6, length=2, labelbottom=False, bottom=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_weights(axes: Axes, scores: Scores) -> None:
    """Dark is much. The scale is a square root's, because a few weights are much larger than the rest."""
    from matplotlib.colors import ListedColormap, PowerNorm

    drawn, count = scores.drawn, len(scores.drawn.tokens)
    is_read = drawn.is_read()
    unread = np.ma.masked_array(np.ones((count, count)), is_read | ~np.tri(count, dtype=bool))
    extent = (0, count, count, 0)
    axes.imshow(unread, cmap=ListedColormap([UNREAD]), extent=extent, aspect="equal", interpolation="none")
    shown = np.ma.masked_array(scores.weights, ~is_read)
    axes.set_anchor("N")
    image = axes.imshow(shown, cmap="magma_r", norm=PowerNorm(0.5, 0, max(shown.max(), 1e-9)), extent=extent, aspect="equal", interpolation="none")
    axes.set_xticks(np.arange(count) + 0.5, drawn.tokens, rotation=90, fontsize=5.5)
    axes.set_yticks(np.arange(count) + 0.5, drawn.tokens, fontsize=5.5)
    axes.tick_params(length=0, pad=1)
    axes.spines[:].set_visible(False)
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        for label, kind in zip(labels, drawn.kinds, strict=True):
            tint(label, kind)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01)
    bar.set_label("weight, mean of the heads", fontsize=5.5)
    bar.ax.tick_params(labelsize=5.5, length=2)
    bar.outline.set_visible(False)


def _known(layers: Sequence[int], count: int) -> Sequence[int]:
    if not all(0 <= layer < count for layer in layers):
        raise ValueError(f"--layers {' '.join(map(str, layers))}: there are {count} layers, 0 to {count - 1}.")
    return layers


def _title(layers: Sequence[int], pattern: AttentionPattern) -> str:
    window = pattern.windows[layers[0]]
    return f"layer{'s' * (len(layers) > 1)} {_spans(layers)}: {'full attention' if window >= UNBOUNDED else f'n = {window}'}"


def _spans(layers: Sequence[int]) -> str:
    """``0, 2-4`` for 0, 2, 3, 4."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and spans[-1][-1] == layer - 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)


def _title_pad(drawn: Drawn) -> float:
    """Points above the axes that the longest token needs."""
    return 6 + 3.9 * max(map(len, drawn.tokens))


def _pyplot() -> ModuleType:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, bbox_inches="tight", pad_inches=0.1)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())

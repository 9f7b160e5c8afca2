"""The picture of SepLLM's attention for docs/attention.md: the mask of a sentence, its compaction, and the tiles that a kernel visits.

python -m tools.plot.mask OUT.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sepllm.layout import KeyRanges, TokenLayout
from sepllm.pattern import AttentionPattern
from tools.command import until_stopped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch
    from matplotlib.text import Text

SENTENCE = "When the rain came , the old man closed his book , looked at the sky ; then he said that it was time to go home ."
SEPARATORS = (",", ";", ".")
INITIAL, WINDOW, TILE = 2, 4, 4
GAP = 2
"""Columns between the far keys and the keys."""
Kind = Literal["initial", "separator", "grid", "window"]
COLOURS: dict[Kind, str] = {"initial": "#E69F00", "separator": "#0072B2", "grid": "#CC79A7", "window": "#7CC4A8"}
"""Orange, blue and purple of Okabe and Ito and a light green, which differ in grey as well. ``grid``: FixLLM's."""
UNREAD, VISITED, INK = "#EFEFEF", "#FFFFFF", "#333333"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A sentence and what each of its tokens reads."""

    tokens: tuple[str, ...]
    kinds: tuple[Kind, ...]
    """Why far queries read each token; ``window`` where they do not."""
    ranges: KeyRanges
    """Of one row."""

    @classmethod
    def of(cls, tokens: Sequence[str], ids: torch.Tensor, pattern: AttentionPattern, *, layer: int = 0) -> Drawn:
        """What a layer of the pattern makes of ``ids [S]``, whose texts are ``tokens``."""
        layout = TokenLayout.from_ids(ids[None], pattern)
        return cls(tokens=tuple(tokens), kinds=kinds_of(layout, layer=layer), ranges=layout.ranges(layer))

    @property
    def far_keys(self) -> list[int]:
        """The far columns that any query reads, as keys, in order."""
        return self.ranges.index[0, : int(self.ranges.far_hi.max())].tolist()

    def is_in_window(self) -> NDArray[np.bool_]:
        """Whether the query reads the key in its window. ``[T, S]``"""
        return _inside(self.ranges.band_lo, self.ranges.band_hi, len(self.tokens))

    def is_far(self) -> NDArray[np.bool_]:
        """Whether the query reads the far column. ``[T, M]``"""
        return _inside(self.ranges.far_lo, self.ranges.far_hi, len(self.far_keys))

    def is_read(self) -> NDArray[np.bool_]:
        """Over the keys in their own order. ``[T, S]``"""
        return self.ranges.dense()[0].numpy()


def kinds_of(layout: TokenLayout, *, layer: int) -> tuple[Kind, ...]:
    """Why far queries of a layer read each column of the first row."""
    is_far = layout.is_far(layer)[0].tolist()
    because = zip(layout.is_initial[0].tolist(), layout.is_separator[0].tolist(), is_far, strict=True)
    return tuple("initial" if initial else "separator" if separator else "grid" if far else "window" for initial, separator, far in because)


def example(sentence: str = SENTENCE) -> Drawn:
    """The picture's sentence, a token a word."""
    tokens = sentence.split()
    ids = torch.tensor([SEPARATORS.index(token) if token in SEPARATORS else len(SEPARATORS) for token in tokens])
    return Drawn.of(tokens, ids, AttentionPattern(initial_tokens=INITIAL, separator_ids=frozenset(range(len(SEPARATORS))), windows=(WINDOW,)))


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(prog="tools.plot.mask", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("out", type=Path, metavar="OUT.png")
    draw(example(), flags.parse_args(argv).out)


def draw(drawn: Drawn, path: Path) -> None:
    """Above: the mask, and the two ranges of each query after compaction. Below: the tiles of either."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    width = len(drawn.tokens)
    columns = len(drawn.far_keys) + GAP + width
    figure, axes = plt.subplots(2, 2, figsize=(8.4, 8.3), dpi=200, layout="constrained", width_ratios=(width, columns))
    (mask, compact), (mask_tiles, compact_tiles) = axes
    draw_mask(mask, drawn)
    draw_compact(compact, drawn)
    visited, causal = draw_mask_tiles(mask_tiles, drawn)
    fewer = draw_compact_tiles(compact_tiles, drawn)
    above_tokens, above_cells = 30, 4
    mask.set_title(f"1  The mask: {INITIAL} initial tokens, separators, {WINDOW} nearest", fontsize=9, loc="left", pad=above_tokens)
    compact.set_title("2  Far keys gathered: two ranges a query", fontsize=9, loc="left", pad=above_tokens)
    mask_tiles.set_title(f"3  Tiles, keys in their own order: {visited} of {causal}", fontsize=9, loc="left", pad=above_cells)
    compact_tiles.set_title(f"4  Tiles, far keys gathered: {fewer}", fontsize=9, loc="left", pad=above_cells)
    handles = legend_of(drawn.kinds)
    handles.append(Patch(facecolor=VISITED, edgecolor=INK, label=f"tile of {TILE} x {TILE} that the kernel computes"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=7.5, frameon=False, handlelength=1.2, columnspacing=1.2)
    figure.savefig(path)
    plt.close(figure)


def legend_of(kinds: Sequence[Kind]) -> list[Patch]:
    """What the colours of a mask say, of those that occur."""
    from matplotlib.patches import Patch

    labels: dict[Kind, str] = {"initial": "initial token", "separator": "separator", "grid": "grid", "window": "in the window"}
    handles = [Patch(color=COLOURS[kind], label=label) for kind, label in labels.items() if kind in kinds]
    return [*handles, Patch(facecolor=UNREAD, label="not read")]


def draw_mask(axes: Axes, drawn: Drawn) -> None:
    """The mask, queries downwards and keys to the right, with the tokens on both axes."""
    for query, key in np.argwhere(np.tri(len(drawn.tokens), dtype=bool)).tolist():
        _cell(axes, key, query, _colour(drawn, query, key))
    _prepare(axes, drawn, columns=len(drawn.tokens))
    _label_columns(axes, drawn, range(len(drawn.tokens)), first=0)


def draw_compact(axes: Axes, drawn: Drawn) -> None:
    start = len(drawn.far_keys) + GAP
    for query, column in np.argwhere(drawn.is_far()).tolist():
        _cell(axes, column, query, COLOURS[drawn.kinds[drawn.far_keys[column]]])
    for query, key in np.argwhere(drawn.is_in_window()).tolist():
        _cell(axes, start + key, query, COLOURS["window"])
    for query in range(len(drawn.tokens)):
        far_lo, far_hi, band_lo, band_hi = (int(bound[0, query]) for bound in _bounds(drawn.ranges))
        _outline(axes, far_lo, query, far_hi - far_lo, 1, lw=0.6)
        _outline(axes, start + band_lo, query, band_hi - band_lo, 1, lw=0.6)
    _prepare(axes, drawn, columns=start + len(drawn.tokens))
    _label_columns(axes, drawn, drawn.far_keys, first=0)
    _label_columns(axes, drawn, range(len(drawn.tokens)), first=start)


def draw_mask_tiles(axes: Axes, drawn: Drawn) -> tuple[int, int]:
    """How many tiles are visited, and how many the causal triangle has."""
    for query, key in np.argwhere(np.tri(len(drawn.tokens), dtype=bool)).tolist():
        _cell(axes, key, query, _colour(drawn, query, key))
    tiles = touched(drawn.is_read())
    for row, column in tiles:
        _outline(axes, column * TILE, row * TILE, TILE, TILE, lw=1.0)
    _prepare(axes, drawn, columns=len(drawn.tokens))
    axes.set_xlabel("keys", fontsize=7.5, labelpad=2)
    return len(tiles), len(touched(np.tri(len(drawn.tokens), dtype=bool)))


def draw_compact_tiles(axes: Axes, drawn: Drawn) -> int:
    """How many tiles are visited."""
    start = len(drawn.far_keys) + GAP
    far, band = touched(drawn.is_far()), touched(drawn.is_in_window())
    for first, tiles in ((0, far), (start, band)):
        for row, column in tiles:
            width = min(TILE, len(drawn.far_keys) - column * TILE) if first == 0 else TILE
            for query in range(row * TILE, (row + 1) * TILE):
                for offset in range(width):
                    _cell(axes, first + column * TILE + offset, query, UNREAD)
    for query, column in np.argwhere(drawn.is_far()).tolist():
        _cell(axes, column, query, COLOURS[drawn.kinds[drawn.far_keys[column]]])
    for query, key in np.argwhere(drawn.is_in_window()).tolist():
        _cell(axes, start + key, query, COLOURS["window"])
    for row, column in far:
        _outline(axes, column * TILE, row * TILE, min(TILE, len(drawn.far_keys) - column * TILE), TILE, lw=1.0)
    for row, column in band:
        _outline(axes, start + column * TILE, row * TILE, TILE, TILE, lw=1.0)
    _prepare(axes, drawn, columns=start + len(drawn.tokens))
    axes.set_xlabel("far keys, then keys", fontsize=7.5, labelpad=2)
    return len(far) + len(band)


def touched(reads: NDArray[np.bool_], *, tile: int = TILE) -> list[tuple[int, int]]:
    """Rows and columns of the tiles in which anything is read."""
    queries, keys = np.nonzero(reads)
    return sorted(set(zip((queries // tile).tolist(), (keys // tile).tolist(), strict=True)))


def _bounds(ranges: KeyRanges) -> tuple[torch.Tensor, ...]:
    return ranges.far_lo, ranges.far_hi, ranges.band_lo, ranges.band_hi


def _inside(low: torch.Tensor, high: torch.Tensor, count: int) -> NDArray[np.bool_]:
    column = torch.arange(count)
    return ((column >= low[0, :, None]) & (column < high[0, :, None])).numpy()


def _colour(drawn: Drawn, query: int, key: int) -> str:
    if drawn.is_in_window()[query, key]:
        return COLOURS["window"]
    return COLOURS[drawn.kinds[key]] if drawn.is_read()[query, key] else UNREAD


def _cell(axes: Axes, x: float, y: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, facecolor=colour, lw=0))


def _outline(axes: Axes, x: float, y: float, width: float, height: float, *, lw: float) -> None:
    from matplotlib.patches import Rectangle

    if width:
        axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=INK, lw=lw))


def _prepare(axes: Axes, drawn: Drawn, *, columns: int) -> None:
    """Square cells, queries downwards with their tokens."""
    axes.set(xlim=(-0.2, columns + 0.2), ylim=(len(drawn.tokens) + 0.2, -0.2), aspect="equal", xticks=[])
    axes.set_yticks([query + 0.5 for query in range(len(drawn.tokens))], drawn.tokens, fontsize=6)
    axes.tick_params(length=0, pad=1)
    axes.spines[:].set_visible(False)
    for key, label in enumerate(axes.get_yticklabels()):
        tint(label, drawn.kinds[key])


def _label_columns(axes: Axes, drawn: Drawn, keys: Sequence[int], *, first: int) -> None:
    for column, key in enumerate(keys):
        label = axes.text(first + column + 0.5, -0.4, drawn.tokens[key], rotation=90, ha="center", va="bottom", fontsize=6)
        tint(label, drawn.kinds[key])


def tint(label: Text, kind: Kind) -> None:
    """Far keys in their colour; a sign is larger, to be seen."""
    if kind != "window":
        label.set(color=COLOURS[kind], fontweight="bold", fontsize=9 if kind == "separator" else 6)


if __name__ == "__main__":
    raise SystemExit(until_stopped(main))

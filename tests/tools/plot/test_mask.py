from __future__ import annotations

from pathlib import Path

import numpy as np

from sepllm.pattern import AttentionPattern
from tools.plot.mask import INITIAL, SENTENCE, SEPARATORS, WINDOW, draw, example, main, touched

TOKENS = SENTENCE.split()


def test_picture_shows_the_papers_mask() -> None:
    pattern = AttentionPattern(initial_tokens=INITIAL, separator_ids=(1,), windows=(WINDOW,))
    read = example().is_read()
    for query in range(len(TOKENS)):
        for key, token in enumerate(TOKENS):
            assert read[query, key] == pattern.reads(query=query, key=key, key_id=int(token in SEPARATORS))


def test_compaction_keeps_every_pair_once() -> None:
    drawn = example()
    pairs = drawn.is_in_window().astype(int)
    for query, column in np.argwhere(drawn.is_far()):
        pairs[query, drawn.far_keys[column]] += 1
    assert np.array_equal(pairs, drawn.is_read().astype(int))


def test_tiles_are_those_in_which_anything_is_read() -> None:
    reads = np.zeros((8, 8), dtype=bool)
    reads[0, 0] = reads[5, 3] = reads[7, 7] = reads[6, 7] = True
    assert touched(reads, tile=4) == [(0, 0), (1, 0), (1, 1)]


def test_picture_is_a_png(tmp_path: Path) -> None:
    main([str(tmp_path / "mask.png")])
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_shorter_sentences_can_be_drawn(tmp_path: Path) -> None:
    draw(example("Yes , no , yes , no , yes ."), tmp_path / "mask.png")
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import IndexedDatasetWriter
from tools.bench.text import TokenStream, file_stream, mixed

SEPARATORS = (1, 2)


def stream(share: float, *, length: int = 40_000, seed: int = 0, name: str = "text") -> TokenStream:
    """Ids of which about ``share`` are separators; the others are 10 and more."""
    random = np.random.default_rng(seed)
    ids = np.where(random.random(length) < share, random.integers(1, 3, length), random.integers(10, 50, length))
    return TokenStream(name=name, ids=ids, separator_ids=SEPARATORS)


@pytest.mark.parametrize("target", [0.12, 0.16, 0.22])
def test_two_texts_are_mixed_to_the_target(target: float) -> None:
    both = mixed([stream(0.25, seed=1), stream(0.1, seed=2)], target=target)
    assert both.density() == pytest.approx(target, abs=0.001)


def test_mixture_is_made_of_whole_pieces_in_order() -> None:
    sources = [stream(0.25, seed=1), stream(0.1, seed=2)]
    pieces = mixed(sources, target=0.16, piece=64).ids.reshape(-1, 64)
    place = [0, 0]
    for piece in pieces:
        (source,) = (i for i in range(2) if np.array_equal(sources[i].ids[place[i] : place[i] + 64], piece))
        place[source] += 64
    assert min(place) > 0


def test_share_that_no_mixture_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"A share of 0\.3 separators cannot be mixed"):
        mixed([stream(0.25), stream(0.1)], target=0.3)


@pytest.mark.parametrize("length", [256, 2048])
def test_every_row_is_within_the_tolerance_of_the_target(length: int) -> None:
    rows = stream(0.16).rows(4, length, target=0.16)
    assert rows.shape == (4, length)
    assert (((rows == 1) | (rows == 2)).double().mean(1) - 0.16).abs().max() <= 0.01


def test_rows_do_not_overlap_and_repeat_with_the_seed() -> None:
    text = TokenStream(name="text", ids=np.arange(1000), separator_ids=(0,))
    rows = text.rows(4, 100, target=None)
    assert len(np.unique(rows.numpy())) == 400
    assert rows.equal(text.rows(4, 100, target=None))


def test_text_without_such_stretches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has 0 stretches of 100 tokens with 0\.5"):
        stream(0.1).rows(1, 100, target=0.5)
    with pytest.raises(ValueError, match="has 40000 tokens, but a row takes 50000"):
        stream(0.1).rows(1, 50_000, target=None)


def test_own_tokens_come_from_an_array_or_a_dataset(tmp_path: Path) -> None:
    ids = np.arange(20, dtype=np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    with IndexedDatasetWriter(tmp_path / "text", np.dtype(np.uint16)) as writer:
        writer.add_document(ids[:7].tolist())
        writer.add_document(ids[7:].tolist())
    for name in ("ids.npy", "text.bin"):
        assert file_stream(tmp_path / name, SEPARATORS).ids.tolist() == list(range(20))
    np.save(tmp_path / "square.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match="give one row of integer token ids"):
        file_stream(tmp_path / "square.npy", SEPARATORS)

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import IndexedDatasetWriter
from tools.datasets import growing
from tools.datasets.encoding import Rows
from tools.datasets.growing import GrowingPair, Written, holds


def rows(sizes: list[int], dtype: str = "<u2") -> Rows:
    return Rows(tokens=np.arange(sum(sizes)).astype(dtype), sizes=np.array(sizes, dtype=np.int32), end_tokens=1, empty=2)


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
@pytest.mark.parametrize("sizes", [[], [3], [1, 5, 2, 2, 7, 1, 1, 1, 9]])
def test_the_pair_is_that_of_the_other_writer(sizes: list[int], dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "PIECE", 2)
    pair = GrowingPair(Written(prefix=f"{tmp_path}/grown"), np.dtype(dtype))
    with IndexedDatasetWriter(tmp_path / "written", dtype) as writer:
        for size in sizes:
            pair.add(rows([size], dtype))
            writer.add_document(np.arange(size))
    pair.finish()
    for kind in ("bin", "idx"):
        assert (tmp_path / f"grown.{kind}").read_bytes() == (tmp_path / f"written.{kind}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grown.bin", "grown.idx", "written.bin", "written.idx"]


def test_offsets_beyond_four_gigabytes_are_right(tmp_path: Path) -> None:
    """By the arithmetic of the index alone: the tokens are a hole."""
    prefix = f"{tmp_path}/x"
    sizes = [2**30, 2**30, 2**30, 5]
    pair = GrowingPair(Written(prefix=prefix), np.dtype("<i4"))
    pair.close()
    (tmp_path / "x.sizes.part").write_bytes(np.array(sizes, dtype="<i4").tobytes())
    with open(tmp_path / "x.bin.part", "wb") as file:
        file.truncate(4 * sum(sizes))
    GrowingPair(Written(prefix=prefix, documents=4, tokens=sum(sizes)), np.dtype("<i4")).finish()
    index = np.frombuffer((tmp_path / "x.idx").read_bytes()[34 + 16 : 34 + 48], dtype="<i8")
    assert index.tolist() == [0, 2**32, 2**33, 3 * 2**32]


def test_what_comes_after_the_mark_is_taken_back(tmp_path: Path) -> None:
    pair = GrowingPair(Written(prefix=f"{tmp_path}/x"), np.dtype("<u2"))
    pair.add(rows([2, 3]))
    mark = pair.mark()
    pair.add(rows([4]))
    pair.close()
    assert mark == Written(prefix=f"{tmp_path}/x", documents=2, tokens=5, end_tokens=1, empty=2)
    assert holds(mark, np.dtype("<u2"))
    again = GrowingPair(mark, np.dtype("<u2"))
    again.add(rows([1]))
    again.finish()
    assert (tmp_path / "x.bin").stat().st_size == 12
    assert not holds(mark, np.dtype("<u2"))


def test_a_pair_has_one_writer_at_a_time_and_discarding_leaves_nothing(tmp_path: Path) -> None:
    pair = GrowingPair(Written(prefix=f"{tmp_path}/x"), np.dtype("<u2"))
    with pytest.raises(ValueError, match=r"x\.bin\.part is being written by another process"):
        GrowingPair(Written(prefix=f"{tmp_path}/x"), np.dtype("<u2"))
    pair.discard()
    assert not list(tmp_path.iterdir())

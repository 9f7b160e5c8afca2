from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import index_bytes
from tests.tools.datasets.writing import write_pair, write_sparse
from tools.datasets.batch_viewer import main


def preshuffled(folder: Path, *, samples: int = 12, width: int = 5) -> str:
    return write_pair(folder / "document", [[sample] * width for sample in range(samples)])


def view(prefix: str, folder: Path, *flags: str) -> int:
    return main([prefix, "--save_path", str(folder / "seen"), "--batch_size", "4", *flags])


@pytest.mark.parametrize(
    ("flags", "samples"),
    [([], range(12)), (["--start_iteration", "1"], range(4, 12)), (["--start_iteration", "1", "--end_iteration", "1"], range(4, 8))],
)
def test_the_samples_of_all_steps_are_saved_the_last_step_included(flags: list[str], samples: range, tmp_path: Path) -> None:
    assert view(preshuffled(tmp_path), tmp_path, *flags) == 0
    saved = np.load(tmp_path / "seen" / "indicies.npy")
    assert saved.dtype == np.uint16
    assert saved.tolist() == [[sample] * 5 for sample in samples]


def test_steps_beyond_4_gigabytes_are_found(tmp_path: Path) -> None:
    width, batch, step = 2049, 1024, 1028
    start = step * batch * width * 2
    assert start > 2**32
    marks = {start + sample * width * 2: (sample + 1).to_bytes(2, "little") for sample in range(batch)}
    write_sparse(tmp_path / "document.bin", (step + 2) * batch * width * 2, marks)
    count = (step + 2) * batch
    sizes, offsets = np.full(count, width), np.arange(count) * width * 2
    (tmp_path / "document.idx").write_bytes(index_bytes(np.dtype("<u2"), sizes=sizes, offsets=offsets, doc_idx=np.arange(count + 1)))
    flags = ["--start_iteration", str(step), "--end_iteration", str(step), "--save_path", str(tmp_path)]
    assert main([str(tmp_path / "document"), *flags]) == 0
    saved = np.load(tmp_path / "indicies.npy")
    assert saved.shape == (batch, width)
    assert saved[:, 0].tolist() == list(range(1, batch + 1))
    assert not saved[:, 1:].any()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--end_iteration", "3"], "Steps 0 to 3 were asked for, and .* holds 3 whole ones of 4"),
        (["--start_iteration", "2", "--end_iteration", "1"], "Steps 2 to 1"),
        (["--start_iteration", "-1"], "Steps -1 to 2"),
        (["--batch_size", "0"], "at least 1 sample"),
        (["--batch_size", "13"], "holds 0 whole ones of 13"),
    ],
)
def test_steps_that_are_not_there_are_refused(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert view(preshuffled(tmp_path), tmp_path, *flags) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "seen" / "indicies.npy").exists()


def test_a_pair_that_is_not_preshuffled_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_pair(tmp_path / "document", [[1, 2], [3, 4], [5], [6, 7]])
    assert view(prefix, tmp_path) == 2
    assert "Sequence 2 of" in capsys.readouterr().err
    assert list((tmp_path / "seen").iterdir()) == []

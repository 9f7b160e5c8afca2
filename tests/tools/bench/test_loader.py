"""What the loader delivers and what the model consumes, on a small token file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import IndexedDatasetWriter
from tools.bench import loader


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten documents of 200 tokens, in the shape of the demo's folder."""
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(tmp_path / "train", np.dtype(np.uint16)) as writer:
        for _ in range(10):
            writer.add_document(random.integers(0, 50, 200))
    (tmp_path / "data.json").write_text(json.dumps({"separator_token_ids": [1, 2], "vocab_size": 50}))
    return tmp_path


def test_source_cuts_every_token_into_samples(folder: Path) -> None:
    source = loader.open_source(folder, seq_length=32, batch=2)
    assert (source.separator_ids, source.vocab_size) == ((1, 2), 50)
    assert len(source.dataset) == 10 * 200 // 32 - 1
    rows = loader.first_rows(source.dataset, 3)
    assert rows.shape == (3, 33)


def test_run_rates_each_number_of_workers_against_the_model(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    flags = ["--folder", str(folder), "--seq-length", "32", "--batch", "2", "--threads", "1", "--workers", "0", "1", "--seconds", "0.05"]
    loader.main([*flags, "--json", str(out)])
    result = json.loads(out.read_text())
    consumed = result["header"]["model_tokens_per_s"]
    assert [row["workers"] for row in result["rows"]] == [0, 1]
    for row in result["rows"]:
        assert row["batches"] >= loader.FEWEST_BATCHES
        assert row["ratio"] == pytest.approx(row["tokens_per_s"] / consumed)


@pytest.mark.parametrize(("wanted", "status", "words"), [(0.0, 0, "is wanted: reached."), (1e9, 1, "is wanted: NOT reached.")])
def test_loader_that_is_too_slow_fails_the_command(
    wanted: float, status: int, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "WANTED", wanted)
    flags = ["--folder", str(folder), "--seq-length", "32", "--batch", "2", "--threads", "1", "--workers", "0", "--seconds", "0.05"]
    assert loader.main(flags) == status
    assert words in capsys.readouterr().out

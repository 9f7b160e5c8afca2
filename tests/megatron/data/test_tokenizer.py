from __future__ import annotations

import io
import json
from pathlib import Path

import huggingface_hub
import pytest
import sentencepiece
import tiktoken
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron.config.schema import TokenizerConfig
from megatron.data.tokenizer import (
    SEPARATORS,
    CharLevelTokenizer,
    SPMTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    build_tokenizer,
    find_separator_ids,
)

TEXT = "In the beginning, God created: heaven and earth.\n\tAnd what? Naïve “words”, e.g. this!"
CORPUS = [TEXT, "the earth was without form; and void", "And God said: Let there be light, and there was light."] * 5


def trained(folder: Path, *, special: list[str] | None = None) -> Library:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|endoftext|>"] if special is None else special
    library.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False))
    library.save(str(folder / "tokenizer.json"))
    return library


def hf(folder: Path) -> Tokenizer:
    trained(folder)
    return build_tokenizer(TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(folder / "tokenizer.json")))


def gpt2_files(folder: Path) -> tuple[str, str]:
    trained(folder).model.save(str(folder))
    return str(folder / "vocab.json"), str(folder / "merges.txt")


def gpt2_bpe(folder: Path) -> Tokenizer:
    vocab, merges = gpt2_files(folder)
    return build_tokenizer(TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=vocab, merge_file=merges))


def gpt2_folder(folder: Path) -> Tokenizer:
    gpt2_files(folder)
    (folder / "tokenizer.json").unlink()
    return build_tokenizer(TokenizerConfig(tokenizer_type="HFGPT2Tokenizer", vocab_file=str(folder)))


def sentencepiece_model(folder: Path, **options: object) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=340, byte_fallback=True, model_type="bpe", hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2, **options,
    )  # fmt: skip
    (folder / "spm.model").write_bytes(model.getvalue())
    return folder / "spm.model"


def spm(folder: Path) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(tokenizer_type="SPMTokenizer", vocab_file=str(sentencepiece_model(folder))))


def characters(folder: Path) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(tokenizer_type="CharLevelTokenizer"))


def encoding_of_bytes() -> tiktoken.Encoding:
    ranks = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258})


def tiktoken_bytes(folder: Path) -> Tokenizer:
    return TiktokenTokenizer(encoding_of_bytes())


@pytest.mark.parametrize("build", [hf, gpt2_bpe, gpt2_folder, spm, characters, tiktoken_bytes])
def test_text_comes_back_and_batches_are_the_single_texts(build: object, tmp_path: Path) -> None:
    tokenizer: Tokenizer = build(tmp_path)  # type: ignore[operator]
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode_batch([TEXT, "", "and"]) == [ids, [], tokenizer.encode("and")]
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert 0 <= tokenizer.eod_id < tokenizer.vocab_size
    assert tokenizer.eod_id not in ids


@pytest.mark.parametrize("build", [hf, gpt2_bpe, gpt2_folder, characters, tiktoken_bytes])
def test_separators_are_the_tokens_that_stand_for_them(build: object, tmp_path: Path) -> None:
    tokenizer: Tokenizer = build(tmp_path)  # type: ignore[operator]
    assert [tokenizer.decode([token]) for token in find_separator_ids(tokenizer)] == list(SEPARATORS)


def test_a_sentencepiece_blank_is_a_separator_and_a_word_with_one_is_not(tmp_path: Path) -> None:
    tokenizer = spm(tmp_path)
    texts = [tokenizer.token_text(token) for token in find_separator_ids(tokenizer)]
    assert set(texts) == set(SEPARATORS)
    assert any(tokenizer.token_text(token) == " the" for token in range(tokenizer.vocab_size))


def test_texts_come_in_the_order_given_and_unknown_ones_are_left_out() -> None:
    assert find_separator_ids(CharLevelTokenizer(), ["?", "two", "."]) == [63, 46]


def test_end_of_text_in_a_text_is_the_end_token_for_hf_and_plain_text_for_gpt2_bpe(tmp_path: Path) -> None:
    tokenizer = hf(tmp_path)
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.eod_id] == [0]
    plain = gpt2_bpe(tmp_path)
    assert plain.eod_id not in plain.encode("<|endoftext|>")


def test_gpt2_folders_gain_a_padding_token(tmp_path: Path) -> None:
    assert gpt2_folder(tmp_path).vocab_size == len(json.loads((tmp_path / "vocab.json").read_text())) + 1


def test_sentencepiece_ends_documents_with_end_of_text_if_it_has_one(tmp_path: Path) -> None:
    plain = SPMTokenizer.from_file(sentencepiece_model(tmp_path))
    assert plain.token_text(plain.eod_id) in ("", "</s>")
    own = SPMTokenizer.from_file(sentencepiece_model(tmp_path, user_defined_symbols=["<|endoftext|>"]))
    assert own.decode([own.eod_id]) == "<|endoftext|>"
    with pytest.raises(ValueError, match=r"neither .* nor an end of sentence"):
        SPMTokenizer.from_file(sentencepiece_model(tmp_path, eos_id=-1))


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "lstrip": False}])
def test_a_tokenizer_of_another_end_takes_it_from_the_file_beside_it(tmp_path: Path, eos: object) -> None:
    library = trained(tmp_path, special=["<s>", "</s>"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    opened = build_tokenizer(TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(tmp_path / "tokenizer.json")))
    assert opened.eod_id == library.token_to_id("</s>")


def test_a_tokenizer_without_an_end_of_document_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, special=[])
    with pytest.raises(ValueError, match=r"has no token <\|endoftext\|>"):
        build_tokenizer(TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(tmp_path / "tokenizer.json")))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TokenizerConfig(tokenizer_type="BertTokenizer"), "does not exist: use one of HFTokenizer"),
        (TokenizerConfig(tokenizer_type="HFTokenizer"), "HFTokenizer needs vocab_file"),
        (TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file="x"), "merge_file"),
        (TokenizerConfig(tokenizer_type="TiktokenTokenizer", vocab_file="no-such"), "tiktoken has no encoding no-such"),
    ],
)
def test_an_incomplete_choice_is_refused(config: TokenizerConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_tokenizer(config)


def test_a_folder_is_read_as_the_tokenizer_in_it(tmp_path: Path) -> None:
    library = trained(tmp_path, special=["<s>", "</s>"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    opened = build_tokenizer(TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(tmp_path)))
    assert (opened.encode(TEXT), opened.eod_id) == (library.encode(TEXT).ids, library.token_to_id("</s>"))


def test_a_name_of_the_hub_is_fetched_with_what_says_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path, special=["<s>", "</s>"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    asked = []

    def fetched(name: str, file: str) -> str:
        asked.append((name, file))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    opened = build_tokenizer(TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file="owner/some-model.v2"))
    assert opened.decode([opened.eod_id]) == "</s>"
    assert asked == [("owner/some-model.v2", "tokenizer.json"), ("owner/some-model.v2", "tokenizer_config.json")]


def test_a_hub_that_cannot_be_reached_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, file: str) -> str:
        raise ConnectionError("Name or service not known\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(ValueError, match=r"owner/model is no file or folder here, .* give its tokenizer.json \(Name or service not known\)"):
        build_tokenizer(TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file="owner/model"))


def test_an_encoding_of_tiktoken_is_taken_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the download that the library begins with."""
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"cl100k_base": encoding_of_bytes()}[name])
    opened = build_tokenizer(TokenizerConfig(tokenizer_type="TiktokenTokenizer", vocab_file="cl100k_base"))
    assert opened.encode("ab<|endoftext|>") == [97, 98, 258]


def test_an_encoding_that_cannot_be_downloaded_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> tiktoken.Encoding:
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(ValueError, match=r"cl100k_base cannot be read as a tokenizer \(no network\)"):
        build_tokenizer(TokenizerConfig(tokenizer_type="TiktokenTokenizer", vocab_file="cl100k_base"))


@pytest.mark.parametrize("kind", ["HFTokenizer", "SPMTokenizer"])
def test_a_file_that_is_missing_or_no_tokenizer_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    config = TokenizerConfig(tokenizer_type=kind, vocab_file=str(path))
    with pytest.raises(FileNotFoundError, match=f"The tokenizer file {path} does not exist"):
        build_tokenizer(config)
    path.write_text("no tokenizer")
    with pytest.raises(ValueError, match=f"{path} cannot be read as a tokenizer"):
        build_tokenizer(config)

"""Conversations become the tokens of the whole rendering, and labels that count where the assistant speaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron.data.indexed import IndexedDataset
from tools.datasets.preprocess_data_with_chat_template import main
from tools.datasets.train_tokenizer import train_byte_level_bpe

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Well, thanks."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Still well."},
]
ANSWERS = "Well, thanks.<|end|>\n", "Still well.<|end|>\n"


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> str:
    library = train_byte_level_bpe([turn["content"] for turn in CHAT] * 3, 300, special_tokens=["<|endoftext|>", "<|end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<|endoftext|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


def prepare(folder: Path, *flags: str, chats: list[object] | None = None, template: str | None = TEMPLATE) -> int:
    lines = [json.dumps({"conversation": chat}) for chat in (chats or [CHAT])]
    (folder / "x.jsonl").write_text("\n".join(lines))
    return main(
        ["--input", str(folder / "x.jsonl"), "--tokenizer-path", write_tokenizer(folder, template), "--output-prefix", str(folder / "x"), *flags]
    )


def learned(folder: Path, row: int = 0) -> list[str]:
    """The stretches of text whose labels count."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    text, label = (IndexedDataset(folder / f"x_conversation_{name}document")[row].tolist() for name in ("", "label_"))
    assert all(mark in (-100, token) for token, mark in zip(text, label, strict=True))
    stretches: list[list[int]] = [[]]
    for token, mark in zip(text, label, strict=True):
        if mark != -100:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def test_tokens_are_those_of_the_whole_rendering_once_and_the_answers_count(tmp_path: Path) -> None:
    assert prepare(tmp_path, chats=[CHAT, CHAT[:3]]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    text = IndexedDataset(tmp_path / "x_conversation_document")
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text[0].tolist() == [*tokenizer(rendered, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(text[0].tolist()) == rendered + "<|endoftext|>"
    assert text.dtype == "int32"
    assert learned(tmp_path) == [ANSWERS[0], ANSWERS[1] + "<|endoftext|>"]
    assert learned(tmp_path, row=1) == [ANSWERS[0] + "<|endoftext|>"]


def test_a_conversation_that_ends_with_a_question_does_not_learn_its_end(tmp_path: Path) -> None:
    assert prepare(tmp_path, chats=[CHAT[:4]]) == 0
    assert learned(tmp_path) == [ANSWERS[0]]


def test_only_the_last_turn_counts_on_request(tmp_path: Path) -> None:
    assert prepare(tmp_path, "--only-last", chats=[CHAT, CHAT[:4]]) == 0
    assert learned(tmp_path) == [ANSWERS[1] + "<|endoftext|>"]
    assert learned(tmp_path, row=1) == []


def test_another_role_can_be_the_one_that_is_learned(tmp_path: Path) -> None:
    asks = TEMPLATE.replace("<|assistant|>\n{% endif", "<|user|>\n{% endif")
    assert prepare(tmp_path, "--generation-role", "user", template=asks) == 0
    assert learned(tmp_path) == ["How are you?<|end|>\n", "And now?<|end|>\n"]


def test_without_a_mask_there_are_no_label_files(tmp_path: Path) -> None:
    assert prepare(tmp_path, "--no-mask") == 0
    assert sorted(path.name for path in tmp_path.glob("x_*")) == ["x_conversation_document.bin", "x_conversation_document.idx"]


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    chats: list[object] = [CHAT[: 1 + i % 5] for i in range(30)]
    written = []
    for workers in ("1", "2"):
        assert prepare(tmp_path, "--workers", workers, chats=chats) == 0
        written.append([path.read_bytes() for path in sorted(tmp_path.glob("x_*"))])
    assert written[0] == written[1]


REWRITING = "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}|{% endfor %}"
REFUSALS: dict[str, tuple[list[object], str | None, str]] = {
    "text": (["Hello"], TEMPLATE, "line 1 has no list under 'conversation'"),
    "a turn without content": ([[{"role": "user"}]], TEMPLATE, "line 1 holds a turn that is not"),
    "no template": ([CHAT], None, "has no chat template"),
    "a template that rewrites": ([CHAT], REWRITING, "line 1: the chat template writes earlier turns otherwise"),
    "a template that refuses": ([CHAT], "{{ raise_exception('no system turns') }}", "refuses these turns (no system turns)"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_prepared_is_refused_in_a_sentence(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats, template, message = REFUSALS[case]
    assert prepare(tmp_path, chats=chats, template=template) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("x_*"))


@pytest.mark.parametrize("flags", [["--for-rm"], ["--reward-key", "reward"], ["--binary-reward"]])
def test_reward_models_are_refused_by_name(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(tmp_path, *flags) == 2
    assert f"{flags[0]} makes data for reward models and preferences" in capsys.readouterr().err


def test_a_tokenizer_that_is_not_there_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text("{}")
    (tmp_path / "empty").mkdir()
    assert main(["--input", str(tmp_path / "x.jsonl"), "--tokenizer-path", str(tmp_path / "empty"), "--output-prefix", str(tmp_path / "x")]) == 2
    assert "cannot be opened as a transformers tokenizer" in capsys.readouterr().err

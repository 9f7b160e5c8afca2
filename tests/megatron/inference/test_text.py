from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.config.schema import Config
from megatron.data.tokenizer import Tokenizer
from megatron.inference.text import Writer, check_generation, converse, generate_texts, read_prompts, write_texts
from megatron.model.gpt import GPTModel
from megatron.parallel.mesh import Mesh

MakeWriter = Callable[..., Writer]
CONTEXTS = ["Once upon a time", "I", "", "The sea, the sea. The open", "It was"]


@pytest.fixture
def make_writer(make_config: Callable[..., Config], make_model: Callable[..., GPTModel], tokenizer: Tokenizer) -> MakeWriter:
    """``make_writer(maximum_tokens=5)``: the tiny model with these keys of the `generation` group."""
    model = make_model()

    def make(**generation: object) -> Writer:
        return Writer(model=model, tokenizer=tokenizer, config=make_config(groups={"generation": generation}))

    return make


def test_records_hold_what_the_output_file_promises(make_writer: MakeWriter) -> None:
    for record, context in zip(make_writer(maximum_tokens=9).complete(CONTEXTS), CONTEXTS, strict=True):
        line = json.loads(record.to_json())
        assert list(line) == ["context", "text", "length", "finished", "message", "duration_seconds"]
        assert line["context"] == context
        assert (line["length"], line["finished"], line["message"]) == (9, False, None) or line["finished"]
        assert line["duration_seconds"] > 0


def test_text_does_not_depend_on_the_batch_or_the_cache(make_writer: MakeWriter) -> None:
    together = [record.text for record in make_writer().complete(CONTEXTS)]
    alone = [next(make_writer(recompute=True).complete([context])).text for context in CONTEXTS]
    assert together == alone


def test_logits_come_on_request_one_row_per_token_over_the_tokenizers_vocabulary(make_writer: MakeWriter) -> None:
    record = next(make_writer(maximum_tokens=3, return_logits=True).complete(["I"]))
    logits = torch.tensor(json.loads(record.to_json())["logits"])
    assert logits.shape == (3, 257)
    assert record.text == make_writer().tokenizer.decode(logits.argmax(1).tolist())


def test_prompts_that_leave_no_room_get_a_message_and_the_others_their_text(make_writer: MakeWriter) -> None:
    full, long, short = make_writer(maximum_tokens=20).complete(["x" * 48, "x" * 40, "x"])
    assert (full.text, full.length, full.finished) == ("", 0, False)
    assert full.message == "The prompt has 48 tokens, which leaves no room in the 48 that the model reads."
    assert long.message == "Stopped at the 48 tokens that the model reads."
    assert long.length == 8
    assert (short.message, short.length) == (None, 20)


def test_a_seed_repeats_its_samples(make_writer: MakeWriter) -> None:
    first, again = ([record.text for record in make_writer(temperature=1.0, top_k=40).complete([""] * 4)] for _ in range(2))
    assert first == again
    assert len(set(first)) > 1


def test_unconditional_writes_as_many_texts_as_asked(make_writer: MakeWriter, tmp_path: Path) -> None:
    out = tmp_path / "samples.txt"
    writer = make_writer(num_samples=4, sample_output_file=str(out), temperature=0.9, maximum_tokens=5)
    write_texts(writer, terminal_in=io.StringIO(), terminal_out=io.StringIO())
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["context"] for line in lines] == [""] * 4


def test_input_file_answers_each_line_in_order(make_writer: MakeWriter, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one \n\ntwo, too\nthree")
    wanted = {"text_gen_type": "input-file", "sample_input_file": str(tmp_path / "prompts.txt"), "sample_output_file": str(tmp_path / "out.jsonl")}
    write_texts(make_writer(**wanted), terminal_in=io.StringIO(), terminal_out=io.StringIO())
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["context"] for line in lines] == ["one ", "two, too", "three"]
    assert read_prompts(tmp_path / "prompts.txt") == ["one ", "two, too", "three"]
    (tmp_path / "prompts.txt").write_bytes("one".encode("utf-16"))
    with pytest.raises(ValueError, match=r"prompts.txt is not UTF-8 \(.*\): write it anew as UTF-8"):
        read_prompts(tmp_path / "prompts.txt")


@pytest.mark.parametrize(
    ("prompt_end", "typed", "prompts"),
    [
        ("\n", "first\nsecond\n", ["first", "second"]),
        ("END", "two\nlines END\nanother END\n", ["two\nlines ", "another "]),
        ("\n\n", "a\nb\n\nc\n\n", ["a\nb", "c"]),
        ("\n", "cut off", ["cut off"]),
    ],
)
def test_a_conversation_answers_every_prompt_up_to_its_end(make_writer: MakeWriter, prompt_end: str, typed: str, prompts: list[str]) -> None:
    writer = make_writer(text_gen_type="interactive", prompt_end=prompt_end, maximum_tokens=4)
    seen = io.StringIO()
    converse(writer, terminal_in=io.StringIO(typed), terminal_out=seen)
    answers = [record.text for record in writer.complete(prompts)]
    assert seen.getvalue() == "".join(f"Prompt >>> {answer}\n" for answer in answers) + "Prompt >>> "


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ({"text_gen_type": "precompute"}, "precompute is refused"),
        ({"text_gen_type": "input-file"}, "needs sample_input_file"),
        ({"text_gen_type": "input-file", "sample_input_file": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"text_gen_type": "input-file", "sample_input_file": __file__, "sample_output_file": __file__}, "which it would replace: name another file"),
        ({"sample_output_file": "nowhere/samples.txt"}, "its folder does not exist"),
        ({"top_p": 2.0}, "top_p is 2"),
    ],
)
def test_bad_input_is_named_before_a_model_is_loaded(make_config: Callable[..., Config], generation: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_generation(make_config(groups={"generation": generation}))


def test_a_checkpoint_is_needed(make_config: Callable[..., Config], alone: Mesh, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    monkeypatch.setattr("megatron.inference.text.Mesh.start", lambda config: alone)
    monkeypatch.setattr("megatron.inference.text.build_tokenizer", lambda config: tokenizer)
    with pytest.raises(ValueError, match="load is not set"):
        generate_texts(make_config())


def test_the_ratios_of_prompts_and_new_tokens_are_told_apart_from_the_text(
    make_config: Callable[..., Config], make_model: Callable[..., GPTModel], tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    model, config = make_model(), make_config(groups={"generation": {"maximum_tokens": 6}})
    attention = config.attention.model_copy(update={"print_kv_ratio": True, "print_ratio_intervals": 2})
    writer = Writer(model=model, tokenizer=tokenizer, config=config.model_copy(update={"attention": attention}))
    (record,) = writer.complete(["It was"])
    out, said = capsys.readouterr()
    assert out == ""
    assert len(said.splitlines()) == (record.length + record.finished) // 2
    assert all(float(share) <= 1 for share in re.findall(r"(\d\.\d{4}) in this forward pass", said))

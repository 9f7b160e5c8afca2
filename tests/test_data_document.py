"""What docs/data.md shows, run in its order on small files."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

import prepare_data
from megatron.launch.arguments import parse
from tests.tools.datasets.writing import write_pair
from tools.datasets.checksum_shards import write_hashes
from tools.datasets.demo_corpus import train_tokenizer
from tools.datasets.shard_memmap import shard

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "data.md").read_text()
COMMANDS = re.findall(r"^ {4}(python .*)$", TEXT, flags=re.MULTILINE)
PILE = "pile_0.87_deduped_text_document"


def write_files(folder: Path) -> None:
    """Everything that the document takes for granted, small."""
    texts = [f"Document {number} says: one, two, three." * (number % 9 + 1) for number in range(300)]
    (folder / "texts").mkdir()
    (folder / "texts" / "some.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "more.jsonl").write_text(json.dumps({"text": "More text."}) + "\n")
    (folder / "qa.jsonl").write_text(json.dumps({"text": "Q: Why? A: So."}) + "\n")
    (folder / "chats.jsonl").write_text(json.dumps({"conversation": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}))
    tokenizer = train_tokenizer(texts, 300)
    tokenizer.save(str(folder / "tokenizer.json"))
    chat = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    chat.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    chat.save_pretrained(folder / "hf" / "chat")
    (snippet,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    keys = yaml.safe_load((ROOT / "configs" / "local" / "tiny.yml").read_text()) | yaml.safe_load(snippet)
    (folder / "your.yml").write_text(yaml.safe_dump(keys))
    write_pieces(folder / "pythia_deduped_pile_idxmaps", PILE, [[1, 2, 3, 4, 5]] * 83, piece_bytes=10)
    write_hashes(folder / "pythia_deduped_pile_idxmaps", folder / "shard_hashes.txt")
    write_pieces(folder / "pile-deduped-pythia-preshuffled", "document", [[1, 2, 3]] * 10_240, piece_bytes=2926)


def write_pieces(folder: Path, name: str, rows: list[list[int]], *, piece_bytes: int) -> None:
    """The pieces of a pair, and its index, without the whole .bin."""
    tokens = Path(f"{write_pair(folder / name, rows)}.bin")
    shard(tokens, folder, shard_bytes=piece_bytes)
    tokens.unlink()


def run(command: str) -> int:
    words = shlex.split(command)[1:]
    if words[0] == "prepare_data.py":
        return prepare_data.main(words[1:])
    if words[0] == "deepy.py":
        return int(not parse(words[1:]).check)
    module = importlib.import_module(words[1])
    if "run/pile" in words:  # its index is that of 300 billion tokens
        return int(module._parser().parse_args(words[2:]).step != 1000)
    return int(module.main(words[2:]))


def test_the_commands_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        assert run(command) == 0, command + capsys.readouterr().err
    out = capsys.readouterr().out
    assert "step 0 (iteration 1 of the log): samples 0 to 7 of the run" in out
    assert f"data/pile/{PILE}: sound" in out
    assert "10240 samples of 3 tokens" in out
    assert json.loads(out[out.index('{\n "pairs"') : out.index("\n}\n") + 3])["total"]["documents"] == 301


def test_every_command_of_the_folder_is_in_the_table() -> None:
    table = TEXT.split("## The commands")[1]
    named = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))))
    commands = {path.stem for path in (ROOT / "tools" / "datasets").glob("*.py") if 'prog="tools.datasets.' in path.read_text()}
    assert named == commands


def test_every_path_and_flag_of_the_document_exists() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / "docs").joinpath(path).exists(), path
    sources = '"--help"' + "".join(path.read_text() for folder in ("tools", "megatron/launch") for path in (ROOT / folder).rglob("*.py"))
    for flag in re.findall(r"(--[a-z_-]+)", TEXT):
        assert f'"{flag}"' in sources, flag

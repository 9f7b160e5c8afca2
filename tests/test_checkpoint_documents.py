"""The commands that the documents about checkpoints and post-training show are understood."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from tests.sepllm.byte_tokenizer import byte_tokenizer
from tools.ckpts.convert_hf_to_neox import convert

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("docs/checkpoints.md", "docs/post-training.md")


def commands(beginning: str) -> list[str]:
    """Indented lines of the documents that start so."""
    return [
        line for document in DOCUMENTS for line in re.findall(rf"^ {{4}}(python {beginning}.*)$", (ROOT / document).read_text(), flags=re.MULTILINE)
    ]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny GPT-NeoX model with Pythia's vocabulary."""
    folder = tmp_path_factory.mktemp("documents")
    shape = {"hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50304}
    GPTNeoXForCausalLM(GPTNeoXConfig(**shape)).save_pretrained(folder / "hf")
    return convert(folder / "hf", folder / "pythia-160m", verify=False).step.parent


@pytest.mark.parametrize("command", commands("deepy.py"))
def test_runs_that_the_documents_show_resolve(command: str, imported: Path) -> None:
    words = shlex.split(command.replace("checkpoints/pythia-160m", str(imported)))[1:]
    done = subprocess.run([sys.executable, *words, "--check", "--devices", "1"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "64" in done.stdout


@pytest.mark.parametrize("command", commands(r"(?:tools/ckpts|-m tools\.datasets)"))
def test_tools_that_the_documents_show_take_these_words(command: str) -> None:
    words = shlex.split(command)[1:]
    name = words[1] if words[0] == "-m" else words[0].removesuffix(".py").replace("/", ".")
    words = words[2 if words[0] == "-m" else 1 :]
    understood = repr(importlib.import_module(name)._parser().parse_args(words))
    assert all(word.rstrip("/") in understood for word in words if not word.startswith("-"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_and_flag_of_a_document_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / document).parent.joinpath(path).exists(), path
    sources = "".join(path.read_text() for path in (ROOT / "tools").rglob("*.py")) + "--set"
    for flag in re.findall(r"`?(--[a-z_-]+)", text):
        assert flag in sources, flag


def test_the_python_of_the_page_writes_texts() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "checkpoints.md").read_text(), flags=re.DOTALL)
    tokenizer = byte_tokenizer()
    model = GPTNeoXForCausalLM(GPTNeoXConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=257))
    names: dict[str, object] = {"model": model.eval(), "tokenizer": tokenizer, "prompts": [tokenizer.encode("One, two."), tokenizer.encode("And")]}
    exec(code, names)
    texts = names["texts"]
    assert isinstance(texts, list)
    assert len(texts) == 2
    assert all(texts)

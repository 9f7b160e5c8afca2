"""What the documents show as runnable runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [f"docs/{name}.md" for name in ("attention", "study", "evaluation", "streaming", "sepcache")]
"""That name tools for benchmarks, study or pictures."""


def commands(document: str) -> list[str]:
    """Indented lines that start a command of this project and only look."""
    lines = re.findall(r"^ {4}(python .*)$", (ROOT / document).read_text(), flags=re.MULTILINE)
    return [line.split("  #")[0].strip() for line in lines if "--check" in line]


@pytest.mark.parametrize("command", [*commands("README.md"), *commands("configs/README.md")])
def test_checks_in_the_documents_run(command: str, tmp_path: Path) -> None:
    (tmp_path / "your.yml").write_text((ROOT / "configs" / "local" / "tiny.yml").read_text())
    words = shlex.split(command.replace("your.yml", str(tmp_path / "your.yml")))[1:]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parameters" in done.stdout


@pytest.mark.parametrize("document", ["README.md", "docs/attention.md"])
def test_the_python_of_a_document_computes_attention(document: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)
    q, k, v = torch.randn(3, 2, 200, 4, 64).unbind()
    names: dict[str, object] = {"ids": torch.randint(20, (2, 200)), "q": q, "k": k, "v": v}
    exec(code, names)
    out = names["out"]
    assert isinstance(out, torch.Tensor)
    assert out.shape[1:] == (names["ids"].shape[1], 4, 64)  # type: ignore[attr-defined]


@pytest.mark.parametrize("document", ["README.md", "configs/README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_every_path_in_a_document_exists(document: str) -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text()):
        assert (ROOT / document).parent.joinpath(path).exists(), path


@pytest.mark.parametrize("document", ["README.md", *PAGES, "benchmarks/results/README.md", "Makefile"])
def test_tools_that_a_document_names_understand_its_words(document: str) -> None:
    lines = re.findall(r"python -m (tools\.(?:bench|sepllm|plot)\.\w+)([^#`\n|]*)", (ROOT / document).read_text().replace("\\\n", " "))
    assert lines or document == "README.md"
    for module, words in lines:
        shown = help_of(module)
        for flag in re.findall(r"--[a-z-]+", words):
            assert flag in shown, f"{document}: {module} has no {flag}"


@cache
def help_of(module: str) -> str:
    return subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout

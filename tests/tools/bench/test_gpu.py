"""The plan for a lent GPU: that it holds every test that wants one, that its commands are understood, and that it goes on where it stopped."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from tools.bench import gpu
from tools.bench.gpu import STEPS, Step, main
from tools.bench.variants import variants

ROOT = Path(__file__).parents[3]
SLOT_MINUTES = 9
"""What may be had of a machine at a time."""


def test_every_test_that_is_marked_gpu_is_in_a_step() -> None:
    marked = {
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text() and path != Path(__file__)
    }
    assert marked == {word for step in STEPS if step.words[0] == "pytest" for word in step.words if word.endswith(".py")}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_step_fits_a_slot_and_its_words_are_understood(step: Step) -> None:
    assert step.limit_minutes < SLOT_MINUTES
    module, *words = step.words
    if not module.startswith("tools."):
        return
    tool = importlib.import_module(module)
    names = {"names": [variant.name for variant in variants(torch.device("cpu"))]} if module == "tools.bench.attention" else {}
    arguments = tool.parse([*words, "--tokens", "tokens.npy", "--separator-ids", "1"], **names)
    assert (arguments.device, arguments.save) == ("cuda", True)
    assert getattr(arguments, "minutes", 0) < step.limit_minutes / 2  # comparing and compiling are beside these


def script(tmp_path: Path, name: str, code: str) -> Step:
    """A step that runs this, and notes that it did."""
    (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name + ' '!r})\n{code}\n")
    return Step(name=name, words=(name,), limit_minutes=0.1)


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return [script(tmp_path, "step_well", "print('all is well')"), script(tmp_path, "step_bad", "raise SystemExit('no kernel image')")]


def test_steps_that_ended_are_not_begun_again_unless_they_are_named(steps: list[Step], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--folder", str(tmp_path / "out")]
    assert main(["--minutes", "0.15", *folder], steps=steps[:1]) == 0
    assert main(["--minutes", "0.01", *folder], steps=steps) == 1
    assert "Left for another time: step_bad." in capsys.readouterr().out
    assert main(folder, steps=steps) == 1
    assert "    no kernel image" in capsys.readouterr().out
    assert main(["--steps", "step_bad", *folder], steps=steps) == 1
    assert (tmp_path / "ran").read_text().split() == ["step_well", "step_bad", "step_bad"]
    assert (tmp_path / "out" / "step_well.log").read_text() == "all is well\n"
    assert json.loads((tmp_path / "out" / "steps.json").read_text())["step_bad"]["status"] == 1


def test_step_is_ended_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    step = Step(name="step_slow", words=script(tmp_path, "step_slow", "import time; time.sleep(60)").words, limit_minutes=0.03)
    assert gpu.run(step, tmp_path).status is None
    assert "was ended after 0.03 minutes" in capsys.readouterr().out

"""A run that is killed, wherever, goes on when it is started again, and ends in the files of one that was left alone."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.config.schema import TokenizerConfig
from megatron.data.indexed import IndexedDataset
from tools.datasets import preprocess as module
from tools.datasets.encoding import TextRecipe
from tools.datasets.preprocess import preprocess

RECIPE = TextRecipe(tokenizer=TokenizerConfig(tokenizer_type="CharLevelTokenizer"), keys=("text", "title"), append_eod=True)
PAIRS = [f"x_{key}_document.{kind}" for key in RECIPE.keys for kind in ("bin", "idx")]
FLAGS = ["--tokenizer-type", "CharLevelTokenizer", "--jsonl-keys", "text", "title", "--append-eod", "--output-prefix", "x"]
START = """
import os, signal, sys
from tools.datasets import chunks, growing, preprocess
preprocess.MARK_S, chunks.CHUNK_RECORDS = 0, 3
place, count = sys.argv[1], int(sys.argv[2])
owner, name = {"fsync": (os, "fsync"), "replace": (os, "replace"), "unlink": (os, "unlink"), "add": (growing.GrowingPair, "add")}[place]
original = getattr(owner, name)
def counted(*arguments, **named):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **named)
setattr(owner, name, counted)
preprocess.main(sys.argv[3:])
"""
NEVER = 1 << 30


def lines(first: int, last: int) -> bytes:
    return b"".join(json.dumps({"text": f"document {i} " * (i % 7), "title": f"title {i}"}).encode() + b"\n" for i in range(first, last))


def write_inputs(folder: Path) -> list[str]:
    (folder / "a.jsonl").write_bytes(lines(0, 20))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(20, 25)))
    (folder / "c.jsonl").write_bytes(lines(25, 60))
    return ["a.jsonl", "b.jsonl.gz", "c.jsonl"]


def start(folder: Path, inputs: Sequence[str], *flags: str, kill: tuple[str, int] = ("fsync", NEVER)) -> subprocess.Popen[str]:
    """A run that kills itself at a call of a function."""
    root = str(Path(__file__).parents[3])
    return subprocess.Popen(
        [sys.executable, "-c", START, kill[0], str(kill[1]), *FLAGS, "--input", ",".join(inputs), *flags],
        cwd=folder, env={**os.environ, "PYTHONPATH": root}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in PAIRS}


@pytest.fixture
def expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What a run makes that is left alone. The inputs are in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alone").mkdir()
    preprocess(write_inputs(tmp_path), "alone/x", RECIPE)
    return contents(tmp_path / "alone")


@pytest.mark.timeout(120)
def test_killed_again_and_again_it_ends_in_the_same_files(tmp_path: Path, expected: dict[str, bytes]) -> None:
    inputs = write_inputs(tmp_path)
    went_on = []
    for kill in (("fsync", 4), ("add", 12), ("fsync", 13), ("replace", 4), ("add", 9), ("fsync", 8), ("replace", NEVER)):
        run = start(tmp_path, inputs, kill=kill)
        out, errors = run.communicate()
        assert run.returncode == (0 if kill[1] == NEVER else -signal.SIGKILL), errors
        went_on += [int(out.split("Going on after ")[1].split()[0])] if "Going on" in out else []
    assert len(went_on) >= 4
    assert went_on == sorted(went_on)
    assert contents(tmp_path) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["alone", *inputs, *PAIRS])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kill", [("replace", 22), ("replace", 24), ("replace", 25), ("unlink", 2), ("unlink", 5)])
def test_killed_while_the_pairs_get_their_names_it_ends_in_the_same_files(kill: tuple[str, int], tmp_path: Path, expected: dict[str, bytes]) -> None:
    """60 documents of three files, in chunks of 3, are 21 marks; then both pairs get two names each."""
    run = start(tmp_path, write_inputs(tmp_path), kill=kill)
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    preprocess(write_inputs(tmp_path), "x", RECIPE)
    assert contents(tmp_path) == expected
    assert not list(tmp_path.glob("*part")) + list(tmp_path.glob("*progress*"))


@pytest.mark.timeout(120)
def test_a_killed_run_on_standard_input_leaves_no_process_and_goes_on_with_the_same_stream(
    tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(tmp_path, ["-"], "--workers", "2")
    assert run.stdin is not None
    run.stdin.write(lines(0, 40).decode())
    run.stdin.flush()
    wait_for(lambda: (tmp_path / "x.progress.json").exists())
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    run.kill()
    run.communicate()
    assert len(workers) >= 2
    wait_for(lambda: not any(is_alive(worker) for worker in workers))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines(0, 60))))
    preprocess(["-"], "x", RECIPE)
    assert "Going on after" in capsys.readouterr().out
    assert contents(tmp_path) == expected


def stopped(folder: Path, inputs: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends by Ctrl-C after its first marks."""
    count = iter(range(5))

    def interrupted(pair: object, rows: object) -> None:
        if next(count, None) is None:
            raise KeyboardInterrupt
        add(pair, rows)

    add = module.GrowingPair.add
    with monkeypatch.context() as patch:
        patch.setattr(module, "MARK_S", 0)
        patch.setattr("tools.datasets.chunks.CHUNK_RECORDS", 3)
        patch.setattr(module.GrowingPair, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            preprocess(inputs, str(folder / "x"), RECIPE)
    assert (folder / "x.progress.json").exists()


@pytest.mark.parametrize("change", ["input", "recipe", "parts"])
def test_another_input_or_recipe_begins_anew(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = write_inputs(tmp_path)
    stopped(tmp_path, inputs, monkeypatch)
    recipe = RECIPE
    if change == "input":
        (tmp_path / "a.jsonl").write_bytes(lines(1, 20))
    elif change == "recipe":
        recipe = TextRecipe(tokenizer=RECIPE.tokenizer, keys=RECIPE.keys)
    else:
        (tmp_path / "x_text_document.bin.part").write_bytes(b"")
    preprocess(inputs, "x", recipe)
    assert "Going on" not in capsys.readouterr().out
    preprocess(inputs, "alone", recipe)
    assert contents(tmp_path) == {name: (tmp_path / name.replace("x_", "alone_", 1)).read_bytes() for name in PAIRS}


def test_another_stream_is_refused_and_the_parts_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines(0, 60))))
    stopped(tmp_path, ["-"], monkeypatch)
    for other in (lines(1, 60), lines(0, 2)):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(other)))
        with pytest.raises(ValueError, match="- has changed, as its record 6 is not the one that an interrupted run read last"):
            preprocess(["-"], str(tmp_path / "x"), RECIPE)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines(0, 60))))
    preprocess(["-"], str(tmp_path / "x"), RECIPE)
    assert len(IndexedDataset(tmp_path / "x_title_document")) == 60


@pytest.mark.timeout(120)
def test_a_prefix_that_another_run_writes_is_refused_and_left_alone(tmp_path: Path, expected: dict[str, bytes]) -> None:
    run = start(tmp_path, ["-"])
    assert run.stdin is not None
    run.stdin.write(lines(0, 60).decode())
    run.stdin.flush()
    wait_for(lambda: (tmp_path / "x.progress.json").exists())
    with pytest.raises(ValueError, match=r"x_text_document.bin.part is being written by another process"):
        preprocess(write_inputs(tmp_path), "x", RECIPE)
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    assert contents(tmp_path) == expected


def wait_for(condition: object, *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(process: str) -> bool:
    """Running, and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

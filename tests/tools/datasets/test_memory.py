"""Preparing takes the same memory whatever the length of the input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.data.indexed import IndexedDataset

ROOT = Path(__file__).parents[3]
START = """
import re, sys
from pathlib import Path
from tools.datasets import preprocess
preprocess.MARK_S = 0.2
preprocess.main(sys.argv[1:])
print("peak", re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
LINE = b'{"text": "' + b"some words of a document, " * 40 + b'"}\n'


def peak_bytes(folder: Path, documents: int) -> int:
    """Largest resident memory of a run on a stream of that many documents."""
    flags = ["--input", "-", "--tokenizer-type", "CharLevelTokenizer", "--output-prefix", str(folder / str(documents))]
    run = subprocess.Popen(
        [sys.executable, "-c", START, *flags], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert run.stdin is not None
    assert run.stdout is not None
    for _ in range(documents // 100):
        run.stdin.write(LINE * 100)
    run.stdin.close()
    out = run.stdout.read().decode()
    assert run.wait() == 0
    assert len(IndexedDataset(folder / f"{documents}_text_document")) == documents
    return 1024 * int(out.split("peak ")[1])


@pytest.mark.timeout(120)
def test_a_stream_six_times_as_long_takes_no_more_memory(tmp_path: Path) -> None:
    short, long = (peak_bytes(tmp_path, documents) for documents in (4000, 24_000))
    assert long - short < 3 * 2**20, f"{short / 2**20:.1f} and {long / 2**20:.1f} MB"

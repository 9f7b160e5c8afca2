"""Building the operators: once, under a lock that dies with its holder, and with a sentence where it cannot be."""

from __future__ import annotations

import multiprocessing
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sepllm.ops import extension

STUB = "int answer() { return 42; }\n"


@pytest.fixture
def stub_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One small source in place of the operators, so that a build takes a moment."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "stub_cpu.cpp").write_text(STUB)
    monkeypatch.setattr(extension, "source_dir", lambda: folder)
    return folder


def test_second_build_compiles_nothing(tmp_path: Path, stub_sources: Path) -> None:
    library = extension.build(tmp_path / "cache")
    before = library.stat().st_mtime_ns
    assert extension.build(tmp_path / "cache") == library
    assert library.stat().st_mtime_ns == before


def test_changed_source_is_built_anew_beside_the_old_one(tmp_path: Path, stub_sources: Path) -> None:
    first = extension.build(tmp_path / "cache")
    (stub_sources / "stub_cpu.cpp").write_text(STUB.replace("42", "43"))
    second = extension.build(tmp_path / "cache")
    assert first != second
    assert first.is_file()


def test_processes_that_start_together_build_once(tmp_path: Path, stub_sources: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        libraries = pool.map(extension.build, [tmp_path / "cache"] * 4)
    assert len(set(libraries)) == 1
    assert (tmp_path / "cache" / "ops.lock").exists()


def test_lock_of_a_killed_build_blocks_nobody(tmp_path: Path, stub_sources: Path) -> None:
    (tmp_path / "cache").mkdir()
    lock = tmp_path / "cache" / "ops.lock"
    holder = "import os, pathlib, sys; from sepllm.ops.extension import locked\nwith locked(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    killed = subprocess.run([sys.executable, "-c", holder, str(lock)], env=environment, check=False)
    assert killed.returncode == -9
    assert extension.build(tmp_path / "cache").is_file()


def test_source_that_does_not_compile_gives_the_command_and_the_compilers_words(tmp_path: Path, stub_sources: Path) -> None:
    (stub_sources / "stub_cpu.cpp").write_text("int broken(")
    with pytest.raises(ValueError, match=r"(?s)do not compile.*python -m sepllm.ops.extension.*ninja -C.*error"):
        extension.build(tmp_path / "cache")
    (stub_sources / "stub_cpu.cpp").write_text(STUB)
    assert extension.build(tmp_path / "cache").is_file()


def test_machine_without_a_compiler_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"none of .* is on PATH: install one"):
        extension.build(tmp_path / "cache")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="CXX names no-such-compiler, which is not on PATH"):
        extension.build(tmp_path / "cache")


def test_cache_that_cannot_be_written_is_named(tmp_path: Path, stub_sources: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"cannot hold the compiled operators .*XDG_CACHE_HOME"):
        extension.build(tmp_path / "cache")


def test_sources_of_this_checkout_are_found() -> None:
    assert (extension.source_dir() / "sep_attention_cpu.cpp").is_file()


def test_fast_math_is_not_asked_for() -> None:
    """At link time it switches denormal numbers off for the whole process."""
    assert not any("fast-math" in flag for flag in extension.compile_flags())


COMPARE = """
import sys, torch
from sepllm.layout import TokenLayout
from sepllm.ops.sep_attention import Ranges, sep_attention
from sepllm.pattern import AttentionPattern

torch.ops.load_library(sys.argv[1])
from sepllm.ops import extension
extension.load = lambda: None
torch.manual_seed(0)
for length, window, size, dtype in ((150, 20, 16, torch.float64), (300, 64, 64, torch.float32), (65, 1, 80, torch.float32), (1, 4, 5, torch.float64)):
    ids = (torch.rand(2, length) < 0.16).long()
    made = TokenLayout.from_ids(ids, AttentionPattern(initial_tokens=3, separator_ids=(1,), windows=(window,))).ranges(0)
    ranges = Ranges(made.index, made.far_lo, made.far_hi, made.band_lo, made.band_hi)
    q, k, v = (torch.randn(2, length, heads, size, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    results = []
    for impl in ("native", "reference"):
        out, _ = sep_attention(q, k, v, ranges, scale=0.3, impl=impl)
        results.append([out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))])
    for ours, wanted in zip(*results):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86-64")
@pytest.mark.parametrize("architecture", ["x86-64", "x86-64-v3"], ids=["SSE2", "AVX2"])
def test_narrower_vectors_compute_the_same(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other widths and fewer registers than this machine's are other code."""
    flags = [f"-march={architecture}" if flag == "-march=native" else flag for flag in extension.compile_flags()]
    monkeypatch.setattr(extension, "compile_flags", lambda: flags)
    library = extension.build(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    compared = subprocess.run([sys.executable, "-c", COMPARE, str(library)], env=environment, capture_output=True, text=True, check=False)
    assert compared.stdout == "equal\n", compared.stderr

"""Building the operators: once, under a lock that dies with its holder, and with a sentence where it cannot be."""

from __future__ import annotations

import errno
import importlib.metadata
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
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


def test_file_system_without_locks_is_named(tmp_path: Path, stub_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network mounts are."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(extension.fcntl, "flock", refuse)
    with pytest.raises(ValueError, match=r"ops.lock cannot be locked .*No locks available.*Set XDG_CACHE_HOME to a folder on a local disk"):
        extension.build(tmp_path / "cache")


def test_cache_that_cannot_be_written_is_named(tmp_path: Path, stub_sources: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"cannot hold the compiled operators .*XDG_CACHE_HOME"):
        extension.build(tmp_path / "cache")


def test_cuda_sources_do_not_touch_the_cpu_library(tmp_path: Path, stub_sources: Path) -> None:
    library = extension.build(tmp_path / "cache")
    (stub_sources / "stub_cuda.cu").write_text("a kernel")
    (stub_sources / "bindings_cuda.cpp").write_text("a binding")
    assert extension.build(tmp_path / "cache") == library


FAKE_NVCC = """#!/bin/sh
# As much of nvcc as a build asks of it, with the C++ compiler.
case "$*" in
  --version) echo "a compiler"; exit ;;
  *-shared*) for last; do :; done; c++ -shared -x c++ {source} -fPIC -o "$last" ;;
  *) for last; do :; done; : > "$last" ;;
esac
"""


@pytest.fixture
def cuda_toolkit(tmp_path: Path, stub_sources: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A torch for CUDA and a stand-in for nvcc. Returns the CUDA source."""
    import torch

    (stub_sources / "bindings_cuda.cpp").write_text(STUB)
    source = stub_sources / "stub_cuda.cu"
    source.write_text(STUB)
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text(FAKE_NVCC.format(source=source))
    (home / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return source


def test_cuda_library_is_built_once_and_anew_when_a_kernel_changes(tmp_path: Path, cuda_toolkit: Path) -> None:
    first = extension.build_cuda(tmp_path / "cache")
    before = first.stat().st_mtime_ns
    assert extension.build_cuda(tmp_path / "cache") == first
    assert first.stat().st_mtime_ns == before
    cuda_toolkit.write_text(STUB.replace("42", "43"))
    assert extension.build_cuda(tmp_path / "cache") != first


def test_torch_without_cuda_is_told_so_and_nothing_is_tried(tmp_path: Path, cuda_toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(extension, "_compile", lambda *_: pytest.fail("a build was tried"))
    with pytest.raises(ValueError, match=r"CUDA operators cannot be built: torch .* is built without CUDA.*python -m sepllm.ops.extension"):
        extension.build_cuda(tmp_path / "cache")


def test_machine_without_nvcc_is_told_what_to_install(tmp_path: Path, cuda_toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"no nvcc is on PATH or in CUDA_HOME/bin: install the CUDA toolkit, or set CUDA_HOME"):
        extension.build_cuda(tmp_path / "cache")


def test_command_builds_what_the_machine_can(
    tmp_path: Path, stub_sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(extension, "why_no_cuda", lambda: "the reason")
    extension.main()
    assert re.fullmatch(r"CPU operators: .*/sepllm_ops.so\nCUDA operators: not built, the reason\n", capsys.readouterr().out)


@pytest.mark.skipif(
    int(importlib.metadata.version("setuptools").split(".")[0]) < 77, reason="pyproject.toml needs setuptools 77, which pip brings where it builds"
)
def test_wheel_carries_the_sources(tmp_path: Path) -> None:
    """An installed package builds its operators from the copy in it."""
    root = Path(__file__).parents[3]
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(root / name, checkout)
    for name in ("csrc", "sepllm", "megatron"):
        shutil.copytree(root / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    built = subprocess.run([sys.executable, "-c", command, str(tmp_path)], cwd=checkout, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(tmp_path / built.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    command = "from sepllm.ops.extension import source_dir; print(source_dir())"
    found = subprocess.run([sys.executable, "-c", command], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    sources = Path(found.stdout.strip())
    assert sources.is_relative_to(tmp_path / "installed")
    wanted = {path.name: path.read_bytes() for path in (root / "csrc").iterdir() if path.is_file()}
    assert {path.name: path.read_bytes() for path in sources.iterdir()} == wanted


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

from sepllm.ops.layer_norm import Affine, two_layer_norms
from sepllm.ops.rotary import rotate_packed
for size, dtype in ((768, torch.float32), (1000, torch.float64), (7, torch.float32), (80, torch.bfloat16), (100, torch.float16)):
    x = torch.randn(70, size, dtype=dtype, requires_grad=True)
    packed = torch.randn(2, 5, 3 * size, dtype=dtype, requires_grad=True)
    cos, sin = (torch.rand(2, 5, 1, dtype=dtype).expand(2, 5, size // 2 * 2) for _ in range(2))
    weights = [torch.randn(size, dtype=dtype) for _ in range(4)]
    results = []
    for impl in ("native", "reference"):
        normed = two_layer_norms(x, Affine(*weights[:2]), Affine(*weights[2:]), epsilon=1e-5, impl=impl)
        turned = rotate_packed(packed * 1, cos, sin, num_heads=1, num_kv_heads=1, head_size=size, impl=impl)
        outs = [*normed, *turned]
        results.append([*outs, *torch.autograd.grad(outs, (x, packed), [out.detach().cos() for out in outs])])
    close = 1e-4 if dtype in (torch.float32, torch.float64) else 4 * torch.finfo(dtype).eps
    for ours, wanted in zip(*results):
        torch.testing.assert_close(ours, wanted, rtol=close, atol=close)
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

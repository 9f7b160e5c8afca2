"""The C++ half of index building (csrc/dataset_index.cpp): compiled on first use, kept in the user's cache, no torch involved.

The file name in the cache holds a hash of the source, the Python ABI and the compiler's version, so nothing stale is ever loaded.
One process compiles while the others wait on a lock that the system drops with its holder: a killed build blocks nobody.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from sepllm.ops.extension import COMPILERS, cache_dir, find_compiler, locked, source_dir

MODULE = "sepllm_dataset_index"
SOURCE = source_dir() / "dataset_index.cpp"


class _Functions(Protocol):
    def sample_index_int32(self, sizes: NDArray, order: NDArray, *, seq_length: int, num_samples: int) -> NDArray[np.int32]: ...
    def sample_index_int64(self, sizes: NDArray, order: NDArray, *, seq_length: int, num_samples: int) -> NDArray[np.int64]: ...
    def blend_index(self, weights: NDArray[np.float64], size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]: ...


def sample_index(sizes: NDArray, order: NDArray, *, seq_length: int, num_samples: int) -> NDArray:
    """Where each sample starts. ``[num_samples + 1, 2]``: position in ``order`` and token offset in that sequence.

    ``sizes`` i32: tokens of every sequence. ``order`` i32: sequences in the order they are read. The result is i32, or i64 where
    GPT-NeoX takes it.
    """
    functions = load()
    build = functions.sample_index_int32 if sample_index_dtype(num_samples) == np.int32 else functions.sample_index_int64
    return build(_aligned(sizes), _aligned(order), seq_length=seq_length, num_samples=num_samples)


def sample_index_dtype(num_samples: int) -> np.dtype:
    """i32 while two numbers for each of the ``num_samples + 1`` rows can be counted in it."""
    return np.dtype(np.int32 if 2 * (num_samples + 1) < np.iinfo(np.int32).max else np.int64)


def blend_index(weights: NDArray[np.float64], size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """For each of ``size`` draws, the part it comes from (u8) and how often that part was drawn before (i64)."""
    return load().blend_index(np.ascontiguousarray(weights, dtype=np.float64), size)


@functools.cache
def load() -> _Functions:
    """The compiled module; compiles it where this machine has not yet."""
    return _import(build(cache_dir()))


def build(folder: Path, *, compilers: tuple[str, ...] = COMPILERS) -> Path:
    """Path of the compiled module in ``folder``, compiled first if it is not there."""
    if not SOURCE.is_file():
        raise ValueError(f"{SOURCE} is missing, and sample indices are built from it: run from a whole checkout of the project.")
    compiler = find_compiler(compilers)
    target = folder / f"{MODULE}-{_fingerprint(compiler)}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"{MODULE}.lock"):
            if not target.is_file():
                _compile(compiler, target)
    except OSError as error:
        raise ValueError(f"{folder} cannot hold the compiled index builder ({error}): make it writable, or set XDG_CACHE_HOME.") from error
    return target


def compile_command(compiler: str, target: Path) -> list[str]:
    """What compiles the source into ``target``."""
    includes = [flag for path in (_pybind11_include(), _python_include()) for flag in ("-I", str(path))]
    links = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", f"-DMODULE_NAME={MODULE}"]
    return [compiler, *flags, *includes, str(SOURCE), "-o", str(target), *links]


def _compile(compiler: str, target: Path) -> None:
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    command = compile_command(compiler, part)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        part.unlink(missing_ok=True)
        raise ValueError(f"The index builder does not compile; repair the compiler, then try again:\n{' '.join(command)}\n{result.stderr[-4000:]}")
    os.replace(part, target)


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    return hashlib.sha256(SOURCE.read_bytes() + version + str(sys.implementation.cache_tag).encode()).hexdigest()[:16]


def _pybind11_include() -> Path:
    """Of the package `pybind11`, else of the copy of it inside torch; neither is imported."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if (Path(place) / "include" / "pybind11" / "numpy.h").is_file():
                return Path(place) / "include"
    raise ValueError("Building sample indices needs the headers of pybind11: pip install pybind11")


def _python_include() -> Path:
    folder = Path(sysconfig.get_paths()["include"])
    if not (folder / "Python.h").is_file():
        raise ValueError(f"Building sample indices needs Python.h, which is not in {folder}: install the headers (apt-get install python3-dev).")
    return folder


def _import(path: Path) -> _Functions:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(_Functions, module)


def _aligned(values: NDArray) -> NDArray[np.int32]:
    return np.require(values, dtype=np.int32, requirements=["C", "A"])

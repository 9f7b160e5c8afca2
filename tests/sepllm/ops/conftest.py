"""The headers of arithmetic that CUDA kernels use, compiled as host C++."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable

import pytest

from sepllm.ops import extension

HostLibrary = Callable[[str], ctypes.CDLL]


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> HostLibrary:
    """``host_library(source)``: the C++ ``source``, which may include headers of csrc/, as a library."""

    def compiled(source: str) -> ctypes.CDLL:
        folder = tmp_path_factory.mktemp("host")
        (folder / "host.cpp").write_text(source)
        command = [extension.find_compiler(), "-O2", "-std=c++20", "-shared", "-fPIC", f"-I{extension.source_dir()}", "host.cpp", "-o", "host.so"]
        subprocess.run(command, cwd=folder, check=True)
        return ctypes.CDLL(str(folder / "host.so"))

    return compiled

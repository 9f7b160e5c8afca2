"""The compiled operators: built from csrc/ by ninja on first use, kept in the user's cache, loaded into torch.

The folder in the cache is named by a hash of the sources, the compiler, its flags, the processor's features and torch's version, so that
nothing stale or foreign is ever loaded. One process builds while the others wait on a lock that the system drops with its holder.
`python -m sepllm.ops.extension` builds ahead of time.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIBRARY = "sepllm_ops.so"
COMPILERS = ("c++", "g++", "clang++")
BUILD_COMMAND = "python -m sepllm.ops.extension"

log = logging.getLogger(__name__)


@functools.cache
def load() -> None:
    """Makes ``torch.ops.sepllm`` hold the compiled operators. ValueError with the cause and the remedy where they cannot be built."""
    import torch

    torch.ops.load_library(build(cache_dir()))


@functools.cache
def why_unavailable() -> str | None:
    """None once the operators are loaded, building them if need be; else one line with the cause."""
    try:
        load()
    except (ValueError, OSError) as error:
        return str(error).splitlines()[0]
    return None


def cache_dir() -> Path:
    """The user's cache folder by the XDG convention, `~/.cache/sepllm` unless `XDG_CACHE_HOME` says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sepllm"


def source_dir() -> Path:
    """csrc/ of the checkout, or the copy of it that an installed package carries."""
    package = Path(__file__).parents[1]
    return next((folder for folder in (package.parent / "csrc", package / "csrc") if (folder / "bindings_cpu.cpp").is_file()), package / "csrc")


def find_compiler(names: tuple[str, ...] = COMPILERS) -> str:
    """Path of the C++ compiler: ``CXX``, or the first of ``names`` on PATH."""
    named = os.environ.get("CXX")
    found = shutil.which(named) if named else next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        what = f"CXX names {named}, which is not" if named else f"none of {', '.join(names)} is"
        raise ValueError(f"Compiling needs a C++ compiler, but {what} on PATH: install one (apt-get install g++, or conda install gxx).")
    return found


def build(folder: Path) -> Path:
    """Path of the shared library under ``folder``, compiled first if it is not there."""
    sources = sorted(source_dir().glob("*_cpu.cpp"))
    if not sources:
        raise ValueError(f"{source_dir()} holds no sources of the operators: run from a whole checkout, or install the package again.")
    compiler = find_compiler()
    flags = compile_flags()
    home = folder / f"ops-{_fingerprint(compiler, flags)}"
    library = home / LIBRARY
    if library.is_file():
        return library
    try:
        home.mkdir(parents=True, exist_ok=True)
        with locked(folder / "ops.lock"):
            if not library.is_file():
                _compile(home, compiler, flags, sources)
    except OSError as error:
        raise ValueError(f"{folder} cannot hold the compiled operators ({error}): make it writable, or set XDG_CACHE_HOME.") from error
    return library


def compile_flags() -> list[str]:
    """For this processor. ``-ffast-math`` is not among them: it would change what NaN and denormals do in the whole process."""
    import torch

    torch_includes = Path(torch.__file__).parent / "include"
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    includes = [f"-I{torch_includes}", f"-I{torch_includes / 'torch' / 'csrc' / 'api' / 'include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return ["-O3", native, "-std=c++20", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-fvisibility=hidden", abi, *includes]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the file's lock, which the system releases with the process."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(home: Path, compiler: str, flags: list[str], sources: list[Path]) -> None:
    import torch

    libraries = Path(torch.__file__).parent / "lib"
    part = f"{LIBRARY}.part"
    objects = [f"{source.stem}.o" for source in sources]
    rules = [
        f"cxx = {compiler}",
        f"flags = {' '.join(map(_escaped, flags))}",
        "rule compile",
        "  command = $cxx $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = $cxx -shared -fopenmp $in -L{_escaped(str(libraries))} -ltorch_cpu -lc10 -o $out",
        *(f"build {name}: compile {_escaped(str(source))}" for name, source in zip(objects, sources, strict=True)),
        f"build {part}: link {' '.join(objects)}",
        "",
    ]
    (home / "build.ninja").write_text("\n".join(rules))
    log.info("Building the C++ operators, once for this machine (about half a minute): %s", home)
    result = subprocess.run([_ninja(), "-C", str(home)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ValueError(
            f"The C++ operators do not compile ({compiler}); repair the compiler, then {BUILD_COMMAND}\n"
            f"ninja -C {home}\n{(result.stdout + result.stderr)[-4000:]}"
        )
    os.replace(home / part, home / LIBRARY)


def _escaped(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja() -> str:
    spec = importlib.util.find_spec("ninja")
    beside = [str(Path(place) / "data" / "bin") for place in (spec.submodule_search_locations or [])] if spec else []
    found = shutil.which("ninja") or shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), *beside]))
    if found is None:
        raise ValueError("Building the C++ operators needs ninja: pip install ninja")
    return found


def _fingerprint(compiler: str, flags: list[str]) -> str:
    import torch

    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    digest = hashlib.sha256(version + " ".join([*flags, torch.__version__, _processor()]).encode())
    for path in sorted(source_dir().iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What ``-march=native`` depends on, so that a cache shared by unlike machines serves each its own build."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        build(cache_dir())
    except ValueError as error:
        sys.exit(str(error))

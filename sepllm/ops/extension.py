"""The compiled operators: built from csrc/ by ninja on first use, kept in the user's cache, loaded into torch.

Two libraries, C++ for CPUs, and CUDA where nvcc and a torch built for CUDA are. The folder of each in the cache is named by a hash of its
sources, its compilers, their flags, the processor's features and torch's version, so that nothing stale or foreign is ever loaded. One
process builds while the others wait on a lock that the system drops with its holder. `python -m sepllm.ops.extension` builds ahead of time.
"""

from __future__ import annotations

import errno
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
from dataclasses import dataclass
from pathlib import Path

LIBRARY = "sepllm_ops.so"
CUDA_LIBRARY = "sepllm_ops_cuda.so"
COMPILERS = ("c++", "g++", "clang++")
CAPABILITIES = (80, 90)
"""CUDA architectures that are compiled for; later ones take the last one's intermediate code."""
BUILD_COMMAND = "python -m sepllm.ops.extension"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

log = logging.getLogger(__name__)


@functools.cache
def load() -> None:
    """Makes ``torch.ops.sepllm`` hold the compiled operators. ValueError with the cause and the remedy where they cannot be built."""
    import torch

    torch.ops.load_library(build(cache_dir()))


@functools.cache
def load_cuda() -> None:
    """Makes the operators run on CUDA tensors too. ValueError with the cause and the remedy where they cannot be built."""
    import torch

    load()
    torch.ops.load_library(build_cuda(cache_dir()))


@functools.cache
def why_unavailable() -> str | None:
    """None once the operators are loaded, building them if need be; else one line with the cause."""
    try:
        load()
    except (ValueError, OSError) as error:
        return str(error).splitlines()[0]
    return None


def why_no_cuda() -> str | None:
    """None where the CUDA operators can be built; else one line with the cause. Builds nothing."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None if _nvcc() is not None else "no nvcc is on PATH or in CUDA_HOME/bin: install the CUDA toolkit, or set CUDA_HOME to where it is"


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
    """Path of the CPU operators' library under ``folder``, compiled first if it is not there."""
    compiler = find_compiler()
    libraries = f"-L{_escaped(str(_torch_folder() / 'lib'))} -ltorch_cpu -lc10"
    recipe = _Recipe(
        library=LIBRARY,
        sources=tuple(sorted(source_dir().glob("*_cpu.cpp"))),
        compiler=compiler,
        flags=tuple(compile_flags()),
        link=f"$compiler -shared -fopenmp $in {libraries} -o $out",
    )
    return _built(recipe, folder)


def build_cuda(folder: Path) -> Path:
    """Path of the CUDA operators' library under ``folder``, compiled first if it is not there."""
    import torch

    if (why_not := why_no_cuda()) is not None:
        raise ValueError(f"The CUDA operators cannot be built: {why_not}. Then: {BUILD_COMMAND}")
    nvcc = _nvcc()
    assert nvcc is not None
    libraries = f"-L{_escaped(str(_torch_folder() / 'lib'))} -lc10_cuda -ltorch_cpu -lc10"
    recipe = _Recipe(
        library=CUDA_LIBRARY,
        sources=(*sorted(source_dir().glob("*_cuda.cu")), source_dir() / "bindings_cuda.cpp"),
        compiler=nvcc,
        flags=tuple(cuda_flags(host_compiler=find_compiler())),
        link=f"$compiler -shared -ccbin {_escaped(find_compiler())} $in {libraries} -o $out",
        built_for=str(torch.version.cuda),
    )
    return _built(recipe, folder)


def compile_flags() -> list[str]:
    """For this processor. ``-ffast-math`` is not among them: it would change what NaN and denormals do in the whole process."""
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return ["-O3", native, "-std=c++20", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-fvisibility=hidden", _abi(), *_torch_includes()]


def cuda_flags(*, host_compiler: str, capabilities: tuple[int, ...] = CAPABILITIES) -> list[str]:
    """nvcc's, also for the binding, which so finds the toolkit's headers."""
    architectures = [f"-gencode=arch=compute_{capability},code=sm_{capability}" for capability in capabilities]
    later = f"-gencode=arch=compute_{capabilities[-1]},code=compute_{capabilities[-1]}"
    host = ["-ccbin", host_compiler, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    return ["-O3", "-std=c++20", *architectures, later, *host, _abi(), *_torch_includes()]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the file's lock, which the system releases with the process. ValueError where the file system has no locks."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise ValueError(
                f"{path} cannot be locked ({error}): its file system has no flock, so that processes that start together would build over one "
                "another. Set XDG_CACHE_HOME to a folder on a local disk, or mount this one with locks."
            ) from error
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """How one library is made."""

    library: str
    sources: tuple[Path, ...]
    compiler: str
    flags: tuple[str, ...]
    link: str
    """Ninja command that makes ``$out`` of the objects ``$in``."""
    built_for: str = ""
    """What else the library depends on."""

    def fingerprint(self) -> str:
        import torch

        version = subprocess.run([self.compiler, "--version"], capture_output=True, check=False).stdout
        digest = hashlib.sha256(version + " ".join([*self.flags, self.link, torch.__version__, self.built_for, _processor()]).encode())
        for path in sorted({*self.sources, *source_dir().glob("*.h")}):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()[:16]

    def ninja_file(self, part: str) -> str:
        objects = [f"{source.stem}.o" for source in self.sources]
        rules = [
            f"compiler = {self.compiler}",
            f"flags = {' '.join(map(_escaped, self.flags))}",
            "rule compile",
            "  command = $compiler $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "rule link",
            f"  command = {self.link}",
            *(f"build {name}: compile {_escaped(str(source))}" for name, source in zip(objects, self.sources, strict=True)),
            f"build {part}: link {' '.join(objects)}",
            "",
        ]
        return "\n".join(rules)


def _built(recipe: _Recipe, folder: Path) -> Path:
    if not recipe.sources:
        raise ValueError(f"{source_dir()} holds no sources of the operators: run from a whole checkout, or install the package again.")
    home = folder / f"{Path(recipe.library).stem.removeprefix('sepllm_').replace('_', '-')}-{recipe.fingerprint()}"
    library = home / recipe.library
    if library.is_file():
        return library
    try:
        home.mkdir(parents=True, exist_ok=True)
        with locked(folder / "ops.lock"):
            if not library.is_file():
                _compile(home, recipe)
    except OSError as error:
        raise ValueError(f"{folder} cannot hold the compiled operators ({error}): make it writable, or set XDG_CACHE_HOME.") from error
    return library


def _compile(home: Path, recipe: _Recipe) -> None:
    part = f"{recipe.library}.part"
    (home / "build.ninja").write_text(recipe.ninja_file(part))
    log.info("Building %s, once for this machine (about a minute): %s", recipe.library, home)
    result = subprocess.run([_ninja(), "-C", str(home)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ValueError(
            f"The compiled operators do not compile ({recipe.compiler}); repair the compiler, then {BUILD_COMMAND}\n"
            f"ninja -C {home}\n{(result.stdout + result.stderr)[-4000:]}"
        )
    os.replace(home / part, home / recipe.library)


def _torch_folder() -> Path:
    import torch

    return Path(torch.__file__).parent


def _torch_includes() -> list[str]:
    includes = _torch_folder() / "include"
    return [f"-I{includes}", f"-I{includes / 'torch' / 'csrc' / 'api' / 'include'}"]


def _abi() -> str:
    import torch

    return f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"


def _nvcc() -> str | None:
    """Path of nvcc: in ``CUDA_HOME``, or on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def _escaped(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja() -> str:
    spec = importlib.util.find_spec("ninja")
    beside = [str(Path(place) / "data" / "bin") for place in (spec.submodule_search_locations or [])] if spec else []
    found = shutil.which("ninja") or shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), *beside]))
    if found is None:
        raise ValueError("Building the compiled operators needs ninja: pip install ninja")
    return found


def _processor() -> str:
    """What ``-march=native`` depends on, so that a cache shared by unlike machines serves each its own build."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def main() -> None:
    """Builds what this machine can, and says what it cannot."""
    print(f"CPU operators: {build(cache_dir())}")
    why_not = why_no_cuda()
    print(f"CUDA operators: {build_cuda(cache_dir()) if why_not is None else 'not built, ' + why_not}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))

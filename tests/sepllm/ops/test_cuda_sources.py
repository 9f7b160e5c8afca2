"""The CUDA kernels without a GPU: nvcc compiles them, and a C++ compiler makes them run on the CPU, a thread after another, against torch.

That proves their arithmetic and who reads and writes what, not their speed, nor what only a GPU does: tests/gpu.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sepllm.ops import extension
from sepllm.ops.layer_norm import Affine, two_layer_norms
from sepllm.ops.rotary import rotate_packed
from sepllm.positions import rotary_table

STORAGES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ON_HOST = Path(__file__).with_name("cuda_on_host")
SOURCES = sorted(extension.source_dir().glob("*_cuda.cu"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("source", [*SOURCES, extension.source_dir() / "bindings_cuda.cpp"], ids=lambda source: source.name)
def test_nvcc_compiles_for_every_architecture(source: Path, tmp_path: Path) -> None:
    """And without many spills. torch for CPUs lacks one generated header, which its CUDA headers include."""
    missing = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    missing.parent.mkdir(parents=True)
    missing.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    flags = [*extension.cuda_flags(host_compiler=extension.find_compiler()), f"-I{tmp_path}", "-Xptxas", "-v"]
    command = ["nvcc", *flags, "-c", str(source), "-o", str(tmp_path / "out.o")]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    spilled = [int(line.split(" bytes spill stores")[0].rsplit(" ", 1)[-1]) for line in compiled.stderr.splitlines() if "spill stores" in line]
    assert all(count <= 512 for count in spilled)


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels, compiled as C++."""
    library = tmp_path_factory.mktemp("cuda_on_host") / "kernels.so"
    flags = ["-std=c++20", "-O1", "-Wno-unknown-pragmas", "-fPIC", "-shared", f"-I{ON_HOST}", f"-I{extension.source_dir()}"]
    sources = [extension.source_dir() / "rotary_cuda.cu", extension.source_dir() / "layer_norm_cuda.cu", ON_HOST / "entry_points.cpp"]
    subprocess.run([extension.find_compiler(), *flags, "-x", "c++", *map(str, sources), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.layer_norms_partial_bytes.restype = ctypes.c_int64
    return loaded


def pointers(*tensors: Tensor | None) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


@pytest.mark.parametrize("dtype", list(STORAGES), ids=str)
@pytest.mark.parametrize("has_wide_angles", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_size", "dims"), [(3, 3, 64, 16), (4, 2, 80, 20), (2, 1, 32, 32), (2, 2, 5, 2)])
def test_rotary_kernels_turn_and_turn_back(
    on_host: ctypes.CDLL, dtype: torch.dtype, has_wide_angles: bool, heads: int, kv_heads: int, head_size: int, dims: int
) -> None:
    batch, tokens = 2, 9
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = rotary_table(torch.arange(tokens).expand(batch, tokens), rotary_dims=dims, base=1e4, dtype=wide if has_wide_angles else dtype)
    original = torch.randn(batch, tokens, (heads + 2 * kv_heads) * head_size).to(dtype).requires_grad_()
    grads = [torch.randn(batch, tokens, count, head_size).to(dtype) for count in (heads, kv_heads, kv_heads)]
    wanted = rotate_packed(original, cos, sin, num_heads=heads, num_kv_heads=kv_heads, head_size=head_size, impl="reference")

    packed, gradient = original.detach().clone(), poisoned(*original.shape, dtype=dtype)
    sizes = (ctypes.c_int64 * 6)(batch, tokens, heads, kv_heads, head_size, dims)
    angles = (*(ctypes.c_void_p(table.data_ptr()) for table in (cos, sin)), int(has_wide_angles))
    on_host.rotate(STORAGES[dtype], sizes, *angles, ctypes.c_void_p(packed.data_ptr()))
    on_host.rotate_backward(STORAGES[dtype], sizes, *angles, *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (gradient, *grads)))

    unturned = torch.zeros_like(cos)
    ours = rotate_packed(packed, unturned + 1, unturned, num_heads=heads, num_kv_heads=kv_heads, head_size=head_size, impl="reference")
    for name, one, other in zip(("q", "k", "v"), ours, wanted, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, original, grads)[0])


@pytest.mark.parametrize(
    ("rows", "size", "has_wide_parameters", "dtype"),
    [
        *product([1, 5], [1, 7], [False, True], STORAGES),
        *product([7], [768, 1000], [False, True], STORAGES),
        *product([2], [None], [False], STORAGES),
        (520, 8, False, torch.float32),
    ],
)
def test_layer_norm_kernels_give_outputs_and_gradients(
    on_host: ctypes.CDLL, dtype: torch.dtype, has_wide_parameters: bool, rows: int, size: int | None
) -> None:
    """One pack a thread, two (the longest row, None), single elements; fewer rows than blocks, and more."""
    size = size or 16 * 2 * 512 // dtype.itemsize
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    of_parameters = wide if has_wide_parameters else dtype
    x = (torch.randn(rows, size) * 2 + 3).to(dtype).requires_grad_()
    parameters = [torch.randn(size).to(of_parameters).requires_grad_() for _ in range(4)]
    weights, biases = parameters[::2], parameters[1::2]
    grads = [torch.randn(rows, size).to(dtype) for _ in range(2)]
    kind = (STORAGES[dtype], ctypes.c_int64(rows), ctypes.c_int64(size), 2, int(has_wide_parameters))

    outs, statistics = ([poisoned(*shape, dtype=kind) for _ in range(2)] for shape, kind in (((rows, size), dtype), ((rows,), wide)))
    on_host.layer_norms(*kind, ctypes.c_double(1e-5), pointers(x, *weights, *biases, *outs, *statistics))
    partial = poisoned(on_host.layer_norms_partial_bytes(*kind[:-1]) // 8 + 1, dtype=torch.float64)
    dx, of_weights, of_biases = poisoned(rows, size, dtype=dtype), *([poisoned(size, dtype=of_parameters) for _ in range(2)] for _ in range(2))
    on_host.layer_norms_backward(*kind, pointers(x, *weights, *grads, *statistics, dx, *of_weights, *of_biases, partial))

    exact = [tensor.detach().double().requires_grad_() for tensor in (x, *parameters)]
    wanted_outs = two_layer_norms(exact[0], Affine(*exact[1:3]), Affine(*exact[3:]), epsilon=1e-5, impl="reference")
    wanted = [*wanted_outs, *torch.autograd.grad(wanted_outs, exact, [grad.double() for grad in grads])]
    ours = [*outs, dx, of_weights[0], of_biases[0], of_weights[1], of_biases[1]]
    for name, one, other in zip(("first", "second", "dx", "dw1", "db1", "dw2", "db2"), ours, wanted, strict=True):
        close = 4 * torch.finfo(one.dtype).eps if one.dtype in (torch.bfloat16, torch.float16) else 1e-9 if dtype == torch.float64 else 2e-4
        torch.testing.assert_close(one.double(), other, rtol=close, atol=close * 8, msg=lambda text, name=name: f"{name}: {text}")

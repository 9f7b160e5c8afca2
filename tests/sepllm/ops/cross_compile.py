"""Compiles the Triton attention kernels for GPUs that are not there, with the tiles of the table; a process of its own, as the tests
interpret. Arguments: capability, head size, dtype, HAS_BIAS, GROUP, SOFTMAX. One JSON line a kernel: registers, stack and shared bytes,
instructions."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sepllm.ops import sep_attention_kernels as kernels
from sepllm.ops.sep_attention_tiles import Tile, tiles
from sepllm.ops.sep_attention_triton import _shape

TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
FLOATS = {"LSE", "DELTA", "GAINS", "OWED", "SLOPES", "Q_POSITIONS", "K_POSITIONS", "FAR_DK", "FAR_DV"}
INTEGERS = {"BOUNDS", "ROWS", "READERS", "FAR_COLUMN", "EXTREME_KEYS"}


def source(kernel: triton.JITFunction, tile: Tile, constants: dict[str, object], dtype: str) -> ASTSource:
    """What a launch with 16-byte aligned tensors, packed heads and no bias (unless it is asked for) would compile."""
    constants = constants | {"BLOCK_Q": tile.queries, "BLOCK_K": tile.keys}
    if not constants["HAS_BIAS"]:
        constants |= {"SLOPES": None, "Q_POSITIONS": None, "K_POSITIONS": None}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        pointer = "*fp32" if name in FLOATS else "*i32" if name in INTEGERS else f"*{TYPES[dtype]}"
        signature[name] = "constexpr" if name in constants else pointer if name.isupper() else "i32"
    is_aligned = [kind[0] == "*" or name.rsplit("_")[-1] in ("batch", "row", "head") for name, kind in signature.items()]
    attributes = {(place,): [["tt.divisibility", 16]] for place, aligned in enumerate(is_aligned) if aligned}
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{word}:(\d+)", report)[1]) for name, word in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))}


def main(capability: int, head_size: int, dtype: str, has_bias: bool, group: int, softmax: int) -> None:
    constants = {
        "SOFTMAX": softmax,
        "NUMERATOR_BIAS": 0.0,
        "DENOMINATOR_BIAS": 0.0,
        "SCALE": head_size**-0.5,
        "GROUP": group,
        "HAS_BIAS": has_bias,
        "ACCUMULATE": tl.float32,
        "D": head_size,
        "BLOCK_D": triton.next_power_of_2(head_size),
    }
    division = tiles(head_size, getattr(torch, dtype), divmod(capability, 10), adjusts=softmax > 0)
    launches = {
        "forward": (kernels._forward_kernel, division.forward, {}),
        "queries": (kernels._query_gradient_kernel, division.queries, {}),
        "far": (kernels._key_gradient_kernel, division.far, {"IS_FAR": True}),
        "keys": (kernels._key_gradient_kernel, division.keys, {"IS_FAR": False}),
    }
    for name, (kernel, tile, more) in launches.items():
        options = {option: value for option, value in _shape(tile).items() if not option.startswith("BLOCK")}
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source(kernel, tile, constants | more, dtype), target=target, options=options)
        ptx = compiled.asm["ptx"]
        counts = {word: ptx.count(word) for word in ("wgmma.mma_async", "mma.sync", "cp.async.cg", "tf32")}
        counts["atomics"] = len(re.findall(r"\b(?:atom|red)\.global", ptx))
        print(json.dumps({"kernel": name, "shared": compiled.metadata.shared, **resources(compiled.asm["cubin"]), **counts}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], bool(int(sys.argv[4])), int(sys.argv[5]), int(sys.argv[6]))

"""No sparse core allocates anything of the size of the attention map: peak memory of a process of its own, at 32768 tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sepllm.attention import core_names

LENGTH = 32768
FORMS_A_MAP = {
    "dense": "it is the definition, with an explicit mask",
    "sdpa": "it refuses sparse layers",
}

MEASURE = """
import json, re, sys
import torch
from sepllm.attention import attend, choose_core, spec_of
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern

core, length = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)

def memory_bytes(name):  # VmHWM, the peak, starts with the process; ru_maxrss would count the one that started it
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

def run(length, needs_grad):
    generator = torch.Generator().manual_seed(0)
    ids = (torch.rand(1, length, generator=generator) < 0.16).long()
    ranges = TokenLayout.from_ids(ids, AttentionPattern(initial_tokens=3, separator_ids=(1,), windows=(64,))).ranges(0)
    q, k, v = (torch.randn(1, length, 1, 16, requires_grad=needs_grad) for _ in range(3))
    choose_core(spec_of(q, ranges, needs_grad=needs_grad), core)
    before = memory_bytes("VmRSS")
    out = attend(q, k, v, ranges, scale=0.25, core=core)
    if needs_grad:
        out.sum().backward()
    return memory_bytes("VmHWM") - before

for needs_grad in (True, False):
    try:
        run(200, needs_grad)  # what is loaded or built once
        print(json.dumps({"growth_bytes": run(length, needs_grad), "has_backward": needs_grad}))
        break
    except ValueError as refusal:
        print(json.dumps({"refusal": str(refusal), "has_backward": needs_grad}))
"""


def measure(core: str, length: int) -> dict[str, dict[str, object]]:
    """What `MEASURE` prints for the pass with a backward and, if the core refuses that, without."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # at this length the interpreter takes minutes
    command = [sys.executable, "-c", MEASURE, core, str(length)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    return {"backward" if line["has_backward"] else "forward": line for line in lines}


@pytest.mark.parametrize("core", [core for core in core_names() if core not in FORMS_A_MAP])
def test_sparse_core_needs_less_than_a_quarter_byte_per_pair(core: str) -> None:
    answers = measure(core, LENGTH)
    for answer in answers.values():
        if "refusal" in answer:
            assert str(answer["refusal"]).startswith(f"No attention core can compute this: {core}: ")
        else:
            assert int(str(answer["growth_bytes"])) < LENGTH**2 / 4


def test_the_measure_sees_an_attention_map_in_fp32() -> None:
    length = 2048
    assert int(str(measure("dense", length)["backward"]["growth_bytes"])) > 4 * length**2

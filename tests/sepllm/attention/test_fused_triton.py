"""What the Triton core needs of a machine, said where it is missing. What it computes is tested in `test_cores`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sepllm.attention import fused_triton
from sepllm.attention.spec import AttentionSpec
from sepllm.layout import KeyRanges, TokenLayout
from sepllm.pattern import AttentionPattern, SelfAdjust, Standard

pytest.importorskip("triton", reason="the Triton kernels need the package triton")


def text_ranges() -> KeyRanges:
    pattern = AttentionPattern(initial_tokens=2, separator_ids=(1,), windows=(4,))
    return TokenLayout.from_ids(torch.arange(20).remainder(7)[None], pattern).ranges(0)


def spec(device_type: str, dtype: torch.dtype = torch.bfloat16, **changes: object) -> AttentionSpec:
    values: dict[str, object] = {
        "device_type": device_type,
        "dtype": dtype,
        "num_queries": 20,
        "num_keys": 20,
        "longest_band": 4,
        "is_causal": False,
        "softmax": Standard(),
        "has_bias": False,
        "dropout": 0.0,
        "needs_grad": True,
    }
    return AttentionSpec(**values | changes)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernels are compiled."""
    monkeypatch.setattr("sepllm.ops.sep_attention_triton.is_interpreted", lambda: False)


@pytest.mark.usefixtures("compiled")
def test_machine_must_have_a_recent_nvidia_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert fused_triton.unsupported(spec("cpu")) == "needs a CUDA device"
    assert fused_triton.unsupported(spec("cuda")) is None
    assert fused_triton.unsupported(spec("cuda", torch.float64)) == "only bfloat16, float16 and float32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert fused_triton.unsupported(spec("cuda")) == "needs an NVIDIA GPU of compute capability 8.0 or newer"


def test_extremes_of_other_keys_than_those_read_and_dropout_are_refused() -> None:
    over_causal = SelfAdjust(kind="normalised", extremes="causal")
    assert "keys that are read only" in str(fused_triton.unsupported(spec("cuda", softmax=over_causal)))
    assert fused_triton.unsupported(spec("cuda", dropout=0.1)) == "no dropout"


def test_without_triton_the_core_says_what_to_install_and_attention_works() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch
from sepllm.attention import attend
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern
ranges = TokenLayout.from_ids(torch.arange(20)[None], AttentionPattern(windows=(4,))).ranges(0)
q = torch.randn(1, 20, 2, 8)
attend(q, q, q, ranges, scale=1.0, core="chunked")
try:
    attend(q, q, q, ranges, scale=1.0, core="fused_triton")
except ValueError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "fused_triton: needs the package triton (pip install triton" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here, not interpreted")
def test_layers_share_what_was_prepared() -> None:
    ranges = text_ranges()
    fused_triton.prepare(ranges)
    known = ranges.derived["fused_triton"]
    q = torch.randn(1, 20, 2, 16)
    fused_triton.attention(q, q, q, ranges, scale=1.0, softmax=Standard(), bias=None, dropout=0.0)
    assert ranges.derived["fused_triton"] is known

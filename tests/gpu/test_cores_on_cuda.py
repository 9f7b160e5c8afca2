"""The portable cores and the model on a CUDA device: the CPU's answers. `make test-gpu` runs them."""

from __future__ import annotations

import pytest
import torch

from sepllm.attention import PositionBias, attend, prepare, spec_of
from sepllm.layout import TokenLayout
from sepllm.pattern import UNBOUNDED, AttentionPattern

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]


def random_text(*, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and a mask with padding on the left of the first row."""
    ids = torch.randint(20, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return ids, mask


@pytest.mark.parametrize(("core", "window"), [("chunked", 16), ("dense", 16), ("fused_triton", 16), ("fused_triton", 150), ("sdpa", UNBOUNDED)])
def test_core_gives_the_cpus_outputs_and_gradients(core: str, window: int) -> None:
    ids, mask = random_text(rows=2, length=200)
    pattern = AttentionPattern(initial_tokens=3, separator_ids=(1, 2), windows=(window,))
    layout = TokenLayout.from_ids(ids, pattern, attention_mask=mask if core != "sdpa" else None)
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(2, 200, heads, 32, generator=generator) for heads in (4, 2, 2, 4)]

    def answers(device: str, name: str) -> list[torch.Tensor]:
        q, k, v = (value.to(device).requires_grad_() for value in values[:3])
        out = attend(q, k, v, layout.to(device).ranges(0), scale=0.2, core=name)
        return [tensor.cpu() for tensor in (out.detach(), *torch.autograd.grad(out, (q, k, v), values[3].to(device)))]

    for here, there in zip(answers("cpu", "dense"), answers("cuda", core), strict=True):
        torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [16, 400])
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_triton_error_is_at_most_twice_that_of_the_dense_core_and_its_bits_repeat(dtype: torch.dtype, head_size: int, window: int) -> None:
    """Long enough for full tiles, edges and gradients of far columns; float32 must not be rounded to tf32."""
    ids, mask = random_text(rows=2, length=700)
    layout = TokenLayout.from_ids(ids, AttentionPattern(initial_tokens=3, separator_ids=(1, 2), windows=(window,)), attention_mask=mask)
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(2, 700, heads, head_size, generator=generator).to(dtype) for heads in (4, 2, 2, 4)]
    ranges = layout.to("cuda").ranges(0)

    def answers(name: str, exact: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (value.to("cuda", exact).requires_grad_() for value in values[:3])
        out = attend(q, k, v, ranges, scale=head_size**-0.5, core=name)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), values[3].to("cuda", exact))]

    truth, dense, ours, again = (
        answers("dense", torch.float64),
        answers("dense", dtype),
        answers("fused_triton", dtype),
        answers("fused_triton", dtype),
    )
    for what, exactly, theirs, one, other in zip(("out", "dq", "dk", "dv"), truth, dense, ours, again, strict=True):
        assert torch.equal(one, other), what
        error, allowed = ((result.double() - exactly).abs().max().item() for result in (one, theirs))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * exactly.abs().max().item(), what


def test_triton_core_compiles_into_one_graph_with_a_position_bias() -> None:
    ids, mask = random_text(rows=2, length=300)
    layout = TokenLayout.from_ids(ids, AttentionPattern(initial_tokens=3, separator_ids=(1, 2), windows=(16,)), attention_mask=mask).to("cuda")
    bias = PositionBias(slopes=torch.tensor([0.5, 0.1], device="cuda"), query_positions=layout.positions, key_positions=layout.key_positions)
    ranges = layout.ranges(0)
    prepare(ranges, spec_of(torch.empty(0, device="cuda"), ranges, bias=bias, needs_grad=True), "fused_triton")
    values = [torch.randn(2, 300, 2, 64, device="cuda", requires_grad=True) for _ in range(3)]

    def call(core: str) -> torch.Tensor:
        return attend(*values, ranges, scale=0.1, core=core, bias=bias)

    ours, wanted = torch.compile(call, fullgraph=True)("fused_triton"), call("dense")
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
    for one, other in zip(torch.autograd.grad(ours.sum(), values), torch.autograd.grad(wanted.sum(), values), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_decoding_on_the_device_reads_the_same_keys() -> None:
    ids, mask = random_text(rows=2, length=40)
    pattern = AttentionPattern(initial_tokens=2, separator_ids=(1, 2), windows=(8,))
    new = torch.tensor([[3], [1]])
    here = TokenLayout.from_ids(ids, pattern, attention_mask=mask).extend(new)
    there = TokenLayout.from_ids(ids.cuda(), pattern, attention_mask=mask.cuda()).extend(new.cuda())
    assert torch.equal(here.ranges(0).dense(), there.ranges(0).dense().cpu())
    assert torch.equal(here.positions, there.positions.cpu())

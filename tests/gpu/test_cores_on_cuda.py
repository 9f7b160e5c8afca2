"""The portable cores and the model on a CUDA device: the CPU's answers. `make test-gpu` runs them."""

from __future__ import annotations

import pytest
import torch

from sepllm.attention import attend
from sepllm.layout import TokenLayout
from sepllm.pattern import UNBOUNDED, AttentionPattern

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]


def random_text(*, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and a mask with padding on the left of the first row."""
    ids = torch.randint(20, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return ids, mask


@pytest.mark.parametrize(("core", "window"), [("chunked", 16), ("dense", 16), ("sdpa", UNBOUNDED)])
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


def test_decoding_on_the_device_reads_the_same_keys() -> None:
    ids, mask = random_text(rows=2, length=40)
    pattern = AttentionPattern(initial_tokens=2, separator_ids=(1, 2), windows=(8,))
    new = torch.tensor([[3], [1]])
    here = TokenLayout.from_ids(ids, pattern, attention_mask=mask).extend(new)
    there = TokenLayout.from_ids(ids.cuda(), pattern, attention_mask=mask.cuda()).extend(new.cuda())
    assert torch.equal(here.ranges(0).dense(), there.ranges(0).dense().cpu())
    assert torch.equal(here.positions, there.positions.cpu())

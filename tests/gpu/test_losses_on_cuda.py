"""Cross-entropy, bias + GELU and masked softmax on a CUDA device: at most twice the plain form's error, and the same bits again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sepllm.ops.cross_entropy import cross_entropy, reference_statistics, statistics
from sepllm.ops.gelu import bias_gelu
from sepllm.ops.masked_softmax import masked_softmax

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to("cuda", dtype)


def check(exact: list[Tensor], plain: list[Tensor], ours: list[Tensor], again: list[Tensor]) -> None:
    for place, (truth, theirs, one, other) in enumerate(zip(exact, plain, ours, again, strict=True)):
        assert torch.equal(one, other), place
        error, allowed = ((result.double() - truth).abs().max().item() for result in (one, theirs))
        assert error <= 2 * allowed + 4 * torch.finfo(one.dtype).eps * truth.abs().max().item(), (place, error, allowed)


@every_dtype
@pytest.mark.parametrize("vocabulary", [1, 7, 1001, 50257, 50304])
def test_cross_entropy(vocabulary: int, dtype: torch.dtype) -> None:
    values = normal(33, vocabulary, dtype=dtype, scale=4)
    values[3, : vocabulary // 2] = -torch.inf
    labels = torch.arange(33, device="cuda") * 1009 % vocabulary
    labels[3] = vocabulary - 1
    grad_losses = normal(33, dtype=torch.float64)
    grad_losses[5] = 0

    def answers(impl: str, at: torch.dtype) -> list[Tensor]:
        leaf = values.to(at).requires_grad_()
        losses = cross_entropy(leaf * 1, labels, impl=impl)
        return [losses.detach(), *torch.autograd.grad(losses, leaf, grad_losses.to(losses.dtype))]

    check(answers("reference", torch.float64), *(answers(impl, dtype) for impl in ("reference", "native", "native")))


@every_dtype
def test_cross_entropy_of_a_shard(dtype: torch.dtype) -> None:
    values = normal(20, 1005, dtype=dtype, scale=4)[:, 2:1003]
    labels = torch.arange(20, device="cuda") * 100
    for one, other in zip(
        statistics(values, labels, first_label=300, impl="native"), reference_statistics(values, labels, first_label=300), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    labels[7] = 5000
    assert cross_entropy(values, labels, first_label=300, impl="native")[7].isnan()


def test_cross_entropy_takes_no_second_array_of_the_size_of_the_logits() -> None:
    weight = torch.zeros((), device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.arange(2048, device="cuda")
    cross_entropy(torch.zeros(2048, 8, device="cuda") + weight.float(), labels % 8, impl="native").sum().backward()
    logits = torch.zeros(2048, 50304, device="cuda", dtype=torch.bfloat16).add_(weight)
    losses = cross_entropy(logits, labels, impl="native").sum()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(losses, logits)
    assert torch.cuda.max_memory_allocated() - before < 0.1 * logits.nbytes


@every_dtype
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1000, 3072), (67, 5), (1, 1), (3, 70, 64)], ids=str)
def test_bias_gelu(shape: tuple[int, ...], has_bias: bool, approximate: str, dtype: torch.dtype) -> None:
    values = [normal(*shape, dtype=dtype, scale=2), *([normal(shape[-1], dtype=dtype)] if has_bias else [])]
    grad_out = normal(*shape, dtype=dtype)

    def answers(impl: str, at: torch.dtype) -> list[Tensor]:
        leaves = [value.to(at).requires_grad_() for value in values]
        out = bias_gelu(leaves[0], leaves[1] if has_bias else None, approximate=approximate, impl=impl)  # type: ignore[arg-type]
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(at))]

    check(answers("reference", torch.float64), *(answers(impl, dtype) for impl in ("reference", "native", "native")))


@every_dtype
@pytest.mark.parametrize("mask_heads", [1, 3])
@pytest.mark.parametrize("keys", [1, 31, 333, 2048])
def test_masked_softmax(keys: int, mask_heads: int, dtype: torch.dtype) -> None:
    scores, grad = normal(2, 3, 65, keys, dtype=dtype, scale=3), normal(2, 3, 65, keys, dtype=dtype)
    is_read = normal(2, mask_heads, 65, keys, dtype=torch.float32) < 0.3
    is_read[:, :, 7] = False

    def answers(impl: str, at: torch.dtype) -> list[Tensor]:
        leaf = scores.to(at).requires_grad_()
        weights = masked_softmax(leaf, is_read, scale=0.3, impl=impl)
        return [weights.detach(), *torch.autograd.grad(weights, leaf, grad.to(at))]

    check(answers("reference", torch.float64), *(answers(impl, dtype) for impl in ("reference", "native", "native")))

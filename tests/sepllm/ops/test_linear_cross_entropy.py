"""The output matrix with its cross-entropy, chunk by chunk, against torch's two in one piece."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sepllm.ops.linear_cross_entropy import linear_cross_entropy

WIDTH, VOCABULARY = 12, 37


def inputs(tokens: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden, weight = (torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for rows in (tokens, VOCABULARY))
    labels = torch.randint(VOCABULARY, (tokens,), generator=generator)
    mask = (torch.rand(tokens, generator=generator) > 0.3).float()
    return hidden.requires_grad_(), weight.requires_grad_(), labels, mask / mask.sum().clamp(min=1)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    return (functional.cross_entropy(hidden @ weight.T, labels, reduction="none") * token_weights).sum()


@pytest.mark.parametrize("operators", ["native", "reference"])
@pytest.mark.parametrize(("tokens", "chunk"), [(1, 1), (16, 4), (17, 4), (5, 512), (0, 8)])
def test_loss_and_gradients_are_those_of_the_plain_way(tokens: int, chunk: int, operators: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEPLLM_OPS", operators)
    given = inputs(tokens)
    ours, wanted = linear_cross_entropy(*given, chunk=chunk), plain(*given)
    torch.testing.assert_close(ours, wanted, rtol=1e-13, atol=1e-13)
    for got, expected in zip(torch.autograd.grad(3 * ours, given[:2]), torch.autograd.grad(3 * wanted, given[:2]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_without_autograd_nothing_but_the_loss_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of parameters too, which say that they require a gradient."""
    monkeypatch.setattr("sepllm.ops.linear_cross_entropy._gradient", lambda *_: pytest.fail("a gradient was computed"))
    given = inputs(5)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(*given), plain(*given))


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_wanted_gradients_are_made(frozen: int) -> None:
    given = inputs(9)
    given[frozen].requires_grad_(False)
    linear_cross_entropy(*given, chunk=4).backward()
    assert given[frozen].grad is None
    moving = given[1 - frozen]
    wanted = torch.autograd.grad(plain(*given), moving)[0]
    torch.testing.assert_close(moving.grad, wanted, rtol=1e-12, atol=1e-14)


def test_without_gradients_the_loss_is_the_same() -> None:
    given = inputs(9)
    with torch.no_grad():
        alone = linear_cross_entropy(*given, chunk=4)
    assert not alone.requires_grad
    assert torch.equal(alone, linear_cross_entropy(*given, chunk=4).detach())


def test_a_second_backward_pass_raises() -> None:
    loss = linear_cross_entropy(*inputs(4))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivative_is_refused() -> None:
    hidden, *others = inputs(4)
    with pytest.raises(ValueError, match="linear_cross_entropy has no second derivative: leave create_graph out"):
        torch.autograd.grad(linear_cross_entropy(hidden, *others), hidden, create_graph=True)


def test_float32_is_as_close_as_the_plain_way() -> None:
    given = inputs(300, dtype=torch.float32)
    exact = plain(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in given)).item()
    ours, theirs = (abs(way(*given).item() - exact) for way in (linear_cross_entropy, plain))
    assert ours <= 4 * theirs + 1e-6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h, w, labels, weights: (h.bfloat16(), w.bfloat16(), labels, weights), "float32 or float64, but hidden is torch.bfloat16"),
        (lambda h, w, labels, weights: (h, w, labels + VOCABULARY, weights), "outside the vocabulary 0 .. 36"),
    ],
)
def test_wrong_input_is_a_sentence(change: Callable[..., tuple[Tensor, ...]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(*change(*inputs(4)))


def test_a_chunk_is_at_least_a_token() -> None:
    with pytest.raises(ValueError, match="chunk is 0"):
        linear_cross_entropy(*inputs(4), chunk=0)

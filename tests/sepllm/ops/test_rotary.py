"""Rotary embeddings on the packed projection: against their definition, as an operator of torch, and against what they must refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sepllm.ops.choice import Impl
from sepllm.ops.rotary import register, rotate_packed, split_packed
from sepllm.positions import apply_rotary, rotary_table

SHAPES = [(3, 3, 64, 16), (4, 2, 80, 20), (2, 1, 32, 32), (2, 2, 5, 2), (1, 1, 128, 64)]
"""Heads, key heads, head size, turned dimensions."""


def table(tokens: int, dims: int, *, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """With positions that repeat and jump, as BiPE's do."""
    positions = torch.randint(100, (batch, tokens), generator=torch.Generator().manual_seed(1))
    return rotary_table(positions, rotary_dims=dims, base=1e4, dtype=dtype)


def projection(tokens: int, heads: int, kv_heads: int, head_size: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, tokens, (heads + 2 * kv_heads) * head_size, dtype=torch.float64).to(dtype).requires_grad_()


def outputs_and_gradient(x: Tensor, cos: Tensor, sin: Tensor, *, impl: Impl, heads: int, kv_heads: int, head_size: int) -> list[Tensor]:
    parts = rotate_packed(x * 1, cos, sin, num_heads=heads, num_kv_heads=kv_heads, head_size=head_size, impl=impl)
    torch.manual_seed(2)
    grads = [torch.randn(part.shape, dtype=torch.float64).to(part.dtype) for part in parts]
    return [*(part.detach() for part in parts), *torch.autograd.grad(parts, x, grads)]


@pytest.mark.parametrize("tokens", [0, 1, 7, 70])
@pytest.mark.parametrize(("heads", "kv_heads", "head_size", "dims"), SHAPES)
def test_both_implementations_are_apply_rotary_on_q_and_k(heads: int, kv_heads: int, head_size: int, dims: int, tokens: int) -> None:
    x, (cos, sin) = projection(tokens, heads, kv_heads, head_size), table(tokens, dims)
    q, k, v = split_packed(x, num_heads=heads, num_kv_heads=kv_heads, head_size=head_size)
    wanted = [apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v]
    torch.manual_seed(2)
    wanted += torch.autograd.grad(wanted, x, [torch.randn_like(part) for part in wanted])
    for impl in ("native", "reference"):
        ours = outputs_and_gradient(x, cos, sin, impl=impl, heads=heads, kv_heads=kv_heads, head_size=head_size)
        for name, one, other in zip(("q", "k", "v", "gradient"), ours, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=lambda text, name=name, impl=impl: f"{impl} {name}: {text}")


@pytest.mark.parametrize("has_wide_table", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_is_rounded_once(dtype: torch.dtype, has_wide_table: bool) -> None:
    cos, sin = table(33, 16, dtype=torch.float32 if has_wide_table else dtype)
    x = projection(33, 3, 3, 64, dtype=dtype)
    parts = rotate_packed(x * 1, cos, sin, num_heads=3, num_kv_heads=3, head_size=64, impl="native")
    grads = [torch.randn_like(part) for part in parts]
    exact = x.detach().double().requires_grad_()
    wanted = rotate_packed(exact, cos.double(), sin.double(), num_heads=3, num_kv_heads=3, head_size=64, impl="reference")
    ours = [*parts, *torch.autograd.grad(parts, x, grads)]
    wanted = [*wanted, *torch.autograd.grad(wanted, exact, [grad.double() for grad in grads])]
    for name, one, other in zip(("q", "k", "v", "gradient"), ours, wanted, strict=True):
        torch.testing.assert_close(one, other.to(dtype), msg=lambda text, name=name: f"{name}: {text}", rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_results_are_views_of_the_projection_turned_in_place() -> None:
    x, (cos, sin) = projection(7, 3, 3, 64), table(7, 16)
    packed = x.detach().clone()
    parts = rotate_packed(packed, cos, sin, num_heads=3, num_kv_heads=3, head_size=64, impl="native")
    again = split_packed(packed, num_heads=3, num_kv_heads=3, head_size=64)
    assert all(one.data_ptr() == other.data_ptr() and torch.equal(one, other) for one, other in zip(parts, again, strict=True))


@pytest.mark.parametrize("layout", ["rows apart", "elements apart"])
def test_projection_and_gradients_may_be_strided(layout: str) -> None:
    x, (cos, sin) = projection(7, 3, 3, 64), table(7, 16)
    expected = outputs_and_gradient(x, cos, sin, impl="reference", heads=3, kv_heads=3, head_size=64)
    wide = torch.zeros(2, 7, 2, x.shape[-1], dtype=x.dtype) if layout == "rows apart" else torch.zeros(2, 7, x.shape[-1], 2, dtype=x.dtype)
    packed = wide[:, :, 1] if layout == "rows apart" else wide[..., 1]
    packed.copy_(x.detach())
    turned = rotate_packed(packed, cos, sin, num_heads=3, num_kv_heads=3, head_size=64, impl="native")
    for one, other in zip(turned, expected[:3], strict=True):
        torch.testing.assert_close(one, other)
    parts = rotate_packed(x * 1, cos, sin, num_heads=3, num_kv_heads=3, head_size=64, impl="native")
    torch.manual_seed(2)
    grads = [torch.randn_like(part) for part in parts]
    strided = [grad.transpose(1, 2).contiguous().transpose(1, 2) if layout == "rows apart" else grad.mT.contiguous().mT for grad in grads]
    torch.testing.assert_close(torch.autograd.grad(parts, x, strided)[0], expected[3])


def test_gradient_is_that_of_finite_differences() -> None:
    x, (cos, sin) = projection(3, 2, 1, 6), table(3, 4)
    assert torch.autograd.gradcheck(lambda x: rotate_packed(x * 1, cos, sin, num_heads=2, num_kv_heads=1, head_size=6, impl="native"), x)


def test_operators_keep_torchs_rules() -> None:
    register()
    x, (cos, sin) = projection(3, 2, 1, 6).detach(), table(3, 4)
    torch.library.opcheck(torch.ops.sepllm.rotate_packed.default, (x, cos, sin, 2, 1, 6))
    q, k, v = split_packed(x, num_heads=2, num_kv_heads=1, head_size=6)
    torch.library.opcheck(torch.ops.sepllm.rotate_packed_backward.default, (q, k, v, cos, sin))


class Layer(nn.Module):
    """As attention uses it: after a projection, whose output is a view."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projection = nn.Linear(8, 3 * 2 * 16)
        self.cos, self.sin = table(5, 8, dtype=torch.float32)

    def forward(self, x: Tensor, impl: Impl) -> Tensor:
        q, k, v = rotate_packed(self.projection(x), self.cos, self.sin, num_heads=2, num_kv_heads=2, head_size=16, impl=impl)
        return (q.sin() * k + v.cos()).sum()

    def gradients(self, x: Tensor, impl: Impl) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self(x, impl), (x, *self.parameters()))


def test_checkpointed_and_plain_layers_have_one_gradient() -> None:
    layer, x = Layer(), torch.randn(2, 5, 8, requires_grad=True)
    wanted = layer.gradients(x, "reference")
    again = torch.autograd.grad(checkpoint(layer, x, "native", use_reentrant=False), (x, *layer.parameters()))
    for one, two, other in zip(layer.gradients(x, "native"), again, wanted, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(two, other)


@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
def test_layer_compiles_into_one_graph(impl: Impl) -> None:
    layer, x = Layer(), torch.randn(2, 5, 8, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True)
    ours = torch.autograd.grad(compiled(x, impl), (x, *layer.parameters()))
    for one, other in zip(ours, layer.gradients(x, "reference"), strict=True):
        torch.testing.assert_close(one, other)


def test_results_that_nobody_reads_have_gradient_zero() -> None:
    x, (cos, sin) = projection(3, 2, 2, 6), table(3, 4)
    for part in range(3):
        ours, wanted = (
            torch.autograd.grad(rotate_packed(x * 1, cos, sin, num_heads=2, num_kv_heads=2, head_size=6, impl=impl)[part].sum(), x)[0]
            for impl in ("native", "reference")
        )
        torch.testing.assert_close(ours, wanted)


def test_whoever_needs_the_projections_values_is_refused_a_backward() -> None:
    x, (cos, sin) = projection(3, 2, 2, 6), table(3, 4)
    parts = rotate_packed(x.exp(), cos, sin, num_heads=2, num_kv_heads=2, head_size=6, impl="native")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        parts.q.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, r"packed is \[2, 3, 36\], but must be \[B, T, 42\] for 3 heads and 2 key heads of size 6"),
        ({"cos": torch.ones(2, 3, 2)}, r"must be \[B, T, R\] like packed"),
        ({"cos": torch.ones(2, 3, 3), "sin": torch.ones(2, 3, 3)}, "even R of at most 6"),
        ({"cos": torch.ones(2, 3, 4).half(), "sin": torch.ones(2, 3, 4).half()}, "cos and sin must be"),
        ({"packed": torch.ones(2, 3, 36, dtype=torch.int64)}, "packed must be float32, float64, bfloat16 or float16"),
        ({"packed": torch.ones(2, 3, 36, requires_grad=True)}, "packed is a leaf that requires a gradient"),
        ({"packed": torch.ones(1, 1, 36).expand(2, 3, 36)}, "more than one element of the written-to tensor"),
        ({"impl": "fast"}, "impl is 'fast': use auto, native or reference"),
        ({"packed": torch.ones(2, 3, 36, device="meta"), "impl": "native"}, "run on cpu and cuda, not on meta"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_a_sentence(change: dict[str, object], message: str) -> None:
    arguments = {
        "packed": torch.ones(2, 3, 36),
        "cos": torch.ones(2, 3, 4),
        "sin": torch.ones(2, 3, 4),
        "num_heads": 2,
        "num_kv_heads": 2,
        "impl": "native",
    }
    with pytest.raises((ValueError, RuntimeError), match=message):
        rotate_packed(**{**arguments, **change}, head_size=6)

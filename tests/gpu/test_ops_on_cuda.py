"""The compiled operators on a CUDA device: their definitions in plain torch, on the device's own numbers. `make test-gpu` runs them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sepllm.ops.choice import Impl
from sepllm.ops.layer_norm import Affine, layer_norm, two_layer_norms
from sepllm.ops.rotary import rotate_packed
from sepllm.positions import rotary_table

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def turned_and_gradient(x: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int, int], *, impl: Impl) -> list[Tensor]:
    num_heads, num_kv_heads, head_size = heads
    parts = rotate_packed(x * 1, cos, sin, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, impl=impl)
    torch.manual_seed(1)
    return [*(part.detach() for part in parts), *torch.autograd.grad(parts, x, [torch.randn_like(part) for part in parts])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_wide_angles", [False, True])
@pytest.mark.parametrize(("heads", "dims"), [((12, 12, 64), 16), ((4, 2, 80), 20), ((2, 1, 128), 128), ((2, 2, 5), 2)])
def test_rotary_is_its_definition(dtype: torch.dtype, has_wide_angles: bool, heads: tuple[int, int, int], dims: int) -> None:
    tokens, wide = 300, torch.promote_types(dtype, torch.float32)
    positions = torch.arange(tokens, device="cuda").expand(2, tokens)
    cos, sin = rotary_table(positions, rotary_dims=dims, base=1e4, dtype=wide if has_wide_angles else dtype)
    x = torch.randn(2, tokens, (heads[0] + 2 * heads[1]) * heads[2], device="cuda").to(dtype).requires_grad_()
    ours, again, wanted = (turned_and_gradient(x, cos, sin, heads, impl=impl) for impl in ("native", "native", "reference"))
    for name, one, two, other in zip(("q", "k", "v", "gradient"), ours, again, wanted, strict=True):
        assert torch.equal(one, two), name
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


def test_rotary_turns_strided_projections_and_gradients() -> None:
    positions = torch.arange(40, device="cuda").expand(2, 40)
    cos, sin = rotary_table(positions, rotary_dims=16, base=1e4, dtype=torch.float32)
    packed = torch.randn(2, 40, 577, device="cuda")[..., 1:]
    wanted = rotate_packed(packed.clone(), cos, sin, num_heads=3, num_kv_heads=3, head_size=64, impl="reference")
    ours = rotate_packed(packed, cos, sin, num_heads=3, num_kv_heads=3, head_size=64, impl="native")
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other)


def norms_and_gradients(tensors: list[Tensor], *, impl: Impl) -> list[Tensor]:
    outs = two_layer_norms(tensors[0], Affine(*tensors[1:3]), Affine(*tensors[3:]), epsilon=1e-5, impl=impl)
    torch.manual_seed(1)
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, tensors, [torch.randn_like(out) for out in outs])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_wide_parameters", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(0, 768), (1, 1), (5, 7), (2000, 768), (300, 1000), (700, 2048), (3000, 80)])
def test_norms_err_at_most_twice_as_much_as_torchs_and_their_bits_repeat(dtype: torch.dtype, has_wide_parameters: bool, rows: int, size: int) -> None:
    torch.manual_seed(0)
    x = (torch.randn(rows, size, device="cuda") + 1).to(dtype).requires_grad_()
    of_parameters = torch.promote_types(dtype, torch.float32) if has_wide_parameters else dtype
    tensors = [x, *(torch.randn(size, device="cuda").to(of_parameters).requires_grad_() for _ in range(4))]
    results = [norms_and_gradients(tensors, impl=impl) for impl in ("native", "native", "reference")]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in tensors]
    outs = two_layer_norms(exact_inputs[0], Affine(*exact_inputs[1:3]), Affine(*exact_inputs[3:]), epsilon=1e-5, impl="reference")
    torch.manual_seed(1)
    grads = [torch.randn_like(out).double() for out in results[0][:2]]
    exact = [*outs, *torch.autograd.grad(outs, exact_inputs, grads)]
    for name, exactly, one, two, theirs in zip(("first", "second", "dx", "dw1", "db1", "dw2", "db2"), exact, *results, strict=True):
        assert torch.equal(one, two), name
        if exactly.numel():
            error, allowed = ((result.double() - exactly).abs().max().item() for result in (one, theirs))
            rounding = 1e-10 if dtype == torch.float64 else 8 * torch.finfo(one.dtype).eps  # the exact is float64 itself
            assert error <= 2 * allowed + rounding * max(1.0, exactly.abs().max().item()), name


def test_row_too_long_for_the_kernels_is_refused() -> None:
    x = torch.ones(2, 20_000, device="cuda")
    with pytest.raises(ValueError, match="20000 elements are too many for them: use impl='reference'"):
        layer_norm(x, x[0], x[0], epsilon=1e-5, impl="native")


def test_automatic_choice_is_plain_torch() -> None:
    """Until this file has passed on a device of the architecture, and that is committed."""
    x = torch.randn(3, 768, device="cuda")
    weight, bias = torch.randn(2, 768, device="cuda")
    assert torch.equal(layer_norm(x, weight, bias, epsilon=1e-5), torch.nn.functional.layer_norm(x, (768,), weight, bias, 1e-5))


def test_layer_compiles_into_one_graph() -> None:
    torch.manual_seed(0)
    projection = torch.nn.Linear(768, 3 * 12 * 64, device="cuda")
    cos, sin = rotary_table(torch.arange(64, device="cuda").expand(2, 64), rotary_dims=16, base=1e4, dtype=torch.float32)
    affine = Affine(torch.randn(768, device="cuda"), torch.randn(768, device="cuda"))
    x = torch.randn(2, 64, 768, device="cuda", requires_grad=True)

    def loss(x: Tensor, impl: Impl) -> Tensor:
        first, second = two_layer_norms(x, affine, affine, epsilon=1e-5, impl=impl)
        q, k, v = rotate_packed(projection(first), cos, sin, num_heads=12, num_kv_heads=12, head_size=64, impl=impl)
        return (q.sin() * k * v).sum() + second.cos().sum()

    ours = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, "native"), (x, *projection.parameters()))
    for one, other in zip(ours, torch.autograd.grad(loss(x, "reference"), (x, *projection.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)

"""Cross-entropy against torch's own in float64, over shards, as an operator of torch, and by the memory that it takes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sepllm.ops.cross_entropy import Statistics, cross_entropy, reference_gradient, reference_statistics, register, statistics, write_gradient_


def unchanged(*sums: Tensor) -> tuple[Tensor, ...]:
    """The reduction over one rank: the way of a shard through the code, of the whole vocabulary."""
    return sums


WAYS = {
    "native": {"impl": "native"},
    "native, as a shard": {"impl": "native", "reduce": unchanged},
    "reference": {"impl": "reference"},
    "reference, as a shard": {"impl": "reference", "reduce": unchanged},
}
every_way = pytest.mark.parametrize("way", list(WAYS))
both = pytest.mark.parametrize("impl", ["native", "reference"])


def rows(vocabulary: int, *, count: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(count, vocabulary, generator=generator, dtype=torch.float64) * 4
    return logits.to(dtype), torch.randint(vocabulary, (count,), generator=generator)


def computed(logits: Tensor) -> Tensor:
    """Logits as a model hands them over: made by an operation."""
    return logits.clone()


def losses_and_gradient(logits: Tensor, labels: Tensor, grad_losses: Tensor, *, way: str = "native") -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    losses = cross_entropy(computed(leaf), labels, **WAYS[way])
    return losses.detach(), torch.autograd.grad(losses, leaf, grad_losses)[0]


def of_torch(logits: Tensor, labels: Tensor, grad_losses: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    wide = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
    losses = functional.cross_entropy(wide, labels, reduction="none")
    return losses.detach(), torch.autograd.grad(losses, leaf, grad_losses)[0]


def combined(shards: list[Statistics]) -> Statistics:
    """What all-reduces over the ranks compute."""
    maximum = torch.stack([shard.maximum for shard in shards]).amax(0)
    total = sum(shard.total * (shard.maximum - maximum).exp() for shard in shards)
    target = sum(shard.target for shard in shards)
    assert isinstance(total, Tensor)
    assert isinstance(target, Tensor)
    return Statistics(maximum, total, target)


@every_way
@pytest.mark.parametrize("vocabulary", [1, 7, 8, 64, 100, 2048, 2049, 5003])
def test_losses_and_gradient_are_torchs(vocabulary: int, way: str) -> None:
    logits, labels = rows(vocabulary)
    grad_losses = torch.randn(5, dtype=torch.float64)
    ours, wanted = losses_and_gradient(logits, labels, grad_losses, way=way), of_torch(logits, labels, grad_losses)
    for name, one, other in zip(("losses", "gradient"), ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("vocabulary", [7, 1001, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_torchs(dtype: torch.dtype, vocabulary: int) -> None:
    logits, labels = rows(vocabulary, dtype=dtype, count=12)
    grad_losses = torch.randn(12)
    exact = of_torch(logits.double(), labels, grad_losses.double())
    ours, theirs = losses_and_gradient(logits, labels, grad_losses), of_torch(logits, labels, grad_losses)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    for name, truth, one, other in zip(("losses", "gradient"), exact, ours, theirs, strict=True):
        error, allowed = ((result.double() - truth).abs().max().item() for result in (one, other))
        assert error <= 2 * allowed + 1e-7 * truth.abs().max().item(), (name, error, allowed)


@every_way
def test_only_logit_of_a_row_costs_nothing(way: str) -> None:
    losses, gradient = losses_and_gradient(torch.tensor([[3.25]]), torch.tensor([0]), torch.ones(1), way=way)
    assert losses.item() == gradient.item() == 0


@every_way
def test_no_rows_are_no_losses(way: str) -> None:
    losses, gradient = losses_and_gradient(torch.zeros(0, 7), torch.zeros(0, dtype=torch.long), torch.zeros(0), way=way)
    assert losses.shape == (0,)
    assert gradient.shape == (0, 7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics_of_a_shard_are_the_references(dtype: torch.dtype) -> None:
    logits, labels = rows(5003, dtype=dtype, count=20)
    for ours, wanted in zip(statistics(logits, labels - 300, first_label=9), reference_statistics(logits, labels - 300, first_label=9), strict=True):
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=0)


@both
@pytest.mark.parametrize("cuts", [(0, 100), (0, 37, 100), (0, 1, 2, 99, 100)], ids=str)
def test_shards_together_are_the_whole(cuts: tuple[int, ...], impl: str) -> None:
    logits, labels = rows(100, count=30)
    logits[3, :37] = logits[4, 37:] = -torch.inf
    labels[3], labels[4] = 60, 20
    grad_losses = torch.randn(30, dtype=torch.float64)
    bounds = list(pairwise(cuts))
    whole = combined([statistics(logits[:, lo:hi], labels, first_label=lo, impl=impl) for lo, hi in bounds])
    losses, gradients = [], []
    for lo, hi in bounds:
        leaf = logits[:, lo:hi].clone().requires_grad_()
        losses.append(cross_entropy(computed(leaf), labels, reduce=lambda *_: whole, first_label=lo, impl=impl))
        gradients.append(torch.autograd.grad(losses[-1], leaf, grad_losses)[0])
    wanted = of_torch(logits, labels, grad_losses)
    for loss in losses:
        torch.testing.assert_close(loss, wanted[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.cat(gradients, 1), wanted[1], rtol=1e-12, atol=1e-13)


def test_label_outside_the_shard_has_target_zero() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]]).expand(4, 3)
    assert statistics(logits, torch.tensor([9, 10, 12, 13]), first_label=10).target.tolist() == [0, 1, 3, 0]


@both
@pytest.mark.parametrize("label", [-100, -1, 7])
def test_label_outside_the_whole_vocabulary_is_an_error(label: int, impl: str) -> None:
    logits, labels = rows(7)
    labels[2] = label
    with pytest.raises(ValueError, match=rf"labels\[2\] is {label}, outside the vocabulary 0 .. 6"):
        cross_entropy(logits, labels, impl=impl)


# --- logits of any content ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_huge_logits_do_not_overflow(dtype: torch.dtype) -> None:
    logits = torch.tensor([[6e4, -6e4, 5.9e4, 0.0]] * 2).to(dtype)
    labels, grad_losses = torch.tensor([0, 1]), torch.ones(2)
    ours, wanted = losses_and_gradient(logits, labels, grad_losses), of_torch(logits, labels, grad_losses)
    for one, other in zip(ours, wanted, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other)


@every_way
def test_logit_of_minus_infinity_has_probability_zero(way: str) -> None:
    logits, labels = rows(100)
    logits[:, 10:70] = -torch.inf
    labels[:] = 5
    grad_losses = torch.ones(5, dtype=torch.float64)
    ours, wanted = losses_and_gradient(logits, labels, grad_losses, way=way), of_torch(logits, labels, grad_losses)
    assert not ours[1][:, 10:70].any()
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@both
@pytest.mark.parametrize("place", [0, 50, 99])
@pytest.mark.parametrize("rest", [0.0, -torch.inf])
def test_nan_shows_in_its_row_alone(place: int, rest: float, impl: str) -> None:
    """A run that diverges must be seen to diverge, whatever the other logits of the shard are."""
    logits = torch.full((3, 100), rest)
    logits[:, 3] = 1
    logits[1] = rest
    logits[1, place] = torch.nan
    losses, gradient = losses_and_gradient(logits, torch.tensor([3, 3, 3]), torch.ones(3), way=impl)
    assert losses.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]
    assert statistics(logits[1:2], torch.tensor([3]), impl=impl).total.isnan().all()


@both
def test_row_without_a_finite_logit_is_nan_like_torchs_and_adds_nothing_as_a_shard(impl: str) -> None:
    logits = torch.full((1, 20), -torch.inf)
    assert losses_and_gradient(logits, torch.tensor([3]), torch.ones(1), way=impl)[0].isnan().all()
    maximum, total, _ = statistics(logits, torch.tensor([3]), impl=impl)
    assert maximum.item() == -torch.inf
    assert total.item() == 0


@pytest.mark.parametrize("way", ["native", "reference, as a shard"])
def test_row_whose_loss_is_masked_gets_zeros_whatever_it_holds(way: str) -> None:
    logits, labels = rows(100)
    logits[2] = torch.nan
    grad_losses = torch.tensor([1.0, 0.0, 0.0, -0.0, 2.0], dtype=torch.float64)
    _, gradient = losses_and_gradient(logits, labels, grad_losses, way=way)
    assert gradient.any(1).tolist() == [True, False, False, False, True]


# --- memory ---


def test_gradient_is_written_over_the_logits() -> None:
    leaf = rows(100)[0].requires_grad_()
    logits = computed(leaf)
    place = logits.data_ptr()
    gradients: list[Tensor] = []
    logits.register_hook(gradients.append)
    cross_entropy(logits, rows(100)[1]).sum().backward()
    assert gradients[0].data_ptr() == place
    assert torch.equal(logits.detach(), gradients[0])
    assert leaf.grad is not None
    assert leaf.grad.data_ptr() != leaf.data_ptr()


PEAK = """
import ctypes, re, sys
from pathlib import Path
import torch
from sepllm.ops.cross_entropy import cross_entropy

dtype, impl = getattr(torch, sys.argv[1]), sys.argv[2]
ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed goes back at once

def peak():  # not getrusage, which also counts what the parent held
    return 1024 * int(re.search(r"VmHWM:\\s*([0-9]+)", Path("/proc/self/status").read_text())[1])

def run(count):
    weight = torch.zeros((), dtype=dtype, requires_grad=True)
    logits = torch.empty(count, 50304, dtype=dtype).normal_().add_(weight)
    labels = torch.arange(count)
    before = peak()
    cross_entropy(logits, labels, impl=impl).sum().backward()
    return (peak() - before) / (logits.numel() * logits.element_size())

run(8)
print(run(400))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the largest resident size")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_and_backward_take_no_second_array_of_the_size_of_the_logits(dtype: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}

    def growth(impl: str) -> float:
        command = [sys.executable, "-c", PEAK, dtype, impl]
        return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    assert growth("native") < 0.1
    assert growth("reference") > 0.9  # so that the measure measures


def test_leaf_and_a_view_of_one_keep_their_values() -> None:
    values, labels = rows(100)
    leaf = values.clone().requires_grad_()
    cross_entropy(leaf, labels).sum().backward()
    assert torch.equal(leaf.detach(), values)
    by_leaf, leaf.grad = leaf.grad, None
    cross_entropy(leaf.view(5, 100), labels).sum().backward()
    assert torch.equal(leaf.detach(), values)
    assert by_leaf is not None
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, by_leaf)


def test_gradient_is_the_same_in_place_and_beside_the_logits() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        logits, labels = rows(1001, dtype=dtype)
        maximum, total, _ = statistics(logits, labels)
        grad_losses = torch.randn_like(total)
        beside = torch.ops.sepllm.cross_entropy_gradient(logits, labels, maximum, total, grad_losses, 0)
        torch.testing.assert_close(beside, reference_gradient(logits, labels, maximum, total, grad_losses))
        version = logits._version
        assert write_gradient_(logits, labels, maximum, total, grad_losses) is logits
        assert logits._version > version
        assert torch.equal(logits, beside)


def test_second_backward_over_overwritten_logits_raises() -> None:
    leaf = rows(100)[0].requires_grad_()
    losses = cross_entropy(computed(leaf), rows(100)[1]).sum()
    losses.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.backward()


def test_whoever_else_saved_the_logits_is_told() -> None:
    leaf = rows(100)[0].requires_grad_()
    logits = computed(leaf)
    squares = (logits**2).sum()
    cross_entropy(logits, rows(100)[1]).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_logits_that_are_used_twice_get_both_gradients() -> None:
    values, labels = rows(100)
    leaf, exact = values.clone().requires_grad_(), values.clone().requires_grad_()
    logits = computed(leaf)
    (cross_entropy(logits, labels).sum() + 3 * logits.sum()).backward()
    (functional.cross_entropy(exact, labels, reduction="sum") + 3 * exact.sum()).backward()
    torch.testing.assert_close(leaf.grad, exact.grad)


@pytest.mark.parametrize("way", ["native", "reference, as a shard"])
def test_second_derivative_is_refused(way: str) -> None:
    leaf = rows(7)[0].requires_grad_()
    losses = cross_entropy(computed(leaf), rows(7)[1], **WAYS[way]).sum()
    with pytest.raises(ValueError, match="no second derivative"):
        torch.autograd.grad(torch.autograd.grad(losses, leaf, create_graph=True)[0].sum(), leaf)


def test_rows_with_strides_are_the_rows_without() -> None:
    logits, labels = rows(100)
    grad_losses = torch.randn(5, dtype=torch.float64)
    wanted = losses_and_gradient(logits, labels, grad_losses)
    wider = torch.full((5, 130), torch.nan, dtype=torch.float64)
    strided = [wider[:, :100], torch.empty(100, 5, dtype=torch.float64).t(), torch.empty(5, 300, dtype=torch.float64)[:, ::3]]
    for view in strided:
        view.copy_(logits)
        read = statistics(view, torch.stack([labels, labels], 1)[:, 0])
        torch.testing.assert_close(read.maximum - read.target + read.total.log(), wanted[0])
        write_gradient_(view, labels, read.maximum, read.total, grad_losses)
        assert torch.equal(view, wanted[1])
    assert wider[:, 100:].isnan().all()


def test_rows_that_share_memory_are_not_written_on() -> None:
    leaf = torch.randn(100, dtype=torch.float64, requires_grad=True)
    labels = rows(100)[1]
    ours = torch.autograd.grad(cross_entropy((leaf * 1).expand(5, 100), labels).sum(), leaf)[0]
    wanted = torch.autograd.grad(functional.cross_entropy((leaf * 1).expand(5, 100), labels, reduction="sum"), leaf)[0]
    torch.testing.assert_close(ours, wanted)
    with pytest.raises(RuntimeError, match="single memory location"):
        write_gradient_(torch.zeros(100).expand(5, 100), labels, *torch.ones(3, 5))


def test_fresh_memory_of_any_content_never_shows_and_threads_do_not_matter() -> None:
    logits, labels = rows(5003, count=40, dtype=torch.float32)
    grad_losses = torch.randn(40)
    wanted = losses_and_gradient(logits, labels, grad_losses)
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            ours = losses_and_gradient(logits, labels, grad_losses)
            assert all(torch.equal(one, other) for one, other in zip(ours, wanted, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def test_loss_scale_scales_the_gradient_before_it_is_rounded() -> None:
    """In half precision most gradients of a mean are below the smallest number; what the scale is for."""
    logits, labels = rows(5003, dtype=torch.float16)
    tiny = losses_and_gradient(logits, labels, torch.full((5,), 2.0**-20))[1]
    scaled = losses_and_gradient(logits, labels, torch.full((5,), 2.0**-4))[1]
    exact = of_torch(logits.double(), labels, torch.full((5,), 2.0**-4, dtype=torch.float64))[1]
    assert tiny.count_nonzero() < scaled.count_nonzero()
    torch.testing.assert_close(scaled.double(), exact, rtol=1e-3, atol=2.0**-25)


# --- as an operator of torch ---


def test_gradient_is_that_of_finite_differences() -> None:
    logits, labels = rows(9)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels), logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_operators_keep_torchs_rules(dtype: torch.dtype) -> None:
    register()
    logits, labels = rows(9, dtype=dtype)
    maximum, total, target = statistics(logits, labels)
    operators = torch.ops.sepllm
    torch.library.opcheck(operators.cross_entropy_statistics.default, (logits, labels, 0, True))
    torch.library.opcheck(operators.cross_entropy_gradient.default, (logits, labels, maximum, total, total, 0))
    torch.library.opcheck(operators.cross_entropy_write_gradient.default, (logits.clone(), labels, maximum, total, total, 0))
    torch.library.opcheck(operators.cross_entropy_losses.default, (logits.requires_grad_(), labels, maximum, total, target, 0))


@every_way
@pytest.mark.parametrize("is_leaf", [True, False])
def test_compiles_into_one_graph(way: str, is_leaf: bool) -> None:
    torch.compiler.reset()
    values, labels = rows(100, dtype=torch.float32)

    def mean(leaf: Tensor) -> Tensor:
        logits = leaf if is_leaf else leaf * 1
        return cross_entropy(logits, labels, **WAYS[way]).mean()

    for dynamic in (False, True):
        leaf, exact = values.clone().requires_grad_(), values.clone().requires_grad_()
        torch.compile(mean, fullgraph=True, backend="aot_eager", dynamic=dynamic)(leaf).backward()
        functional.cross_entropy(exact, labels).backward()
        torch.testing.assert_close(leaf.grad, exact.grad)
        assert torch.equal(leaf.detach(), values)


def test_writing_on_logits_compiles_into_one_graph() -> None:
    logits, labels = rows(100, dtype=torch.float32)
    maximum, total, _ = statistics(logits, labels)
    wanted = reference_gradient(logits, labels, maximum, total, total)
    torch.compile(write_gradient_, fullgraph=True, backend="aot_eager")(logits, labels, maximum, total, total)
    torch.testing.assert_close(logits, wanted)


def test_what_does_not_fit_is_refused() -> None:
    logits, labels = rows(7)
    with pytest.raises(ValueError, match=r"must be \[T, V\] and int64 \[T\]"):
        cross_entropy(logits, labels[:4])
    with pytest.raises(ValueError, match=r"must be \[T, V\] and int64 \[T\]"):
        cross_entropy(logits, labels.int())
    with pytest.raises(ValueError, match="logits must be float32, float64, bfloat16 or float16, but is Long"):
        cross_entropy(logits.long(), labels)
    with pytest.raises(ValueError, match="impl is 'fast': use auto, native or reference"):
        cross_entropy(logits, labels, impl="fast")
    with pytest.raises(ValueError, match=r"must be Float \[5\] on cpu, but one is Double"):
        write_gradient_(logits.float(), labels, *torch.ones(3, 5, dtype=torch.float64))


# --- the arithmetic that the CUDA kernel uses, as host C++ ---

HOST = """
#include "cross_entropy_math.h"
using namespace sepllm;

extern "C" void statistics(const float* x, int64_t count, float* maximum, float* total) {
  RowSum<float> sums[3] = {empty_sum<float>(), empty_sum<float>(), empty_sum<float>()};  // as three threads would
  for (int64_t i = 0; i < count; i += 4) {
    float some[4];
    for (int64_t j = 0; j < 4; ++j) some[j] = i + j < count ? x[i + j] : -INFINITY;
    sums[i / 4 % 3] = added(sums[i / 4 % 3], some);
  }
  const RowSum<float> all = merged(merged(sums[0], sums[1]), sums[2]);
  *maximum = all.maximum;
  *total = all.total;
}

extern "C" void gradient(const float* x, int64_t count, float maximum, float total, float grad, int64_t column, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = gradient_of(x[i], maximum, grad / total, grad, is_column(column, count) && i == column);
}
"""


def test_arithmetic_of_the_cuda_kernel_is_the_references(host_library: Callable[[str], ctypes.CDLL]) -> None:
    library = host_library(HOST)
    logits, labels = rows(1001, dtype=torch.float32, count=6)
    logits[1, :500] = -torch.inf
    logits[2] = -torch.inf
    logits[3, 7] = torch.nan
    logits[4] *= 1e4
    wanted = reference_statistics(logits, labels)
    maximum, total, gradient = torch.empty(6), torch.empty(6), torch.empty_like(logits)

    def at(tensor: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    for row in range(6):
        library.statistics(at(logits[row]), ctypes.c_int64(1001), at(maximum[row]), at(total[row]))
        sums = (ctypes.c_float(maximum[row].item()), ctypes.c_float(total[row].item()), ctypes.c_float(0.5))
        library.gradient(at(logits[row]), ctypes.c_int64(1001), *sums, ctypes.c_int64(int(labels[row])), at(gradient[row]))
    real = torch.tensor([0, 1, 2, 4, 5])
    torch.testing.assert_close(maximum[real], wanted.maximum[real])
    torch.testing.assert_close(total, wanted.total, equal_nan=True)
    exact = reference_gradient(logits, labels, *wanted[:2], torch.full((6,), 0.5))
    torch.testing.assert_close(gradient, exact, equal_nan=True)

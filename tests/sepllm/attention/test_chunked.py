"""What is special about the chunked core: its two operators, where it reads sizes, and copies of it that come with checkpoints."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sepllm.attention import PositionBias, attend, chunked
from sepllm.hf.bundle import bundle_texts
from sepllm.layout import KeyRanges, TokenLayout
from sepllm.pattern import AttentionPattern, Standard

LENGTH = chunked.CHUNK + 13


def random_ranges(*, has_padding: bool = False) -> KeyRanges:
    ids = torch.randint(6, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, : 20 if has_padding else 0] = 0
    return TokenLayout.from_ids(ids, AttentionPattern(initial_tokens=2, separator_ids=(1,), windows=(9,)), attention_mask=mask).ranges(0)


def random_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, LENGTH, heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2))
    return q, k, v


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_operators_keep_torchs_rules(has_padding: bool, has_bias: bool) -> None:
    ranges = random_ranges(has_padding=has_padding)
    chunked.prepare(ranges)
    prepared = ranges.derived["chunked"]
    assert (prepared.unread is not None) == has_padding
    positions = torch.arange(LENGTH).expand(2, -1)
    bias = (torch.rand(4), positions, positions) if has_bias else (None, None, None)
    call = (ranges.index, ranges.far_lo, ranges.far_hi, ranges.band_lo, ranges.band_hi, prepared.chunks, prepared.unread, *bias, 0.3)
    inputs = random_inputs()
    torch.library.opcheck(chunked._forward, (*inputs, *call))
    values = [tensor.detach() for tensor in inputs]
    torch.library.opcheck(chunked._backward, (torch.ones_like(values[0]), *values, *call))


def test_second_derivative_is_refused() -> None:
    q, k, v = random_inputs()
    out = attend(q, k, v, random_ranges(), scale=0.3, core="chunked")
    (first,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(ValueError, match="core chunked has no second derivative: use core dense"):
        first.sum().backward()


def test_sizes_are_read_on_the_cpu_where_the_ranges_were_made() -> None:
    here = random_ranges(has_padding=True)
    there = here.to("meta")  # whoever reads a number from such a tensor fails
    chunked.prepare(here)
    chunked.prepare(there)
    assert torch.equal(there.derived["chunked"].chunks, here.derived["chunked"].chunks)
    assert there.derived["chunked"].unread.device.type == "meta"


@pytest.fixture
def copy_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The chunked core as a checkpoint folder carries it, beside the installed one."""
    folder = tmp_path / "a_checkpoint"
    folder.mkdir()
    for name, text in {"__init__": "", **bundle_texts()}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("a_checkpoint.sepllm_attention_chunked")
    for name in [name for name in sys.modules if name.split(".")[0] == "a_checkpoint"]:
        del sys.modules[name]


def test_copy_that_came_with_a_checkpoint_has_operators_of_its_own(copy_of_a_checkpoint: ModuleType) -> None:
    assert copy_of_a_checkpoint.NAMESPACE == "a_checkpoint_sepllm_attention_chunked"
    answers = []
    for module in (chunked, copy_of_a_checkpoint, importlib.reload(copy_of_a_checkpoint), chunked):
        ranges, inputs = random_ranges(), random_inputs()
        module.prepare(ranges)
        out = module.attention(*inputs, ranges, scale=0.3, softmax=Standard(), bias=None, dropout=0.0)
        answers.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for answer in answers[1:]:
        for ours, theirs in zip(answer, answers[0], strict=True):
            assert torch.equal(ours, theirs)


def test_keys_beyond_the_buckets_last_used_column_cost_nothing() -> None:
    """Ranges made on an accelerator list as many far columns as there are keys: the unused ones change no bit."""
    ranges, inputs = random_ranges(), random_inputs()
    positions = torch.arange(LENGTH).expand(2, -1)
    bias = PositionBias(slopes=torch.rand(4), query_positions=positions, key_positions=positions)
    wide = KeyRanges(
        index=torch.nn.functional.pad(ranges.index, (0, 300)),
        far_lo=ranges.far_lo,
        far_hi=ranges.far_hi,
        band_lo=ranges.band_lo,
        band_hi=ranges.band_hi,
        num_keys=ranges.num_keys,
        longest_band=ranges.longest_band,
    )
    ours, theirs = (attend(*inputs, these, scale=0.3, core="chunked", bias=bias) for these in (wide, ranges))
    assert torch.equal(ours, theirs)
    for wide_gradient, gradient in zip(torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(theirs.sum(), inputs), strict=True):
        assert torch.equal(wide_gradient, gradient)

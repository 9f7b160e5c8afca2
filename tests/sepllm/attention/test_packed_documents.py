"""Packed documents that are kept apart, in every core: what each one gets is what it gets alone.

To the last bit it does not depend on what the others hold. Beside the document in a row of its own there is a difference of rounding, in
every core: where a document begins in a row moves the borders of blocks, and so the order of the sums.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sepllm.attention import PositionBias, attend, choose_core, core_names
from sepllm.attention.registry import spec_of
from sepllm.layout import TokenLayout
from sepllm.pattern import UNBOUNDED, AttentionPattern, SelfAdjust, Softmax, Standard
from sepllm.positions import Positions, alibi_slopes

SEPARATORS = (1, 2)
DOCUMENT_END = 3
LENGTHS = (1, 70, 33, 65, 5)
EDGES = tuple(sum(LENGTHS[:count]) for count in range(len(LENGTHS) + 1))
SOFTMAXES: dict[str, Softmax] = {
    "standard": Standard(),
    "normalised": SelfAdjust(kind="normalised", denominator_bias=1e-3),
    "normalised over causal keys": SelfAdjust(kind="normalised", extremes="causal"),
    "raw": SelfAdjust(kind="raw"),
}

pytestmark = [
    pytest.mark.parametrize("core", core_names()),
    pytest.mark.parametrize("window", [4, UNBOUNDED]),
    pytest.mark.parametrize("softmax", SOFTMAXES.values(), ids=list(SOFTMAXES)),
    pytest.mark.parametrize("bias", [None, "alibi", "bilevel"]),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    core: str
    pattern: AttentionPattern
    bias: str | None

    def results(self, inputs: list[Tensor], ids: Tensor, *, document_end_id: int | None = None) -> list[Tensor]:
        """Output and the gradients of q, k and v, for ``inputs``: q, k, v and the gradient of the output. None of them where the core refuses."""
        q, k, v = (tensor.clone().requires_grad_() for tensor in inputs[:3])
        layout = TokenLayout.from_ids(ids, self.pattern, document_end_id=document_end_id)
        ranges, softmax, bias = layout.ranges(0), self.pattern.softmax, self._bias(layout)
        try:
            choose_core(spec_of(q, ranges, softmax=softmax, bias=bias, needs_grad=True), self.core)
        except ValueError as refusal:
            with pytest.raises(ValueError, match=re.escape(str(refusal))):
                attend(q, k, v, ranges, scale=0.35, core=self.core, softmax=softmax, bias=bias)
            return []
        out = attend(q, k, v, ranges, scale=0.35, core=self.core, softmax=softmax, bias=bias)
        out.backward(inputs[3])
        gradients = [tensor.grad for tensor in (q, k, v) if tensor.grad is not None]
        return [out.detach(), *gradients]

    def _bias(self, layout: TokenLayout) -> PositionBias | None:
        if self.bias is None:
            return None
        positions = Positions.of(layout, segment_end_ids=SEPARATORS if self.bias == "bilevel" else None)
        return PositionBias(slopes=alibi_slopes(4), query_positions=positions.queries, key_positions=positions.keys)


def packed_ids() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    is_separator = torch.rand(1, EDGES[-1], generator=generator) < 0.2
    ids = torch.where(is_separator, torch.randint(1, 3, (1, EDGES[-1]), generator=generator), 9)
    ids[0, [edge - 1 for edge in EDGES[1:]]] = DOCUMENT_END
    return ids


def random_inputs(seed: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output: four heads, two of keys and values."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, EDGES[-1], heads, 8, generator=generator, dtype=torch.float64).to(dtype) for heads in (4, 2, 2, 4)]


def test_packed_documents_get_what_they_get_alone(core: str, window: int, softmax: Softmax, bias: str | None) -> None:
    case = Case(core=core, pattern=AttentionPattern(initial_tokens=2, separator_ids=SEPARATORS, windows=(window,), softmax=softmax), bias=bias)
    ids, inputs = packed_ids(), random_inputs(1, torch.float64)
    together = case.results(inputs, ids, document_end_id=DOCUMENT_END)
    alone = [case.results([tensor[:, first:end] for tensor in inputs], ids[:, first:end]) for first, end in pairwise(EDGES)]
    for name, ours, parts in zip(("out", "dq", "dk", "dv"), together, zip(*alone, strict=True), strict=False):
        torch.testing.assert_close(ours, torch.cat(parts, 1), rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_what_other_documents_hold_changes_no_bit(core: str, window: int, softmax: Softmax, bias: str | None) -> None:
    case = Case(core=core, pattern=AttentionPattern(initial_tokens=2, separator_ids=SEPARATORS, windows=(window,), softmax=softmax), bias=bias)
    ids, first, second = packed_ids(), random_inputs(1, torch.float32), random_inputs(2, torch.float32)
    here = slice(EDGES[2], EDGES[3])
    for mine, others in zip(first, second, strict=True):
        others[:, here] = mine[:, here]
    for name, ours, theirs in zip(
        ("out", "dq", "dk", "dv"), *(case.results(given, ids, document_end_id=DOCUMENT_END) for given in (first, second)), strict=False
    ):
        assert torch.equal(ours[:, here], theirs[:, here]), name

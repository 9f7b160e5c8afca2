from __future__ import annotations

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.data.batch import Batch
from sepllm.layout import TokenLayout
from sepllm.pattern import AttentionPattern

PATTERN = AttentionPattern(initial_tokens=1, separator_ids=(5,), windows=(2, 4, 2))
TEXT = torch.tensor([[7, 5, 0, 3, 5, 2], [0, 1, 2, 3, 4, 5]])


def test_labels_are_the_next_tokens_and_all_count() -> None:
    batch = Batch.from_rows(TEXT, PATTERN)
    assert batch.ids.tolist() == TEXT[:, :-1].tolist()
    assert batch.labels.tolist() == TEXT[:, 1:].tolist()
    assert batch.loss_mask.tolist() == [[1.0] * 5] * 2
    assert (batch.ids.dtype, batch.labels.dtype, batch.loss_mask.dtype) == (torch.int64, torch.int64, torch.float32)


class Copies(TorchDispatchMode):
    """Notes the tensors that operators make as copies of others."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_dispatch__(
        self, function: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        made = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy):
            self.made.append(made)
        return made


def test_of_the_rows_only_the_inputs_are_copied_as_they_are() -> None:
    with Copies() as copies:
        batch = Batch.from_rows(TEXT, PATTERN)
    assert [tensor is batch.ids for tensor in copies.made if tensor.dtype == torch.int64] == [True]
    assert batch.ids.is_contiguous()
    assert batch.labels.is_contiguous()


def test_eod_mask_loss_hides_what_follows_the_end_of_a_document() -> None:
    batch = Batch.from_rows(TEXT, PATTERN, masked_id=0)
    assert batch.loss_mask.tolist() == [[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]]


def test_labels_of_their_own_count_from_zero_up() -> None:
    label = torch.tensor([[-100, 5, -100, 3, -1, 0], [9, 9, 9, 9, 9, 9]])
    batch = Batch.from_rows(TEXT, PATTERN, label=label, masked_id=0)
    assert batch.labels.tolist() == [[5, 0, 3, 0, 0], [9, 9, 9, 9, 9]]
    assert batch.loss_mask.tolist() == [[1, 0, 0, 0, 1], [0, 1, 1, 1, 1]]


def test_the_ranges_of_every_layer_are_made() -> None:
    batch = Batch.from_rows(TEXT, PATTERN)
    made = dict(batch.layout._ranges)
    assert len(made) == 2
    expected = TokenLayout.from_ids(batch.ids, PATTERN)
    for layer in range(3):
        assert torch.equal(batch.layout.ranges(layer).dense(), expected.ranges(layer).dense())
    assert batch.layout._ranges == made


def test_documents_are_separated_only_on_request() -> None:
    assert Batch.from_rows(TEXT, PATTERN).layout.positions[0].tolist() == [0, 1, 2, 3, 4]
    assert Batch.from_rows(TEXT, PATTERN, document_end_id=0).layout.positions[0].tolist() == [0, 1, 2, 0, 1]


def test_a_batch_moves_with_its_ranges() -> None:
    moved = Batch.from_rows(TEXT, PATTERN).to("meta")
    assert {tensor.device.type for tensor in (moved.ids, moved.labels, moved.loss_mask, moved.layout.ids)} == {"meta"}
    assert moved.layout.ranges(0).band_lo.device.type == "meta"

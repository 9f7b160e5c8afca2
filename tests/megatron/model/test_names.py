from __future__ import annotations

import pytest

from megatron.model.names import TIED, place_of, weight_name


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("2.attention.dense.weight", "sequential.2.attention.dense.weight"),
        (f"tied_modules.{TIED}.word_embeddings.weight", "sequential.0.word_embeddings.weight"),
        ("sequential.15.norm.scale", "sequential.15.norm.scale"),
    ],
)
def test_a_stage_and_the_whole_model_call_a_weight_the_same(name: str, whole: str) -> None:
    assert weight_name(name) == whole


def test_a_name_says_its_place() -> None:
    assert place_of("sequential.15.norm.scale") == 15

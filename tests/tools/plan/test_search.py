from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config.loader import load_config
from megatron.config.schema import Config
from tools.plan.cost import Text
from tools.plan.hardware import PUBLISHED
from tools.plan.layout import Layout
from tools.plan.search import layouts, search, why_not

ROOT = Path(__file__).parents[3]
TEXT = Text(share=0.115, kept_ratio=0.17)
H100 = PUBLISHED["h100"]


def pythia(size: str) -> Config:
    paths = [ROOT / "configs" / f"{name}.yml" for name in (f"size/{size}", "method/sepllm-n64", "run/pile")]
    return load_config(paths, world_size=1, vocab_size=50277)


@pytest.mark.parametrize("size", ["160m", "1.4b", "12b"])
@pytest.mark.parametrize("devices", [1, 6, 8, 64, 4096])
def test_every_layout_divides_the_devices_the_heads_and_the_batch(size: str, devices: int) -> None:
    config = pythia(size)
    for layout in layouts(config, devices=devices, devices_per_node=8):
        applied = layout.applied_to(config)
        assert layout.devices == applied.runtime.world_size == devices
        assert applied.batch.train_batch_size == 1024 == layout.micro_batch * layout.data * applied.batch.gradient_accumulation_steps
        assert config.model.num_attention_heads % layout.tensor == 0
        assert applied.model.padded_vocab_size is not None
        assert applied.model.padded_vocab_size % layout.tensor == 0
        assert layout.pipe == 1 or (layout.context == 1 and layout.zero_stage <= 1)


def test_a_layout_is_what_the_configuration_it_makes_says() -> None:
    layout = Layout(pipe=2, tensor=2, data=4, zero_stage=1, micro_batch=8, recompute="selective")
    config = pythia("1.4b")
    assert Layout.of(layout.applied_to(config)) == layout
    assert layout.keys(config)["pipe_parallel_size"] == 2


@pytest.mark.parametrize(("size", "devices"), [("160m", 1), ("1.4b", 8), ("12b", 64)])
def test_what_is_suggested_fits_and_none_is_faster_by_more_than_an_estimate_can_tell(size: str, devices: int) -> None:
    found = search(pythia(size), H100, TEXT, devices=devices)
    suggested, *others = found.fitting
    assert suggested.estimate.memory.total_bytes <= H100.usable_bytes
    assert all(suggested.estimate.time.total <= 1.03 * other.estimate.time.total for other in others)


def test_nothing_is_suggested_where_nothing_fits() -> None:
    found = search(pythia("12b"), H100, TEXT, devices=1)
    assert not found.fitting
    assert found.too_large is not None


def test_what_does_not_fit_is_computed_again_rather_than_left_out() -> None:
    found = search(pythia("12b"), PUBLISHED["a100-40"], TEXT, devices=8)
    assert found.fitting
    assert any(one.layout.recompute != "none" for one in found.fitting)


def test_the_reason_names_what_costs_more() -> None:
    found = search(pythia("6.9b"), H100, TEXT, devices=64)
    suggested = found.fitting[0]
    slowest = found.fitting[-1]
    assert "slower: " in why_not(slowest, suggested)
    in_pipeline = next(one for one in found.fitting if one.layout.pipe > 1 and one.layout.tensor == 1)
    assert "bubble 0.0 -> " in why_not(in_pipeline, suggested)

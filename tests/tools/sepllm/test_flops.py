from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.config.schema import ModelConfig
from megatron.data.indexed import IndexedDatasetWriter
from sepllm.pattern import AttentionPattern
from tools.bench.text import PYTHIA_SEPARATORS
from tools.sepllm.flops import PUBLISHED, Row, block_flops, count, expected_attention, main, published_configs, share_behind, whole_flops


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    """Of the published settings, on two rows in which every eighth token is a separator."""
    configs = published_configs()
    ids = torch.where(torch.arange(2 * 2048) % 8 == 5, PYTHIA_SEPARATORS[0], 1000).view(2, 2048)
    counted = count([config.attention.prefill for config in configs], [ids])
    return {
        published.method: Row.of(published.name, config.model, ratios, published)
        for published, config, ratios in zip(PUBLISHED, configs, counted, strict=True)
    }


def test_streamingllm_is_the_papers_for_every_text(rows: dict[str, Row]) -> None:
    assert f"{100 * rows['streamingllm-n64'].attention:.2f}" == "6.43"


def test_full_layers_are_means_of_the_separator_row_and_full_attention(rows: dict[str, Row]) -> None:
    for window in (64, 128, 256):
        sparse = rows[f"sepllm-n{window}"].attention
        for kind, full_layers in {"H": 1, "HT": 2, "HMT": 3}.items():
            if f"sepllm-n{window}{kind}" in rows:
                assert rows[f"sepllm-n{window}{kind}"].attention == pytest.approx(((12 - full_layers) * sparse + full_layers) / 12, rel=1e-12)


def test_the_papers_operations_follow_from_its_attention_maps() -> None:
    model = published_configs()[0].model
    for published in PUBLISHED:
        if published.attention is not None and published.flops is not None and published.method != "full":
            assert 100 * block_flops(model, published.attention / 100) == pytest.approx(published.flops, abs=0.12)


def test_full_attention_is_the_whole_of_either_count(rows: dict[str, Row]) -> None:
    full = rows["full"]
    assert (full.attention, full.flops, full.step) == (1.0, 1.0, 1.0)
    assert all(row.attention < 1 and row.flops < 1 and row.step < 1 for name, row in rows.items() if name != "full")


def test_operations_are_those_written_out(rows: dict[str, Row]) -> None:
    length, width, layers, vocabulary = 2048, 768, 12, 50304
    matrices = length * layers * 24 * width**2
    pairs = rows["sepllm-n64"].attention * length * (length + 1) / 2
    attention, square, causal = (layers * 4 * width * count for count in (pairs, length**2, length * (length + 1) / 2))
    output = 2 * length * width * vocabulary * 3 / 4  # GPT-NeoX's formula is right for the output matrix where activations are recomputed
    assert rows["sepllm-n64"].flops == pytest.approx((matrices + attention) / (matrices + square))
    assert rows["sepllm-n64"].step == pytest.approx((matrices + output + attention) / (matrices + output + causal))


@pytest.mark.parametrize(("window", "initial"), [(1, 0), (4, 3), (64, 3)])
def test_the_expected_map_is_counted_where_no_or_every_token_is_a_separator(window: int, initial: int) -> None:
    ids = torch.zeros(1, 50, dtype=torch.long)
    for share, separators in ((0.0, ()), (1.0, (0,))):
        (ratios,) = count([AttentionPattern(initial_tokens=initial, separator_ids=frozenset(separators), windows=(window,))], [ids])
        assert expected_attention(length=50, window=window, initial_tokens=initial, share=share) == pytest.approx(ratios.attention_map)


def test_one_share_of_separators_gives_the_papers_rows() -> None:
    share = share_behind(0.1721, length=2048, window=64, initial_tokens=3)
    assert 0.11 < share < 0.12
    assert expected_attention(length=2048, window=64, initial_tokens=3, share=share) == pytest.approx(0.1721)
    assert 100 * expected_attention(length=2048, window=128, initial_tokens=3, share=share) == pytest.approx(22.48, abs=0.02)


def test_the_table_counts_your_data_and_your_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document(np.tile([15, 900, 901, 902], 1200))
    configs = ["size/160m", "method/sepllm-n64", "run/pile"]
    assert main(["--data", str(tmp_path / "data"), "-d", "configs", *configs]) == 0
    out = capsys.readouterr().out.splitlines()
    (published,) = (line.split() for line in out if line.startswith("SepLLM n=64 "))
    (own,) = (line.split() for line in out if line.startswith("160m + sepllm-n64 + pile"))
    assert out[0].endswith("2 rows of 2048 tokens, 25.00 % separators")
    assert (published[2], published[3]) == (own[5], "17.21")


def test_separators_of_no_data_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--separator-ids", "3"]) == 2
    assert "--data, which is missing" in capsys.readouterr().err


def test_whole_steps_count_the_output_matrix() -> None:
    model = published_configs()[0].model
    without: ModelConfig = model.model_copy(update={"padded_vocab_size": None})
    assert whole_flops(model, 0.1) > whole_flops(without, 0.1)

"""The whole command on a short text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.bench.attention import main
from tools.bench.variants import Variant, variants


@pytest.fixture
def tokens(tmp_path: Path) -> list[str]:
    """Flags for a text of which about one token in six is a separator."""
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, 12, 8000))
    return ["--tokens", str(path), "--separator-ids", "1", "2", "--density-target", "0.1667"]


SMALL = ("--seq-lengths", "64", "128", "--window", "16", "--head-size", "16", "--heads", "2", "--rounds", "2")


def test_run_leaves_rows_a_table_and_a_picture(tmp_path: Path, tokens: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    assert main([*SMALL, *tokens, "--variants", "dense_mask", "two_call", "chunked", "--json", str(out), "--png", str(png)]) == 0
    result = json.loads(out.read_text())
    assert result["header"].keys() >= {"device", "cores", "torch", "triton", "python", "commit", "date", "threads", "command", "density_target"}
    assert [text["seq_length"] for text in result["texts"]] == [64, 128]
    assert {(row["variant"], row["dtype"], row["pass"]) for row in result["rows"] if row["seq_length"] == 64} == {
        (variant, dtype, direction)
        for direction in ("fwd", "fwd+bwd")
        for variant, dtype in [("causal", "fp32"), ("causal", "bf16"), ("dense_mask", "fp32"), ("two_call", "fp32"), ("chunked", "fp32")]
    }
    for row in result["rows"]:
        assert row["limit"] == pytest.approx(1 / row["share"])
        assert row["reached"] == pytest.approx(row["ratio"] * row["share"])
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert abs(row["density"] - 0.1667) <= 0.01
        assert row["rounds"] == 2
    assert png.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "S = 128" in printed
    assert "two_call" in printed


def broken(variant: Variant) -> Variant:
    """The same, with the last query's output lost."""

    def build(problem, dtype):  # type: ignore[no-untyped-def]
        attention = variant.build(problem, dtype)
        return lambda q, k, v: torch.cat([attention(q, k, v)[:, :-1], q[:, -1:] * 0], 1)

    return replace(variant, name="broken", build=build)


def test_wrong_contender_has_no_row_and_the_command_fails(tmp_path: Path, tokens: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def known(device: torch.device) -> list[Variant]:
        named = {variant.name: variant for variant in variants(device)}
        return [named["causal"], named["chunked"], broken(named["chunked"])]

    out = tmp_path / "out.json"
    assert main([*SMALL, *tokens, "--json", str(out)], known=known) == 1
    result = json.loads(out.read_text())
    assert {row["variant"] for row in result["rows"]} == {"causal", "chunked"}
    assert any(note.startswith("wrong: S = 64: broken fp32: out is off by") for note in result["notes"])
    assert "WRONG, and therefore without a row: S = 64: broken fp32" in capsys.readouterr().err


def test_text_that_cannot_be_had_is_an_error(tokens: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *tokens[:-1], "0.9"]) == 1
    assert "give another --density-target" in capsys.readouterr().err

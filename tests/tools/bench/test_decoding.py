from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import DynamicCache

from tools.bench.decoding import Arm, main, make_cache, make_model, parse, random_text, stored_bytes

SMALL = ["--equal-lengths", "60", "--layers", "2", "--hidden", "64", "--cache", "2", "8", "16", "48", "--turns", "2", "--tokens", "4"]


def test_the_sep_cache_stays_small_while_the_other_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lengths", "128", "32", *SMALL, "--json", str(tmp_path / "out.json"), "--png", str(tmp_path / "out.png")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    (short, long), (equal,) = result["rows"], result["equal_rows"]
    token_bytes = 2 * 2 * 64 * 4
    assert short["dynamic_bytes"] == pytest.approx((32 + 4 + 4.5) * token_bytes)
    assert long["dynamic_bytes"] == pytest.approx((128 + 16 + 4.5) * token_bytes)
    assert long["sep_bytes"] <= 48 * token_bytes < long["dynamic_bytes"]
    assert equal["sep_bytes"] == equal["dynamic_bytes"] == pytest.approx((60 + 4 + 4.5) * token_bytes)
    assert long["ratio_low"] <= long["ratio"] <= long["ratio_high"]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "times faster" in capsys.readouterr().out


def test_bytes_are_those_of_the_stored_tokens() -> None:
    arguments = parse(["--lengths", "40", *SMALL])
    model = make_model(arguments, arguments.device)
    arm = Arm(model, DynamicCache())
    arm.read(random_text(40))
    assert stored_bytes(arm.cache) == 40 * 2 * 2 * 64 * 4
    assert make_cache(arguments).get_usable_length() == 0


def test_what_is_wrong_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--hidden", "100", "--lengths", "8"]) == 2
    assert "--hidden is 100: it must be a multiple of 64" in capsys.readouterr().err

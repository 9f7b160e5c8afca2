"""The measurement behind `auto`: which cores it compares, and that it objects to a bad choice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sepllm.pattern import UNBOUNDED, SelfAdjust, Standard
from tools.bench import cores
from tools.bench.cores import Case, judge, ranges_of
from tools.bench.measure import Ratio
from tools.bench.text import TokenStream

TEXT = TokenStream(name="random", ids=np.random.default_rng(0).integers(0, 9, 4000), separator_ids=(1, 2))
SMALL = (
    Case(batch=1, queries=40, keys=40, window=8, has_backward=True),
    Case(batch=2, queries=3, keys=40, window=8),
    Case(batch=1, queries=40, keys=40, window=UNBOUNDED),
    Case(batch=1, queries=40, keys=40, window=8, has_backward=True, softmax=SelfAdjust(kind="raw")),
)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_core_that_can_is_timed_and_the_choice_is_among_them(case: Case) -> None:
    verdict = judge(case, "fp32", TEXT, torch.device("cpu"), rounds=2, cores=("sdpa", "native", "chunked", "dense"))
    of_one_softmax = {"chunked"} | ({"sdpa"} if case.window == UNBOUNDED else set())
    assert set(verdict.ms) == {"native", "dense"} | (of_one_softmax if case.softmax == Standard() else set())
    assert verdict.chosen in verdict.ms
    assert verdict.ms[verdict.fastest] == min(verdict.ms.values())


def test_core_that_fails_is_named_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = cores.attend

    def attend(*tensors: torch.Tensor, core: str, **others: object) -> torch.Tensor:
        if core == "chunked":
            raise RuntimeError("no kernel image is available")
        return computed(*tensors, core=core, **others)

    monkeypatch.setattr(cores, "attend", attend)
    verdict = judge(SMALL[0], "fp32", TEXT, torch.device("cpu"), rounds=2, cores=("native", "chunked", "dense"))
    assert set(verdict.ms) == {"native", "dense"}
    assert verdict.failures == ("training, 1 x 40 over 40, n = 8, fp32: chunked failed: no kernel image is available",)


def test_decoding_ranges_are_those_of_the_last_tokens() -> None:
    ranges = ranges_of(SMALL[1], TEXT)
    assert (ranges.band_lo.shape, ranges.num_keys) == ((2, 3), 40)


def test_slow_choice_is_marked_and_fails_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cores, "chosen_stream", lambda arguments: TEXT)
    arguments = ["--dtype", "fp32", "--rounds", "2", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(Ratio, "of", lambda slower, faster: Ratio(median=1.5, low=1.4, high=1.6))
    assert cores.main(arguments, cases=SMALL[:1]) == 1
    assert "1.50 BAD" in capsys.readouterr().out
    monkeypatch.setattr(Ratio, "of", lambda slower, faster: Ratio(median=1.1, low=1.0, high=1.2))
    assert cores.main(arguments, cases=SMALL[:1]) == 0
    row = json.loads((tmp_path / "out.json").read_text())["rows"][0]
    assert (row["queries"], row["chosen"], row["behind"]) == (40, "native", 1.1)

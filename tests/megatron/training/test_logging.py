from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

import pytest

from megatron.training.logging import Console, Interval, console_line, copied_output, cores_line, readable_flops
from megatron.training.trainer import train
from tests.megatron.training.running import MakeConfig

LINE = re.compile(
    r" samples/sec: (\d+\.\d{3}) \| iteration +(\d+)/ +(\d+) \| elapsed time per iteration \(ms\): (\d+\.\d) \|"
    r" learning rate: (\d\.\d{3}E[-+]\d\d) \| approx flops per GPU: (\d+\.\d[KMGTP]?FLOPS) \|(?: MFU: ([\d.]+)% \| HFU: ([\d.]+)% \|)?"
    r" lm_loss: (\d\.\d{6}E[-+]\d\d) \|"
    r"(?: loss scale: (\d+\.\d) \|)? number of skipped iterations: +(\d+) \| number of nan iterations: +(\d+) \|"
)


def interval(**changes: float) -> Interval:
    figures: dict[str, float] = {
        "iteration": 20,
        "train_iters": 143_000,
        "steps": 10,
        "elapsed_s": 5.0,
        "samples": 320,
        "learning_rate": 6e-4,
        "flops_per_s": 4.13e13,
        "loss": 3.25,
    }
    return Interval(**(figures | changes))  # type: ignore[arg-type]


def test_the_console_line_is_the_one_that_people_parse() -> None:
    match = LINE.fullmatch(console_line(interval()))
    assert match is not None
    assert match.groups() == ("64.000", "20", "143000", "500.0", "6.000E-04", "41.3TFLOPS", None, None, "3.250000E+00", None, "0", "0")


def test_utilisation_and_loss_scale_stand_in_the_line_where_they_are_known() -> None:
    match = LINE.fullmatch(console_line(interval(model_utilization=0.4, hardware_utilization=0.5333, loss_scale=4096.0, skipped=2, nan=1)))
    assert match is not None
    assert match.groups()[6:] == ("40.00", "53.33", "3.250000E+00", "4096.0", "2", "1")


@pytest.mark.parametrize(
    ("number", "text"), [(999.0, "999.0FLOPS"), (1e3, "1.0KFLOPS"), (2.5e9, "2.5GFLOPS"), (3e15, "3.0PFLOPS"), (4e18, "4000.0PFLOPS")]
)
def test_flops_have_a_unit(number: float, text: str) -> None:
    assert readable_flops(number) == text


def test_a_run_prints_its_lines_at_the_interval(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(make_config(logging={"log_interval": 2}, checkpoint={"save": None}))
    assert [match[2] for line in capsys.readouterr().out.splitlines() if (match := LINE.fullmatch(line))] == ["2", "4", "6"]


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Console(is_first=False, bar_iterations=10).say("text")
    assert capsys.readouterr().out == ""


def test_the_progress_bar_shows_loss_speed_and_time_left(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(make_config(logging={"progress_bar": True}, checkpoint={"save": None}))
    last = capsys.readouterr().err.splitlines()[-1].split("\r")[-1]
    assert re.search(r"100%.*6/6 \[\d\d:\d\d<\d\d:\d\d,.*loss \d\.\d{4}, [\d,]+ tokens/s\]", last), last


def test_the_ratios_are_printed_after_so_many_micro_batches(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(checkpoint={"save": None}, attention={"print_kv_ratio": True, "print_ratio_intervals": 5})
    train(config)
    said = [line for line in capsys.readouterr().out.splitlines() if "kept/total" in line]
    assert len(said) == 2, "six steps of two micro-batches pass 5 and 10"
    assert re.search(r"the KV: 0\.\d{4} in this step, 0\.\d{4} so far \| kept/total of the attention map: 0\.\d{4}", said[0])


def test_the_output_is_copied_to_a_file_of_the_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with copied_output(str(tmp_path / "logs"), local_rank=0):
        print("to both")
        print("a warning", file=sys.stderr)
    print("after")
    assert capsys.readouterr().out == "to both\nafter\n"
    host = socket.gethostname()
    assert (tmp_path / "logs" / f"{host}_stdout.txt").read_text().splitlines()[1:] == ["to both"]
    assert (tmp_path / "logs" / f"{host}_stderr.txt").read_text().splitlines()[1:] == ["a warning"]


def test_only_one_process_of_a_host_copies(tmp_path: Path) -> None:
    with copied_output(str(tmp_path / "logs"), local_rank=1):
        print("text")
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("cores", "line"),
    [
        (("native",) * 12, "native in all layers"),
        (("sdpa", "chunked", "chunked", "sdpa", "sdpa"), "chunked in layers 1-2, sdpa in layers 0, 3-4"),
        (("dense", "sdpa"), "dense in layer 0, sdpa in layer 1"),
    ],
)
def test_line_of_the_attention_cores_names_the_layers_of_each(cores: tuple[str, ...], line: str) -> None:
    assert cores_line(cores) == line

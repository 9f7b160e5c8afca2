"""deepy.py as a user starts it: two processes on the CPU, exit codes, obstacles."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.data import tokenizer
from megatron.launch import resources
from megatron.launch.environment import REPOSITORY
from megatron.launch.main import main
from megatron.launch.processes import children
from tests.megatron.launch.waiting import is_running, wait_until

LOCAL = str(REPOSITORY / "configs" / "local")
TINY = ["-d", LOCAL, "tiny", "tiny-sepllm"]
RANK_SCRIPT = """
import os, sys, time
from megatron.launch.worker import worker_config
config = worker_config()
if os.environ["RANK"] == "1" and config.training.seed == 99:
    sys.exit(7)
if os.environ["RANK"] == "1" and config.training.seed == 98:
    raise ValueError("what rank 1 cannot bear")
if config.training.seed == 98:
    time.sleep(100)
rank, size, local, backend = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"))
sys.stdout.write(f"rank {rank} of {size}, local {local}, {backend}, for {config.runtime.world_size} devices\\n")
assert "torch" not in sys.modules
"""
WAITING_SCRIPT = """
import os, pathlib, time
from megatron.launch.worker import worker_config
config = worker_config()
pathlib.Path(f"pid{os.environ['RANK']}").write_text(str(os.getpid()))
time.sleep(100)
"""


def deepy(*argv: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["timeout", "-s", "KILL", "120", sys.executable, str(REPOSITORY / "deepy.py"), *argv]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "ranks.py").write_text(RANK_SCRIPT)
    return tmp_path


def test_two_processes_on_a_cpu(folder: Path) -> None:
    finished = deepy("ranks.py", *TINY, "--set", "num_gpus=2", folder=folder)
    assert finished.returncode == 0, finished.stderr
    said = sorted(line for line in finished.stdout.splitlines() if line.startswith("rank "))
    assert said == ["rank 0 of 2, local 0, cpu, for 2 devices", "rank 1 of 2, local 1, cpu, for 2 devices"]


def test_a_rank_reads_what_is_typed(folder: Path) -> None:
    (folder / "reads.py").write_text("print('read', input())")
    command = [sys.executable, str(REPOSITORY / "deepy.py"), "reads.py", *TINY]
    assert "read something" in subprocess.run(command, cwd=folder, input="something\n", capture_output=True, text=True, check=True).stdout


def test_the_status_of_a_failing_rank_is_deepys(folder: Path) -> None:
    assert deepy("ranks.py", *TINY, "--set", "num_gpus=2", "--set", "seed=99", folder=folder).returncode == 7


def test_a_failing_rank_ends_the_others_and_its_traceback_is_last(folder: Path) -> None:
    finished = deepy("ranks.py", *TINY, "--set", "num_gpus=2", "--set", "seed=98", folder=folder)
    assert finished.returncode == 1
    assert "rank 1 on localhost left with status 1. The last it said:\nTraceback (most recent call last):\n" in finished.stderr
    assert finished.stderr.rstrip().endswith("ValueError: what rank 1 cannot bear")


def test_a_dry_run_prints_the_command_and_starts_nothing(folder: Path) -> None:
    finished = deepy("ranks.py", *TINY, "--dry-run", folder=folder)
    assert finished.returncode == 0
    assert "-m megatron.launch.node" in finished.stdout
    assert f"{folder}/ranks.py --config-base64" in finished.stdout


def test_starting_without_data_names_what_is_missing(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "train.py").touch()
    (folder / "file").touch()
    assert main(["train.py", *TINY, "--set", "save=file/deeper", "--set", "checkpoint_factor=5"]) == 2
    told = capsys.readouterr().err
    assert "data_path: data/tiny/text_document.bin and data/tiny/text_document.idx do not exist" in told
    assert f"save is file/deeper, and {folder}/file is a file: choose a folder you may write to" in told


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ("mine_text_document.bin", "a prefix is meant, so give mine_text_document."),
        ("mine", "did you mean mine_text_document?"),
        ("yours", "correct the prefix, or make the data with prepare_data.py."),
    ],
)
def test_a_prefix_that_was_nearly_right_is_put_right(
    given: str, remedy: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for name in ("train.py", "mine_text_document.bin", "mine_text_document.idx"):
        (folder / name).touch()
    assert main(["train.py", *TINY, "--set", f"data_path={given}"]) == 2
    assert f"data_path: {given}.bin and {given}.idx do not exist: {remedy}" in capsys.readouterr().err


def test_starting_without_the_tokenizer_names_it(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    overrides = ["--set", "tokenizer_type=HFTokenizer", "--set", "vocab_file=nowhere.json"]
    assert main(["ranks.py", *TINY, *overrides]) == 2
    assert "nowhere.json" in capsys.readouterr().err


def test_fp16_on_a_processor_without_it_names_the_overrides_that_help(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "cpuinfo").write_text("flags : fpu avx512f f16c")
    monkeypatch.setattr(resources, "_CPU_INFO", folder / "cpuinfo")
    assert main(["ranks.py", *TINY, "--set", "precision=fp16"]) == 2
    assert "--set fp16.enabled=false --set precision=bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "name"), [("SPMTokenizer", "spm.model"), ("TiktokenTokenizer", "cl100k_base"), ("HFGPT2Tokenizer", "gpt2"), ("HFGPT2Tokenizer", "null")]
)
def test_a_vocabulary_that_is_no_json_is_asked_of_its_tokenizer(
    kind: str, name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "spm.model").touch()
    monkeypatch.setattr(tokenizer, "build_tokenizer", lambda config: SimpleNamespace(vocab_size=1000))
    assert main(["ranks.py", *TINY, "--set", f"tokenizer_type={kind}", "--set", f"vocab_file={name}", "--check"]) == 0
    plan = capsys.readouterr().out
    assert "vocabulary padded to 1,024" in plan
    assert "cannot start" not in plan


@pytest.mark.parametrize("argv", [["nowhere.py", *TINY], ["ranks.py", "nowhere.yml"], ["ranks.py", *TINY, "--set", "hostfile=nowhere"]])
def test_bad_input_is_a_sentence_and_status_2(argv: list[str], folder: Path) -> None:
    finished = deepy(*argv, folder=folder)
    assert finished.returncode == 2
    assert "nowhere" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_deepy(folder: Path, number: signal.Signals) -> None:
    (folder / "waits.py").write_text(WAITING_SCRIPT)
    command = [sys.executable, str(REPOSITORY / "deepy.py"), "waits.py", *TINY, "--set", "num_gpus=2"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
    try:
        files = [folder / "pid0", folder / "pid1"]
        assert wait_until(lambda: all(file.exists() and file.read_text() for file in files), seconds=60)
        ranks = [int(file.read_text()) for file in files]
        process.send_signal(number)
        assert process.wait(timeout=60) != 0
        assert wait_until(lambda: not any(map(is_running, ranks)), seconds=60)
    finally:
        process.kill()


def test_under_nohup_a_job_goes_on_when_its_terminal_is_closed(folder: Path) -> None:
    (folder / "waits.py").write_text(WAITING_SCRIPT)
    command = ["nohup", sys.executable, str(REPOSITORY / "deepy.py"), "waits.py", *TINY]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert wait_until(lambda: (folder / "pid0").exists(), seconds=60)
        (ignored,) = [line.split()[1] for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("SigIgn:")]
        assert int(ignored, 16) >> (signal.SIGHUP - 1) & 1
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_no_rank_outlives_the_process_that_started_it(folder: Path) -> None:
    (folder / "waits.py").write_text(WAITING_SCRIPT)
    command = [sys.executable, str(REPOSITORY / "deepy.py"), "waits.py", *TINY]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
    try:
        assert wait_until(lambda: (folder / "pid0").exists() and bool((folder / "pid0").read_text()), seconds=60)
        (node,) = children(process.pid)
        os.kill(node, signal.SIGKILL)
        assert process.wait(timeout=60) == 137
        assert wait_until(lambda: not is_running(int((folder / "pid0").read_text())), seconds=10)
    finally:
        process.kill()

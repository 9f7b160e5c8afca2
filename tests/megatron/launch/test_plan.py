"""What --check prints: the numbers of SepLLM's 160m run, what is absent, and what is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from megatron.config.schema import CheckpointConfig
from megatron.data.block_cache import BlockCache
from megatron.data.indexed import IndexedDatasetWriter
from megatron.launch.environment import REPOSITORY
from megatron.launch.main import main
from megatron.launch.plan import saved_steps
from megatron.training.cadence import is_save_due

CONFIGS = str(REPOSITORY / "configs")
N64 = ["train.py", "-d", CONFIGS, "size/160m", "method/sepllm-n64", "run/pile", "--check", "--devices", "32"]


def plan(capsys: pytest.CaptureFixture[str], argv: list[str]) -> dict[str, str]:
    """The printed plan, by label."""
    assert main(argv) == 0
    rows: dict[str, str] = {}
    label = ""
    for line in capsys.readouterr().out.splitlines():
        label = line[:14].strip() or label
        rows[label] = f"{rows.get(label, '')}\n{line[14:].strip()}".strip()
    return rows


def test_sepllm_160m_on_32_devices(capsys: pytest.CaptureFixture[str]) -> None:
    rows = plan(capsys, [*N64, "--set", "padded_vocab_size=50304"])
    assert rows["batch"].startswith("1,024 samples a step = micro batch 32 x accumulation 1 x data parallel 32; 2,097,152 tokens")
    assert rows["parameters"].startswith("162,322,944 in all; 85,056,000 without embeddings")
    assert "layers 0-11: window 64" in rows["attention"]
    assert "3 initial tokens, 9 separator ids (2, 13, 15, 27, 28, 32, 186, 187, 209)" in rows["attention"]
    assert rows["training"].startswith("143,000 steps, 299,892,736,000 tokens")
    assert "up to 0.0006 in 1430 steps, down to 6e-05 at step 143,000" in rows["learning rate"]
    assert rows["checkpoints"].startswith("154 in checkpoints: 0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 3000")
    assert '"train_batch_size": 1024' in rows["deepspeed"]


@pytest.mark.parametrize(
    ("method", "extra", "label", "words"),
    [
        ("sepllm-n64", (), "positions", "rotary, 25% of each head"),
        ("sepllm-n64HT-bipe-alibi", (), "positions", "alibi, by segment (BiPE, 9 separator ids); an embedding for each place in a segment"),
        ("sa", (), "attention", "self_adjust, core auto: 3 initial tokens, 0 separator ids, self-adjusting softmax (normalised)\nlayers 0-11: full"),
        ("sa", ("--set", "SA_Extremes=causal"), "attention", "self-adjusting softmax (normalised, extremes of all causal keys)"),
        ("sa", (), "notes", "the self-adjust softmax runs over all causal keys: full attention."),
        ("sa-no-denominator", (), "attention", "self-adjusting softmax (raw)"),
    ],
)
def test_softmax_and_positions_are_named(method: str, extra: tuple[str, ...], label: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train.py", "-d", CONFIGS, "size/160m", f"method/{method}", "run/pile", "--check", "--devices", "32", *extra]
    assert words in plan(capsys, argv)[label]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("lr_decay_style=constant",), "constant v3: up to 0.0006 in 1430 steps, and stays there;"),
        (("lr_decay_style=exponential",), "down to 0.000300044 at step 143,000"),
        (("lr_decay_style=linear", "lr_schedule_version=v1", "min_lr=0"), "down to 1.2e-05 at step 143,000"),
    ],
)
def test_the_rate_at_the_end_is_that_of_the_schedule(changes: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in plan(capsys, [*N64, *(word for change in changes for word in ("--set", change))])["learning rate"]


def test_memory_is_given_by_part(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    memory = plan(capsys, [*N64, "--set", "padded_vocab_size=50304"])["memory"]
    gib = {name: float(number) for number, name in re.findall(r"([\d.]+)  (\w+)", memory)}
    assert gib["weights"] == gib["gradients"] == pytest.approx(162_322_944 * 2 / 2**30, abs=0.005)
    assert gib["optimizer"] == pytest.approx(162_322_944 * 12 / 32 / 2**30, abs=0.005)
    assert gib["logits"] == pytest.approx(32 * 2048 * 50304 * 10 / 2**30, abs=0.005)
    assert "activations: 12 checkpointed inputs" in memory
    assert "recomputed: 1 layers at a time, with gradients (only during the backward)" in memory


def test_absent_tokenizer_and_data_are_skipped_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    rows = plan(capsys, N64)
    assert "data/20B_tokenizer.json: not found, skipped" in rows["tokenizer"]
    assert "train_data_paths data/pile/train_text_document: not found, skipped" in rows["data"]
    assert rows["kept ratio"] == "training data not found, skipped"
    assert "train_data_paths: data/pile/train_text_document.bin and" in rows["cannot start"]
    assert "vocabulary unknown, skipped; 85,056,000 without embeddings" in rows["parameters"]


def test_streamingllm_needs_no_data_for_its_share(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train.py", "-d", CONFIGS, "size/160m", "method/streamingllm-n64", "run/pile", "--check"]
    assert plan(capsys, argv)["kept ratio"] == "6.43 % of the attention map, whatever the data"


def test_runs_of_equal_layers_share_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train.py", "-d", CONFIGS, "size/160m", "method/sepllm-n64HMT", "run/pile", "--check"]
    lines = plan(capsys, argv)["attention"].splitlines()[1:]
    assert lines == ["layer 0: full", "layers 1-4: window 64", "layer 5: full", "layers 6-10: window 64", "layer 11: full"]


def test_the_share_is_counted_on_training_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "text", "u2") as writer:
        writer.add_document(np.full(400, 46))
    argv = ["train.py", "-d", f"{CONFIGS}/local", "tiny", "tiny-sepllm", "--check", "--set", f"data_path={tmp_path}/text"]
    assert plan(capsys, argv)["kept ratio"].startswith("100.00 % of the attention map")


def test_remote_data_is_looked_for_and_read_where_it_lies(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockCache, "of_user", lambda limit_gb=10.0: BlockCache(folder=tmp_path / "cache", limit_bytes=10**6))
    with IndexedDatasetWriter(tmp_path / "text", "u2") as writer:
        writer.add_document(np.full(400, 46))
    for end in ("bin", "idx"):
        fsspec.filesystem("memory").pipe_file(f"/plan/text.{end}", (tmp_path / f"text.{end}").read_bytes())
    argv = ["train.py", "-d", f"{CONFIGS}/local", "tiny", "tiny-sepllm", "--check", "--set"]
    there, nowhere = (plan(capsys, [*argv, f"data_path=memory://plan/{name}"]) for name in ("text", "no"))
    assert there["data"] == "data_path memory://plan/text"
    assert there["kept ratio"].startswith("100.00 % of the attention map")
    assert "data_path: memory://plan/no.bin and memory://plan/no.idx do not exist" in nowhere["cannot start"]


def test_a_damaged_data_file_is_reported_and_the_plan_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for end in ("bin", "idx"):
        (tmp_path / f"text.{end}").write_bytes(b"nothing of use")
    argv = ["train.py", "-d", f"{CONFIGS}/local", "tiny", "tiny-sepllm", "--check", "--set", f"data_path={tmp_path}/text"]
    assert plan(capsys, argv)["kept ratio"].startswith("training data skipped:")


def test_a_wrong_configuration_is_told_in_full_and_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train.py", "-d", CONFIGS, "size/1.4b", "method/sepllm-n64HT", "run/pile", "--check", "--set", "num_layrs=3"]
    assert main(argv) == 2
    told = capsys.readouterr()
    assert "did you mean num_layers?" in told.err
    assert "prefill_loc_win_size_list has 12 windows but num_layers is 24" in told.err
    assert told.out == ""


def test_without_data_no_torch_is_imported_and_it_is_quick() -> None:
    code = f"import sys; from megatron.launch.main import main; status = main({N64!r}); sys.exit(status or 'torch' in sys.modules)"
    started = time.monotonic()
    finished = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=False)
    assert finished.returncode == 0
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "keys",
    [
        {"checkpoint_factor": 4},
        {"checkpoint_factor": 2.5},
        {"checkpoint_factor": 2, "checkpoint_scale": "log"},
        {"checkpoint_factor": 1.3, "checkpoint_scale": "log", "extra_save_iters": (0, 3)},
        {"extra_save_iters": (0, 3, 99)},
        {},
    ],
)
def test_saved_steps_are_those_of_the_trainer_and_the_last(keys: dict[str, object]) -> None:
    checkpoint = CheckpointConfig.model_validate(keys)
    due = {step for step in range(51) if is_save_due(step, checkpoint)}
    assert saved_steps(checkpoint, 50) == sorted(due | {50})

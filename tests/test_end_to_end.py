"""The way a user walks, by the commands themselves: text to tokens, training with a stop and a resume, conversion, generation."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TINY = ("configs/local/tiny.yml", "configs/local/tiny-sepllm.yml")


def run(*words: object, device: str, status: int = 0) -> str:
    """What a command of this project prints; it must end with ``status``."""
    environment = os.environ | {"DS_ACCELERATOR": device, "HF_HUB_OFFLINE": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(save: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return {row["iteration"]: row["train/lm_loss"] for row in rows if "train/lm_loss" in row}


@pytest.mark.parametrize(
    ("device", "settings"),
    [
        pytest.param("cpu", ("num_gpus=2", "precision=bfloat16"), id="two CPU ranks, bf16"),
        pytest.param("cuda", ("num_gpus=1", "precision=fp16"), id="one GPU, fp16", marks=pytest.mark.gpu),
    ],
)
def test_text_becomes_a_trained_converted_and_talking_model(device: str, settings: tuple[str, ...], tmp_path: Path) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    text, data, save, converted = (tmp_path / name for name in ("text.txt", "data", "save", "hf"))
    text.write_text("\n\n".join(path.read_text() for path in sorted(ROOT.glob("sepllm/**/*.py"))))
    data.mkdir()
    run("prepare_data.py", "--input", text, "--tokenizer-type", "CharLevelTokenizer", "--output-prefix", data / "tiny", device=device)

    prefix = data / "tiny_text_document"
    paths = [f"{split}_data_paths=[{prefix}]" for split in ("train", "valid", "test")]
    chosen = [*settings, *paths, "data_path=null", f"save={save}", "checkpoint_factor=2", "train_iters=4", "eval_interval=4", "eval_iters=1"]
    command = ["deepy.py", "train.py", *TINY, *(word for setting in chosen for word in ("--set", setting))]
    run(*command, device=device)
    whole = losses(save)
    assert set(whole) == {1, 2, 3, 4}
    assert all(math.isfinite(loss) for loss in whole.values())

    said = run(*command, "--set", f"load={save}", "--set", "iteration=2", device=device)
    assert "going on from iteration 2" in said
    assert losses(save) == (whole if device == "cpu" else pytest.approx(whole, rel=1e-3))

    convert = ("tools/ckpts/convert_neox_to_hf.py", "--input_dir", save, "--output_dir", converted, "--precision", "fp32", "--no_save_tokenizer")
    said = run(*convert, device=device)
    assert "Largest difference between the logits" in said
    out = tmp_path / "out.jsonl"
    run("generate.py", *TINY, "--set", f"load={save}", "--set", f"data_path={prefix}", "--set", "maximum_tokens=5", "-o", out, device=device)
    assert json.loads(out.read_text())["length"] <= 5

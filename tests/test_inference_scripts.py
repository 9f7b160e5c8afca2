"""generate.py and eval.py as a person starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.config.loader import load_config
from megatron.model.gpt import build_model

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, object] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 128,
    "max_position_embeddings": 128,
    "pos_emb": "rotary",
    "no_weight_tying": True,
    "tokenizer_type": "CharLevelTokenizer",
    "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
    "train_micro_batch_size_per_gpu": 2,
    "train_iters": 10,
    "separator_token_ids": [32, 44, 46],
    "prefill_local_window_size": 8,
    "generate_local_window_size": 8,
    "maximum_tokens": 6,
    "num_samples": 3,
    "eval_tasks": ["demo_perplexity"],
}


@pytest.fixture
def run_yml(tmp_path: Path) -> Path:
    """Configuration, checkpoint and evaluation text of a run."""
    path = tmp_path / "run.yml"
    places = {
        "load": str(tmp_path / "checkpoints"),
        "sample_output_file": str(tmp_path / "samples.txt"),
        "eval_task_path": str(ROOT / "configs" / "eval"),
        "eval_results_prefix": str(tmp_path / "small"),
    }
    path.write_text(json.dumps(SETTINGS | places))
    model = build_model(load_config([path], world_size=1, device="cpu"))
    (tmp_path / "checkpoints" / "global_step3").mkdir(parents=True)
    torch.save({"module": model.state_dict()}, tmp_path / "checkpoints" / "global_step3" / "mp_rank_00_model_states.pt")
    (tmp_path / "perplexity.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("To the sea, then. " * 20, "Home.", "And so on."))
    )
    return path


def start(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "SEPLLM_EVAL_DATA": str(folder),
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_generate_writes_its_texts(run_yml: Path) -> None:
    done = start("generate.py", str(run_yml), folder=run_yml.parent)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["length"] for line in (run_yml.parent / "samples.txt").read_text().splitlines()] == [6, 6, 6]


def test_one_process_generates_from_what_is_trained_in_stages(run_yml: Path) -> None:
    done = start("generate.py", str(run_yml), "--set", "pipe-parallel-size=2", folder=run_yml.parent)
    assert done.returncode == 0, done.stderr
    assert len((run_yml.parent / "samples.txt").read_text().splitlines()) == 3


def test_generate_without_a_checkpoint_ends_with_a_sentence_and_status_2(run_yml: Path) -> None:
    done = start("generate.py", str(run_yml), "--set", "load=nowhere", folder=run_yml.parent)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("load (nowhere) holds no finished checkpoint")


@pytest.mark.slow
def test_two_processes_score_what_one_scores(run_yml: Path) -> None:
    scores = []
    for command in (["eval.py"], ["deepy.py", "eval.py", "--set", "num_gpus=2", "--set", "master_port=29817"]):
        done = start(*command, str(run_yml), folder=run_yml.parent)
        assert done.returncode == 0, done.stderr
        (file,) = run_yml.parent.glob("small_eval_results_*.json")
        results = json.loads(file.read_text())
        scores.append(results["results"]["demo_perplexity"]["byte_perplexity,none"])
        file.unlink()
    assert results["run"]["processes"] == 2
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)

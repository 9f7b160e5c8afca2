"""The tiny run that is trained again and again: its configuration, what it wrote, and running one on several processes of this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.config.schema import Config, ConfigFile
from megatron.training.weights import read_weights
from sepllm.pattern import AttentionPattern

MakeConfig = Callable[..., Config]
REPOSITORY = Path(__file__).resolve().parents[3]


def tiny_config(prefix: str, save: Path, *, world_size: int = 1, precision: str = "fp32", zero_stage: int = 0, **changes: dict[str, Any]) -> Config:
    """A small configuration on the tokens at ``prefix``; ``group={"key": value}`` changes what differs from it."""
    pattern = AttentionPattern(initial_tokens=2, separator_ids=(44, 46), windows=(8, 8))
    groups: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_kv_heads": 4,
            "intermediate_size": 128,
            "seq_length": 32,
            "max_position_embeddings": 32,
            "pos_emb": "rotary",
            "rotary_pct": 0.25,
            "no_weight_tying": True,
            "gpt_j_residual": True,
            "vocab_size": 512,
            "padded_vocab_size": 512,
            "hidden_dropout": 0.1,
        },
        "attention": {"prefill": pattern, "decode": pattern, "mode": "sepllm"},
        "tokenizer": {"tokenizer_type": "CharLevelTokenizer"},
        "data": {"data_path": prefix, "split": "80,10,10", "num_workers": 0},
        "optimizer": {"betas": (0.9, 0.95)},
        "schedule": {"lr": 1e-2, "min_lr": 1e-3, "lr_decay_style": "cosine", "lr_decay_iters": 6, "warmup": 0.3},
        "batch": {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 4 // world_size,
            "gradient_accumulation_steps": 2,
            "data_parallel_size": world_size,
        },
        "precision": {"precision": precision},
        "parallel": {"zero_stage": zero_stage},
        "training": {"train_iters": 6, "eval_interval": 3, "eval_iters": 1},
        "checkpoint": {"save": str(save), "checkpoint_factor": 3},
        "logging": {"log_interval": 2, "steps_per_print": 1000},
        "launch": {},
        "generation": {},
        "evaluation": {},
        "runtime": {"world_size": world_size, "device": "cpu"},
    }
    for group, members in changes.items():
        groups[group] = groups[group] | members
    return Config.model_validate({**groups, "files": (ConfigFile(name="tiny.yml", text="{}"),)})


def weights_of(config: Config, iteration: int) -> dict[str, Tensor]:
    """The weights of a run's checkpoint."""
    assert config.checkpoint.save is not None
    return read_weights(Path(config.checkpoint.save) / f"global_step{iteration}", model=config.model, trust=True).state


def same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether both have the same names and the same bits."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def metrics_of(config: Config) -> list[dict[str, float]]:
    """What a run wrote to its JSON lines, by iteration."""
    assert config.checkpoint.save is not None
    return [json.loads(line) for line in (Path(config.checkpoint.save) / "metrics.jsonl").read_text().splitlines()]


def figures(config: Config, name: str) -> list[float]:
    """Everything a run reported under this name, in order."""
    return [line[name] for line in metrics_of(config) if name in line]


def losses_of(config: Config) -> list[float]:
    """Training losses of a run, in order."""
    return figures(config, "train/lm_loss")


def launcher_variables() -> list[str]:
    """Names in the environment by which a launcher, or an earlier run in this process, says who this process is."""
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return [name for name in os.environ if name in own or name.startswith(("SLURM_", "OMPI_", "PMI_"))]


@contextmanager
def without_launcher() -> Iterator[None]:
    """This process is a whole run, whatever the shell around it says; leaves the environment as it was."""
    before = dict(os.environ)
    for name in launcher_variables():
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


TRAIN_ALL = """
import sys
from pathlib import Path
from megatron.config.schema import Config, ConfigFile
from megatron.parallel.mesh import end_communication
from megatron.training.trainer import train
for path in sys.argv[1:]:
    train(Config.model_validate_json(Path(path).read_text()))
end_communication()
"""


def train_on(configs: Sequence[Config], *, ranks: int, folder: Path) -> str:
    """Trains each configuration on ``ranks`` processes of this machine, one after another; returns what they printed."""
    paths = [folder / f"config{place}.json" for place in range(len(configs))]
    for path, config in zip(paths, configs, strict=True):
        path.write_text(config.model_dump_json())
    return run_ranks(["-c", TRAIN_ALL, *map(str, paths)], ranks=ranks, folder=folder)


def run_ranks(arguments: Sequence[str], *, ranks: int, folder: Path) -> str:
    """Runs Python with these arguments as ``ranks`` processes of this machine that know of one another; returns what they printed."""
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    workers = []
    for rank in range(ranks):
        own = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        with (folder / f"rank{rank}.txt").open("w") as output:
            workers.append(subprocess.Popen([sys.executable, *arguments], env=own, stdout=output, stderr=subprocess.STDOUT, cwd=folder))
    try:
        statuses = [worker.wait(timeout=180) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    text = "\n".join((folder / f"rank{rank}.txt").read_text() for rank in range(ranks))
    assert statuses == [0] * ranks, text
    return text

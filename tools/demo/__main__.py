"""The whole way once: data, training with a stop and a resume, evaluation, conversion, scores, a passage, a picture and a table.

A small SepLLM (3 initial tokens, the separators, the 64 nearest) and a full-attention twin of the same size and seed train on
Shakespeare and the King James Bible. Each step is a command of this project, printed before it runs, so that any of them can be
repeated by hand.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron.config.loader import load_config
from megatron.launch.resources import visible_gpus
from tools.command import until_stopped
from tools.demo.report import Run, bigram_floor, draw, table

ROOT = Path(__file__).resolve().parents[2]
DATA = Path("data/demo")
CONFIG = Path("configs/local/demo.yml")
OUT = Path("runs/demo")
EXTRA_STEPS = 8
"""Steps that the first half takes beyond its checkpoint, to be compared with the resumed run's."""
GPU_TOLERANCE = 1e-3
"""There, sums over the tokens of an embedding depend on the order of atomic additions; on a CPU a resumed run is equal to the bit."""
TASKS = ("demo_perplexity", "demo_next_sentence")
PROMPT = "And it came to pass, when the king "


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    name: str
    title: str
    configs: tuple[Path, ...]

    @property
    def save(self) -> Path:
        return OUT / self.name

    @property
    def converted(self) -> Path:
        return OUT / f"{self.name}-hf"


METHODS = (
    Method(name="sepllm", title="SepLLM n=64", configs=(CONFIG, Path("configs/local/demo-sepllm.yml"), DATA / "separators.yml")),
    Method(name="full", title="full attention", configs=(CONFIG, Path("configs/local/demo-full.yml"))),
)


def main() -> None:
    os.chdir(ROOT)
    start = time.monotonic()
    settings = yaml.safe_load(CONFIG.read_text())
    if not (DATA / "data.json").exists():
        run("Prepare the data", "prepare_data.py", "demo", "-d", DATA)
    shutil.rmtree(OUT, ignore_errors=True)
    for method in METHODS:
        train(method, settings)
    write_eval_files()
    runs = [finish(method, settings) for method in METHODS]
    bigram = bigram_floor(load_config(METHODS[0].configs, world_size=1, device="cpu"), held_out=DATA / "test")
    picture = draw(runs, OUT / "loss.png", bigram=bigram)
    summary = table(runs, bigram=bigram)
    (OUT / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}\n\nLoss curves: {picture}\nThis table: {OUT / 'summary.txt'}\nAll of it took {(time.monotonic() - start) / 60:.1f} minutes.")


def train(method: Method, settings: dict[str, int]) -> None:
    """Half the run, a stop, and the rest from the checkpoint; the steps that both halves took must have equal losses."""
    half = settings["train_iters"] // 2
    command = ["deepy.py", "train.py", *method.configs, *devices(settings["train_batch_size"])]
    places = ["--set", f"save={method.save}", "--set", f"checkpoint_factor={half}"]
    run(f"Train {method.title}, first half", *command, *places, "--set", f"exit_interval={half + EXTRA_STEPS}")
    run(f"Train {method.title}, resumed", *command, *places, "--set", f"load={method.save}", "--set", f"iteration={half}")
    uninterrupted = losses(method.save / "metrics.jsonl.previous")
    resumed = losses(method.save / "metrics.jsonl")
    both = [step for step in sorted(uninterrupted) if step > half]
    difference = max(abs(uninterrupted[step] - resumed[step]) for step in both)
    if len(both) != EXTRA_STEPS or difference > (GPU_TOLERANCE if has_gpu() else 0):
        raise SystemExit(f"The resumed run differs from the uninterrupted one by up to {difference}: see {method.save}/metrics.jsonl*.")
    print(f"Steps {both[0]} to {both[-1]} after the resume repeat the uninterrupted run's losses; largest difference: {difference:g}.")


def devices(batch_size: int) -> list[str]:
    """As many processes as there are GPUs, or cores, and samples in a batch to share among them."""
    present = len(visible_gpus(os.environ)) or len(os.sched_getaffinity(0))
    ranks = max(count for count in range(1, present + 1) if batch_size % count == 0)
    return ["--set", f"num_gpus={ranks}", "--set", f"train_micro_batch_size_per_gpu={batch_size // ranks}"]


def has_gpu() -> bool:
    return bool(visible_gpus(os.environ))


def finish(method: Method, settings: dict[str, int]) -> Run:
    """Convert, score and sample one trained model."""
    checkpoint = method.save / f"global_step{settings['train_iters']}"
    run(f"Convert {method.title}", "tools/ckpts/convert_neox_to_hf.py", "--input_dir", checkpoint, "--output_dir", method.converted, quiet=True)
    scores = OUT / f"{method.name}-scores"
    run(
        f"Score {method.title} with lm-eval",
        *("-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={method.converted},trust_remote_code=True,dtype=float32"),
        *("--include_path", "configs/eval", "--tasks", ",".join(TASKS), "--batch_size", "8", "--output_path", scores),
        *(("--device", "cpu") if not has_gpu() else ()),
        environment={"SEPLLM_EVAL_DATA": str(OUT / "eval"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        quiet=True,
    )
    results = json.loads(max(scores.rglob("results_*.json")).read_text())["results"]
    return Run.read(method.title, method.save, results={task: results[task] for task in TASKS}, converted=method.converted, prompt=PROMPT)


def write_eval_files() -> None:
    """Perplexity and next-sentence tasks from the held-out documents."""
    from megatron.data.indexed import IndexedDataset
    from megatron.data.tokenizer import HFTokenizer
    from tools.datasets.eval_tasks import make_eval_files

    tokenizer = HFTokenizer.from_file(DATA / "tokenizer.json")
    documents = IndexedDataset(DATA / "test")
    make_eval_files((tokenizer.decode(documents[i][:-1].tolist()) for i in range(len(documents))), OUT / "eval", seed=0)


def losses(path: Path) -> dict[int, float]:
    """Training loss by iteration."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["iteration"]: row["train/lm_loss"] for row in rows if "train/lm_loss" in row}


def run(title: str, *command: object, environment: dict[str, str] | None = None, quiet: bool = False) -> None:
    """Run one of this project's commands; leave if it fails. ``quiet`` shows what it writes to stderr only then."""
    words = [str(word) for word in command]
    print(f"\n=== {title}\n$ python {shlex.join(words)}", flush=True)
    added = ({} if has_gpu() else {"DS_ACCELERATOR": "cpu"}) | (environment or {})
    errors = subprocess.PIPE if quiet else None
    done = subprocess.run([sys.executable, *words], env=os.environ | added, stderr=errors, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stderr or ''}\n{title} failed with status {done.returncode}.")


if __name__ == "__main__":
    sys.exit(until_stopped(main))

"""docs/readme-commands.md: each command of its right columns runs, on tiny models, data and tasks of the names that it gives."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
import yaml
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from sepllm.hf import SepCache, SepLLMGPTNeoXConfig, SepLLMGPTNeoXForCausalLM
from tests.sepllm.byte_tokenizer import byte_tokenizer
from tests.test_data_document import PILE, write_pieces
from tools.datasets.checksum_shards import write_hashes

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "readme-commands.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines() if line.startswith("| ") and "section |" not in line]
COMMANDS = [command for row in ROWS for command in re.findall(r"`(python [^`]*)`", row[2])]
"""Of the right columns, in their order."""
RUNS = [command for command in COMMANDS if "-d configs" not in command]
CONFIGURATIONS = [command for command in COMMANDS if "-d configs" in command]
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
LAYERS, HEADS, HEAD_SIZE = 2, 4, 8
SHAPE = {"vocab_size": 257, "hidden_size": HEADS * HEAD_SIZE, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 32}
SHAPE |= {"max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
CHOICES = ("arc_challenge", "arc_easy", "lambada_openai", "logiqa", "piqa", "sciq", "winogrande", "wsc")
TASK = {"custom_dataset": "!function rows.load", "test_split": "test", "fewshot_split": "test"}


def write_models(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2))
    made = {
        "meta-llama/Meta-Llama-3-8B": llama,
        "meta-llama/Meta-Llama-3-8B-Instruct": llama,
        "EleutherAI/pythia-160m-deduped": GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)),
        "Gausson/pythia-160m-deduped-SepLLM": SepLLMGPTNeoXForCausalLM(SepLLMGPTNeoXConfig(**SHAPE, prefill_local_window_size=16)),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def write_tasks(folder: Path) -> None:
    """Tasks of lm-eval's names, with a few rows."""
    place = folder / "tasks"
    place.mkdir()
    rows = [{"question": f"What is {number} and one?", "answer": f"It is #### {number + 1}", "page": "It rained, again. " * 9} for number in range(7)]
    (place / "rows.py").write_text(f"import datasets\n\ndef load(**_):\n    return datasets.DatasetDict(test=datasets.Dataset.from_list({rows!r}))\n")
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": 0, "doc_to_choice": "{{[answer, question]}}"}
    written = {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    written |= {"generation_kwargs": {"until": ["."], "max_gen_toks": 8, "do_sample": False}}
    page = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}"}
    for name, more in {**dict.fromkeys(CHOICES, choice), "gsm8k_cot": written, "wikitext": page}.items():
        text = yaml.safe_dump({"task": name, **TASK, **more}).replace("'!function rows.load'", "!function rows.load")
        (place / f"{name}.yaml").write_text(text)


def write_files(folder: Path) -> None:
    """Everything that the page takes for granted, small."""
    write_models(folder)
    write_tasks(folder)
    (folder / "pg19" / "test").mkdir(parents=True)
    (folder / "pg19" / "test" / "books.jsonl").write_text(json.dumps({"text": "It rained, and it rained. He went home; so did I.\n" * 17}) + "\n")
    keys = {"Layer_num": LAYERS, "separator_token_ids": [14, 12], "init_tok_max_idx": 2}
    keys |= {"prefill_local_window_size": 256, "generate_local_window_size": 256}
    (folder / "Llama3_trnfree_sepllm_configs").mkdir()
    (folder / "Llama3_trnfree_sepllm_configs" / "llama3_sepllm_a3_n256.yml").write_text(yaml.safe_dump(keys))
    write_pieces(folder / "pythia_deduped_pile_idxmaps", PILE, [[number % 200 for number in range(60)]] * 83, piece_bytes=120)
    write_hashes(folder / "pythia_deduped_pile_idxmaps", folder / "shard_hashes.txt")
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / "config.yml").write_text(yaml.safe_dump(tiny_run(folder)))


def tiny_run(folder: Path) -> dict[str, object]:
    """The keys that the page shows, over those of a tiny model that trains for two steps on the data that an earlier command joined."""
    (snippet,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    shown = yaml.safe_load("{" + snippet + "}")
    del shown["load"], shown["hostfile"]  # nothing is saved yet; one machine
    tiny = yaml.safe_load((ROOT / "configs" / "local" / "tiny.yml").read_text())
    tiny |= yaml.safe_load((ROOT / "configs" / "local" / "tiny-sepllm.yml").read_text())
    del tiny["data_path"], tiny["split"]
    prefix = str(folder / "pythia_pile_idxmaps" / PILE)
    places = {key: [prefix] for key in shown if key.endswith("data-paths")} | {"save": str(folder / "your_model_checkpoints"), "checkpoint-factor": 2}
    places["vocab-file"] = str(folder / "Gausson" / "pythia-160m-deduped-SepLLM" / "tokenizer.json")
    assert places.keys() == shown.keys()
    short = {"num_gpus": 1, "train_batch_size": 2, "train_iters": 2, "eval_interval": 2, "eval_iters": 1, "seq_length": 32}
    return tiny | places | short | {"tokenizer_type": "HFTokenizer", "master_port": 29847}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_files(folder)
    return folder


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The world as working directory; lm-eval with its tasks only, since its own take ten seconds to index."""
    monkeypatch.chdir(world)
    tasks = partial(lm_eval.tasks.TaskManager, include_path=str(world / "tasks"), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda *_, **__: tasks())
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)
    return world


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of a command, in this process except where it starts others."""
    words = shlex.split(command.replace("--device cuda:0", "--device cpu"))[1:]
    if words[0].endswith("deepy.py"):
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        paths = [str(ROOT / word) if word.endswith(".py") else word for word in words]
        done = subprocess.run([sys.executable, *paths], env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.returncode
    if words[0] != "-m":
        return int(importlib.import_module(words[0].removesuffix(".py").replace("/", ".")).main(words[1:]) or 0)
    if words[1] == "sepllm.ops.extension":
        importlib.import_module(words[1]).main()
        return 0
    module = importlib.import_module(f"{words[1]}.__main__" if words[1] in ("sepllm.streaming", "sepllm.lm_eval") else words[1])
    if words[1] == "sepllm.lm_eval":
        monkeypatch.setattr(sys, "argv", ["lm_eval", *words[2:]])
        return int(module.main())
    return int(module.main(words[2:]))


@pytest.mark.parametrize("number", range(len(RUNS)), ids=lambda number: f"{number} {' '.join(RUNS[number].split()[1:3])}")
def test_the_command_runs(here: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In their order: training reads the data that was joined before, and what it saves is converted and scored."""
    status = run(RUNS[number], monkeypatch)
    assert status == 0, RUNS[number] + capsys.readouterr().err


@pytest.mark.parametrize("command", CONFIGURATIONS)
def test_the_configuration_is_one_of_ours(command: str) -> None:
    from megatron.config.loader import load_config

    words = shlex.split(command)
    files = [ROOT / "configs" / f"{name}.yml" for name in words[words.index("configs") + 1 :]]
    assert load_config(files, world_size=32, device="cuda").training.train_iters == 143_000


def test_every_method_of_ours_is_on_the_page() -> None:
    assert set(re.findall(r"method/(\S+) ", PAGE)) == {path.stem for path in (ROOT / "configs" / "method").glob("*.yml")}


def test_environments_are_extras_of_the_package() -> None:
    wanted = set(re.findall(r"pip install '\.\[(\w+)\]'", PAGE))
    assert wanted == {"hf", "eval"}
    assert wanted <= tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    assert "make setup" in PAGE
    assert re.search(r"^setup:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_python_of_the_page_runs(here: Path) -> None:
    length = 12
    states = torch.randn(1, HEADS, length, HEAD_SIZE)
    angles = torch.arange(length)[:, None] * torch.ones(HEAD_SIZE)
    names: dict[str, object] = {
        "head_dim": HEAD_SIZE,
        "num_layers": LAYERS,
        "max_position_embeddings": 512,
        "q_len": length,
        "key_states": states,
        "value_states": states,
        "query_states": states,
        "input_ids": torch.arange(1, length + 1)[None],
        "position_ids": torch.arange(length)[None],
    }
    names |= {"sin": angles.sin()[None], "cos": angles.cos()[None], "sin_q": angles.sin()[None], "cos_q": angles.cos()[None]}
    of_readme, in_a_model, shifted, combined = PYTHON
    exec(of_readme, names)
    assert names["past_key_values"].get_usable_length() == length  # type: ignore[attr-defined]
    exec(in_a_model, names)
    assert names["outputs"].past_key_values.get_seq_length() == len("My name is Llama 3")  # type: ignore[attr-defined]
    exec(shifted, names)
    assert names["queries"].shape == states.shape  # type: ignore[attr-defined]
    with pytest.warns(FutureWarning, match="from_legacy_cache is deprecated"):
        exec(combined, names)
    assert all(isinstance(cache, SepCache) for cache in names["caches"])  # type: ignore[attr-defined]

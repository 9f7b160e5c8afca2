"""A written folder generates from a SepCache in a process that has no `sepllm`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sepllm.hf import SepCache, attach, attachment_of
from sepllm.hf.bundle import write_custom_generate
from sepllm.hf.custom_generate import generate

SETTINGS = {"init_cache_size": 1, "sep_cache_size": 2, "local_size": 3, "cache_size": 10, "USE_MAX_SEP_CACHE": True}
SETTINGS |= {"separator_token_ids": [3, 4], "PADDING_ID": 0}

ELSEWHERE = """
import sys
from pathlib import Path

class NoSepLLM:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sepllm":
            raise ImportError("sepllm is not installed here")

sys.meta_path.insert(0, NoSepLLM())
import torch
from transformers import AutoModelForCausalLM

folder, settings = Path(sys.argv[1]), eval(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
ids = torch.load(folder / "ids.pt")
text = model.generate(ids, max_new_tokens=20, do_sample=False, custom_generate=str(folder / "recipe"), trust_remote_code=True, **settings)
torch.save(text, folder / "text.pt")
"""


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, initializer_range=0.3)
    config.eos_token_id = config.bos_token_id = None
    return LlamaForCausalLM(config).eval()


def test_the_folder_generates_what_an_attached_model_generates(model: LlamaForCausalLM, tmp_path: Path) -> None:
    ids = torch.randint(3, 30, (2, 12), generator=torch.Generator().manual_seed(0))
    with attach(model):
        expected = model.generate(ids, past_key_values=SepCache(layer_num=2, **SETTINGS), max_new_tokens=20, do_sample=False)
    assert torch.equal(generate(model, ids, max_new_tokens=20, do_sample=False, **SETTINGS), expected)
    assert attachment_of(model) is None
    model.save_pretrained(tmp_path / "model")
    torch.save(ids, tmp_path / "ids.pt")
    assert (tmp_path / "recipe" / "custom_generate" / "generate.py") in write_custom_generate(tmp_path / "recipe")
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", str(tmp_path / "elsewhere.py"), str(tmp_path), repr(SETTINGS)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path / "text.pt"), expected)


def test_a_cache_and_settings_of_another_are_refused(model: LlamaForCausalLM) -> None:
    ids = torch.randint(3, 30, (1, 12))
    with pytest.raises(ValueError, match="leave one of them out"):
        generate(model, ids, past_key_values=SepCache(layer_num=2, **SETTINGS), local_size=4)
    generate(model, ids, max_new_tokens=3, do_sample=False)
    with pytest.raises(ValueError, match="must be less than cache_size"):
        generate(model, ids, cache_size=10)

"""A checkpoint folder with its model code loads, generates and saves in a process that has no `sepllm`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sepllm.hf import SepLLMGPTNeoXForCausalLM
from sepllm.hf.bundle import bundle_texts, write_bundle

ELSEWHERE = """
import sys
from pathlib import Path

class NoSepLLM:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sepllm":
            raise ImportError("sepllm is not installed here")

sys.meta_path.insert(0, NoSepLLM())
try:
    import sepllm
except ImportError:
    pass
else:
    raise SystemExit("sepllm can be imported: this checks nothing")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

folder, work = map(Path, sys.argv[1:])
ids = torch.load(work / "ids.pt")
for source in (folder, work / "again"):
    assert AutoConfig.from_pretrained(source, trust_remote_code=True).decode_pattern().windows == (3, 3, 3)
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(ids).logits
    text = model.generate(ids, max_new_tokens=6, do_sample=False)
    torch.save((logits, text), work / f"{source.name}.pt")
    model.save_pretrained(work / "again")
"""


def test_the_bundle_is_the_model_where_sepllm_is_not_installed(saved: Path, tmp_path: Path) -> None:
    write_bundle(saved)
    ids = torch.arange(24).reshape(2, 12) % 9
    torch.save(ids, tmp_path / "ids.pt")
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", str(tmp_path / "elsewhere.py"), str(saved), str(tmp_path)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]

    model = AutoModelForCausalLM.from_pretrained(saved).eval()
    with torch.no_grad():
        logits = model(ids).logits
    text = model.generate(ids, max_new_tokens=6, do_sample=False)
    for name in (saved.name, "again"):
        their_logits, their_text = torch.load(tmp_path / f"{name}.pt")
        torch.testing.assert_close(their_logits, logits)
        assert their_text.tolist() == text.tolist()


def test_where_sepllm_is_installed_its_own_code_is_used(saved: Path, tmp_path: Path) -> None:
    write_bundle(saved)
    model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    assert type(model) is SepLLMGPTNeoXForCausalLM
    model.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_bundled_modules_import_each_other_and_no_package_that_may_be_missing() -> None:
    texts = bundle_texts()
    assert {"modeling_sepllm_gpt_neox", "configuration_sepllm_gpt_neox", "sepllm_attention_dense", "sepllm_layout"} < set(texts)
    for name, text in texts.items():
        compile(text, name, "exec")
        for line in text.splitlines():
            words = line.split()
            if words[:1] in (["from"], ["import"]) and line == line.lstrip():
                target = words[1]
                assert target.lstrip(".") in texts if target.startswith(".") else target.split(".")[0] in {
                    "__future__", "collections", "dataclasses", "huggingface_hub", "importlib", "math", "re", "torch",
                    "transformers", "types", "typing",
                }, (name, line)  # fmt: skip


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        write_bundle(tmp_path)

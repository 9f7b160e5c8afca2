"""The arms of the study: method files of configs/ on the study's model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron.config.loader import load_config
from megatron.config.schema import Config

CONFIGS = Path(__file__).parents[3] / "configs"
BASE = CONFIGS / "local" / "study.yml"
TITLES = {
    "full": "full attention",
    "streamingllm-n64": "StreamingLLM n=64",
    "sepllm-n64": "SepLLM n=64",
    "sepllm-n128": "SepLLM n=128",
    "sepllm-n64H": "SepLLM n=64, H",
    "sepllm-n64HT": "SepLLM n=64, HT",
    "sa": "full, SA-softmax",
    "sepllm-n64HT-bipe-rotary": "SepLLM n=64, HT, BiPE",
}
"""Of the methods that run by default, in this order; other files are called as they are."""
SEPARATOR_KEYS = ("separator_token_ids", "BiPE_seps")
"""Keys of a method file that hold ids of the Pythia tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to attend, as its file in configs/method says it."""

    path: Path

    @classmethod
    def find(cls, word: str) -> Method:
        """By its name in configs/method, or the path of any such file."""
        path = Path(word) if word.endswith((".yml", ".yaml")) else CONFIGS / "method" / f"{word}.yml"
        if not path.exists():
            known = ", ".join(sorted(file.stem for file in (CONFIGS / "method").glob("*.yml")))
            raise ValueError(f"There is no method file {path}: give the path of a YAML file, or one of {known}.")
        return cls(path=path)

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def title(self) -> str:
        return TITLES.get(self.name, self.name)

    def config(self, base: Path, *, separators: Sequence[int], overrides: Mapping[str, object]) -> Config:
        """The run of this method on the model of ``base``, with ``separators`` wherever the file names any; one process on a CPU."""
        return load_config([base, self.path], overrides={**self._separators(separators), **overrides}, world_size=1, device="cpu")

    def _separators(self, found: Sequence[int]) -> dict[str, object]:
        """The keys of the file whose ids are another tokenizer's, with ``found`` instead. ``[-1]`` says that there are none, and stays."""
        keys = {key.replace("-", "_"): value for key, value in yaml.safe_load(self.path.read_text(encoding="utf-8")).items()}
        return {key: list(found) for key in SEPARATOR_KEYS if key in keys and keys[key] != [-1]}

"""Imports point one way: read from the syntax tree, function-level imports included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "sepllm.pattern": set(),
    "sepllm.layout": {"sepllm.pattern"},
    "sepllm.positions": {"sepllm.pattern", "sepllm.layout"},
    "sepllm.pieces": {"sepllm.pattern", "sepllm.layout"},
    "sepllm.sampling": set(),
    "sepllm.completion": {"sepllm.sampling"},
    "sepllm.ops": set(),
    "sepllm.attention": {"sepllm.pattern", "sepllm.layout", "sepllm.positions", "sepllm.ops"},
    "sepllm.cache": {"sepllm.pattern", "sepllm.layout", "sepllm.positions"},
    "sepllm.hf": {"sepllm.pattern", "sepllm.layout", "sepllm.positions", "sepllm.sampling", "sepllm.completion", "sepllm.attention", "sepllm.cache"},
    "sepllm.streaming": {"sepllm.pattern", "sepllm.cache", "sepllm.hf"},
    "sepllm.lm_eval": {"sepllm.__version__", "sepllm.pattern", "sepllm.layout", "sepllm.hf"},
    "megatron.config": {"sepllm.pattern"},
    "megatron.launch": {"megatron.config", "megatron.data", "megatron.optim.schedule", "sepllm"},
    "megatron.parallel": {"megatron.config", "sepllm"},
    "megatron.data": {"megatron.config", "sepllm"},
    "megatron.model": {"megatron.config", "megatron.parallel", "sepllm"},
    "megatron.optim": {"megatron.config", "megatron.parallel"},
    "megatron.training": {"megatron.config", "megatron.parallel", "megatron.data", "megatron.model", "megatron.optim", "sepllm"},
    "megatron.inference": {
        "megatron.config",
        "megatron.parallel",
        "megatron.data",
        "megatron.model",
        "megatron.training",
        "sepllm",
    },
}
"""Which of this project's packages each one may import, itself aside. Nobody imports `tools`."""


def modules(package: str) -> list[Path]:
    place = ROOT / Path(*package.split("."))
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")] if place.with_suffix(".py").exists() else []


def imported(path: Path) -> set[str]:
    """Full names of everything of this project that a file imports."""
    names: set[str] = set()
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], base]).rstrip(".")
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("sepllm", "megatron", "tools")}


def is_within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_package_imports_only_what_the_table_allows(package: str) -> None:
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in modules(package)
        for name in imported(path)
        if not is_within(name, {package} | MAY_IMPORT[package])
    }
    assert not wrong


def test_every_package_is_in_the_table() -> None:
    top = {"sepllm": "sepllm", "megatron": "megatron"}
    found = {
        f"{name}.{path.stem}"
        for name, folder in top.items()
        for path in (ROOT / folder).iterdir()
        if (path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))) and not path.name.startswith("__")
    }
    assert found <= set(MAY_IMPORT)


def test_attention_cores_do_not_import_one_another() -> None:
    folder = ROOT / "sepllm" / "attention"
    cores = {path.stem for path in folder.glob("*.py")} - {"__init__", "registry", "spec", "measured", "self_adjust"}
    for core in cores:
        others = {f"sepllm.attention.{other}" for other in cores - {core}}
        assert not {name for name in imported(folder / f"{core}.py") if is_within(name, others)}


def test_only_parallel_touches_torch_distributed() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for folder in ("sepllm", "megatron")
        for path in (ROOT / folder).rglob("*.py")
        if "parallel" not in path.parts and "torch.distributed" in path.read_text()
    ]
    assert not wrong

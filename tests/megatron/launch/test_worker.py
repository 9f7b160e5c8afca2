"""A worker's configuration, however the worker was started."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.config.loader import config_to_json
from megatron.config.schema import Config
from megatron.launch.environment import REPOSITORY
from megatron.launch.worker import worker_config

LOCAL = str(REPOSITORY / "configs" / "local")
YAML = ["-d", LOCAL, "tiny", "tiny-sepllm"]
TinyConfig = Callable[..., Config]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"DS_ACCELERATOR": "cpu", "XDG_CACHE_HOME": str(tmp_path)}


def test_a_file_holds_the_resolved_configuration(tiny: TinyConfig, environ: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(config_to_json(tiny(world_size=2, seed=7)))
    assert worker_config(["--local_rank=1", "--config", str(path)], environ) == tiny(world_size=2, seed=7)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_yaml_is_resolved_for_as_many_devices_as_the_starter_announces(tiny: TinyConfig, environ: dict[str, str], name: str) -> None:
    assert worker_config([*YAML, "--set", "seed=7"], environ | {name: "4"}) == tiny(world_size=4, seed=7)


def test_alone_it_is_one_device(tiny: TinyConfig, environ: dict[str, str]) -> None:
    assert worker_config(YAML, environ) == tiny(world_size=1)


def test_the_environment_is_completed(environ: dict[str, str], tmp_path: Path) -> None:
    worker_config(YAML, environ)
    assert environ["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert tmp_path in Path(environ["TORCH_EXTENSIONS_DIR"]).parents
    assert Path(environ["TORCH_EXTENSIONS_DIR"]).is_dir()


@pytest.mark.parametrize(
    "argv", [[], ["--config", "x.json", "a.yml"], ["--config", "x.json", "--set", "seed=1"], [*YAML, "--set", "sed=1"], ["--config", "nowhere.json"]]
)
def test_wrong_arguments_end_with_status_2(argv: list[str], environ: dict[str, str]) -> None:
    with pytest.raises(SystemExit) as ended:
        worker_config(argv, environ)
    assert ended.value.code == 2


def test_no_torch_is_imported() -> None:
    code = f"import sys; from megatron.launch.worker import worker_config; worker_config({YAML!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0

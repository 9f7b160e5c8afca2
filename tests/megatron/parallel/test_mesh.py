from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron.config.schema import Config
from megatron.parallel.collectives import barrier, broadcast_object, gather_objects, is_true_anywhere, mean_over_data_parallel
from megatron.parallel.mesh import Mesh, _axes
from tests.megatron.training.running import tiny_config, without_launcher


@pytest.fixture(autouse=True)
def bare_environment() -> Iterator[None]:
    """No launcher has set anything."""
    with without_launcher():
        yield


def config(**changes: object) -> Config:
    return tiny_config("unused", Path("unused"), **changes)  # type: ignore[arg-type]


def test_a_process_without_a_launcher_is_the_whole_run() -> None:
    mesh = Mesh.start(config())
    assert (mesh.world_size, mesh.rank, mesh.data.size, mesh.data.rank) == (1, 0, 1, 0)
    assert mesh.device == torch.device("cpu")
    assert mesh.is_first


def test_ranks_count_shards_then_pieces_then_replicas_then_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of each: rank 6 is shard 0 of piece 1 of replica 1 of stage 0."""
    monkeypatch.setattr(torch.distributed, "new_subgroups_by_enumeration", lambda lines: (lines, None))
    parallel = {"pipe_parallel_size": 2, "model_parallel_size": 2, "context_parallel_size": 2}
    alone = config()
    resolved = alone.model_copy(
        update={"parallel": alone.parallel.model_copy(update=parallel), "batch": alone.batch.model_copy(update={"data_parallel_size": 2})}
    )
    axes = _axes(resolved, rank=6)
    places = {name: (axis.rank, next(line for line in axis.group if 6 in line)) for name, axis in axes.items()}
    assert places == {
        "pipe": (0, [6, 14]),
        "data": (1, [2, 6]),
        "context": (1, [4, 6]),
        "tensor": (0, [6, 7]),
        "model": (0, [6, 7, 14, 15]),
        "gradients": (3, [0, 2, 4, 6]),
    }


def test_alone_every_collective_is_the_identity() -> None:
    mesh = Mesh.start(config())
    assert mean_over_data_parallel(torch.tensor([1.0, 2.0]), mesh).tolist() == [1.0, 2.0]
    assert (is_true_anywhere(True, mesh), is_true_anywhere(False, mesh)) == (True, False)
    assert broadcast_object("text", mesh) == "text"
    assert gather_objects("text", mesh) == ["text"]
    barrier(mesh)


def test_another_number_of_processes_than_resolved_is_refused() -> None:
    os.environ.update(RANK="0", WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    with pytest.raises(ValueError, match="The launcher started 3 processes but the configuration was resolved for 2 devices"):
        Mesh.start(config(world_size=2))


def test_a_scheduler_that_names_no_master_is_told_what_to_set() -> None:
    os.environ.update(SLURM_PROCID="1", SLURM_LOCALID="0", SLURM_NTASKS="2")
    with pytest.raises(ValueError, match="process 1 of several, but MASTER_ADDR and MASTER_PORT are not set"):
        Mesh.start(config(world_size=2))


def test_a_shell_inside_a_slurm_allocation_is_no_worker_of_it() -> None:
    os.environ.update(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="8")
    assert Mesh.start(config()).world_size == 1

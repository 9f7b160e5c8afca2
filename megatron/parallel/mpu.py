"""The mesh under the names that DeepSpeed asks its `mpu` for, which are those of Megatron's module of that name."""

from __future__ import annotations

from torch.distributed import ProcessGroup

from megatron.parallel.mesh import Axis, Mesh


class ModelParallelUnit:
    """What DeepSpeed knows as data parallel are all processes that sum their gradients, pieces of one sequence included."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_model_parallel_rank(self) -> int:
        return self._mesh.model.rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.model.size

    def get_model_parallel_group(self) -> ProcessGroup:
        return _group(self._mesh.model)

    def get_data_parallel_rank(self) -> int:
        return self._mesh.gradients.rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.gradients.size

    def get_data_parallel_group(self) -> ProcessGroup:
        return _group(self._mesh.gradients)

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.tensor.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._mesh.tensor.size

    def get_tensor_model_parallel_group(self) -> ProcessGroup:
        return _group(self._mesh.tensor)

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._mesh.pipe.rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._mesh.pipe.size

    def get_pipeline_model_parallel_group(self) -> ProcessGroup:
        return _group(self._mesh.pipe)


def _group(axis: Axis) -> ProcessGroup:
    if axis.group is None:
        raise ValueError("A run of one process has no groups: give DeepSpeed no mpu.")
    return axis.group

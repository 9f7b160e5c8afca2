"""What DeepSpeed does with the configuration that it gets."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from megatron.config.advice import advice
from megatron.config.deepspeed import deepspeed_config
from megatron.parallel.mesh import Mesh
from tests.megatron.training.running import MakeConfig

MICRO_BATCHES = 8
SMALL = 2.0**-10
"""Beside a gradient of 1, bf16 rounds it away; all of them together it does not."""


class Scaled(nn.Module):
    """One weight, whose gradient is what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))

    def forward(self, gradient: float) -> Tensor:
        return (self.weight * gradient).float().sum()


@pytest.mark.parametrize(("stage", "given"), [*product((0, 1, 2, 3), (None, "bf16")), *product((1, 2, 3), ("fp32",))])
def test_advice_on_sums_in_bf16_is_given_where_they_lose_small_gradients(make_config: MakeConfig, stage: int, given: str | None) -> None:
    batch = {"train_batch_size": MICRO_BATCHES, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": MICRO_BATCHES}
    config = make_config(precision="bfloat16", zero_stage=stage, batch=batch, optimizer={"gradient_clipping": 0.0})
    config = config.model_copy(update={"deepspeed": {} if given is None else {"data_types": {"grad_accum_dtype": given}}})
    Mesh.start(config)
    advised = [note for note in advice(config) if "8 micro-batches are summed in bf16" in note]
    loses_small = _summed(deepspeed_config(config)) == 1.0
    assert bool(advised) == loses_small == (given != "fp32")
    assert all(("zero_optimization.stage to 1" in note) == (stage == 0) for note in advised)


def _summed(settings: dict[str, object]) -> float:
    """The sum of a gradient of 1 and of all others, each `SMALL`, as one step of SGD at rate 1 shows it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    for gradient in (1.0, *[SMALL] * (MICRO_BATCHES - 1)):
        engine.backward(engine(gradient))
        engine.step()
    moved = safe_get_full_fp32_param(model.weight) if engine.zero_optimization() else engine.optimizer.fp32_groups[0][0]
    return -MICRO_BATCHES * float(moved.detach()[0])

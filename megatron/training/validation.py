"""Proof that a checkpoint was read right: the logits of a fixed text, stored with it and compared after loading."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron.config.schema import Config
from megatron.parallel.mesh import Mesh
from megatron.parallel.vocab import whole_vocabulary
from megatron.training import stages
from megatron.training.random_state import undisturbed
from sepllm.layout import TokenLayout

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

LOGITS = "validation_logits.pt"


@torch.no_grad()
def validation_logits(engine: DeepSpeedEngine, config: Config, mesh: Mesh) -> Tensor:
    """Logits of the whole vocabulary after each token of the text 0, 1, 2, ... ``[S, V]`` float32 on the CPU. All processes call this
    together."""
    ids = (torch.arange(config.model.seq_length) % (config.model.vocab_size or 1))[None]
    layout = TokenLayout.from_ids(ids, config.attention.prefill)
    engine.eval()
    with undisturbed(mesh.device):
        if mesh.pipe.size > 1:
            assert config.model.padded_vocab_size is not None
            logits = stages.logits_of(engine, layout, mesh, vocabulary=config.model.padded_vocab_size // mesh.tensor.size)
        else:
            logits = engine(ids.to(mesh.device), layout.to(mesh.device))
        logits = whole_vocabulary(logits, mesh.tensor)
    engine.train()
    return logits[0].float().cpu()


def check_logits(engine: DeepSpeedEngine, config: Config, mesh: Mesh, folder: Path) -> None:
    """Raises a sentence unless the model computes what it computed when ``folder`` was saved."""
    now = validation_logits(engine, config, mesh)
    if not (folder / LOGITS).is_file():
        raise ValueError(f"{folder} has no {LOGITS}: it was saved without checkpoint_validation_with_forward_pass, so load it without that key too.")
    then = torch.load(folder / LOGITS, weights_only=True)
    tokens = slice(config.model.vocab_size)  # what pads the vocabulary may be more or less in this layout
    now, then = now[:, tokens], then[:, tokens]
    tolerance = 1e-4 if config.precision.precision == "fp32" else 2e-2
    if not torch.allclose(now, then, rtol=tolerance, atol=tolerance):
        raise ValueError(
            f"The model of {folder} computes other logits than when it was saved (largest difference {float((now - then).abs().max()):.3g}): "
            "the files are damaged, or the configuration changes the mathematics."
        )

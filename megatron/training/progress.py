"""How far a run has come: three counts that are easily taken for one another."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Progress(BaseModel):
    """Position of a run between two iterations."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    iteration: int = 0
    """Training steps taken, those that an overflow skipped included."""
    applied_steps: int = 0
    """Optimizer updates made: what the learning-rate schedule counts."""
    consumed_samples: int = 0
    """Samples of the training data that were used: where the loader goes on."""

    def after_step(self, *, samples: int, is_skipped: bool) -> Progress:
        """The position one iteration later."""
        return Progress(
            iteration=self.iteration + 1,
            applied_steps=self.applied_steps + (not is_skipped),
            consumed_samples=self.consumed_samples + samples,
        )

"""Reward functions: a batch of rollouts in, one number each (and its parts) out."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from datamodules.experience import FinishReason, Rollouts


class RewardFunction(Protocol):
    """Scores a whole batch at once, so that a reward may look at its group."""

    def __call__(self, rollouts: Rollouts) -> dict[str, Tensor]:
        """Named parts ``(N,)``; ``reward`` is the total."""


class VerifierReward:
    """The verifier of each prompt's own task.

    Args:
        truncated: Reward of a completion that was cut off or failed; None lets the verifier judge
            it as it is.
    """

    def __init__(self, *, truncated: float | None = 0.0) -> None:
        self.truncated = truncated

    def __call__(self, rollouts: Rollouts) -> dict[str, Tensor]:
        """Verify each completion by its own task. Parts that a task lacks are 0."""
        rows = []
        for prompt, completion in zip(rollouts.prompts, rollouts.completions, strict=True):
            row = dict(prompt.task.verify(prompt, completion))
            if self.truncated is not None and completion.finish_reason is not FinishReason.STOP:
                row["reward"] = self.truncated
            rows.append(row)
        names = sorted({name for row in rows for name in row} | {"reward"})
        return {name: torch.tensor([row.get(name, 0.0) for row in rows]) for name in names}

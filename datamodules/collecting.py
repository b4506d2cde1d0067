"""Small parts of collecting a rollout: bad rewards, a stopwatch, means over ranks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from datamodules.experience import Rollouts


def without_bad_rewards(rollouts: Rollouts) -> dict[str, Any]:
    """Make rewards that are not finite harmless, and count them.

    Such a completion takes the mean of its group's finite rewards (0 where there is none), so that
    the others' baseline does not move, and is not trained on [our choice].

    Args:
        rollouts: Scored; its rewards are changed in place where they are not finite.

    Returns:
        ``rollout/reward_not_finite`` as (sum, count).
    """
    reward = rollouts.reward
    assert reward is not None
    bad = ~torch.isfinite(reward)
    if bad.any():
        warnings.warn(  # of any rank: another may have none
            f"{int(bad.sum())} of {len(bad)} rewards of rollout {rollouts.index} are not finite, "
            f"such as that of prompt {rollouts.prompts[int(bad.nonzero()[0])].uid!r}: these "
            f"completions are not trained on",
            stacklevel=2,
        )
        size = int(rollouts.groups.max()) + 1
        zeros = torch.zeros(size, dtype=torch.float64)
        fine = torch.where(bad, 0.0, reward.double())
        total = zeros.index_add(0, rollouts.groups, fine)
        count = zeros.index_add(0, rollouts.groups, (~bad).double())
        mean = (total / count.clamp(min=1)).to(reward.dtype)
        rollouts.reward = torch.where(bad, mean[rollouts.groups], reward)
        rollouts.parts = {**rollouts.parts, "reward": rollouts.reward}
        rollouts.leave_out(bad)
    return {"rollout/reward_not_finite": (float(bad.sum()), float(len(bad)))}


class Clock:
    """Seconds of each part of a rollout, in ``laps``."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Close a part."""
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now


def mean_over_ranks(values: Sequence[float]) -> list[float]:
    """Mean of each number over the ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return (tensor / dist.get_world_size()).tolist()

"""PPO's advantages of one rank's rollouts; a script for torchrun.

``advantages_worker.py <output folder> <case> ...`` writes ``<case>.<rank>.pt`` for each case.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from datamodules.experience import Completion, FinishReason, Prompt, Rollouts
from datamodules.tasks.prefix_audit import PrefixAudit
from lightning_modules.backbones.critic import ValueHead
from lightning_modules.policy_rl.ppo import PPO

#: Tokens of every completion; ranks share them unequally, and one is empty.
SIZES = (4, 1, 6, 3, 0, 2, 5)
#: Rows of each rank, and rows that are not trained on.
CASES: dict[str, tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]] = {
    "all": (((0, 1, 2, 3, 4), (5, 6)), ()),
    "some_left_out": (((0, 1, 2, 3, 4), (5, 6)), (2, 5)),
    "one_rank_left_out": (((0, 1, 2, 3, 4), (5, 6)), (5, 6)),
    "nothing_left": (((0, 1, 2, 3, 4), (5, 6)), tuple(range(7))),
}


def rollouts_of(rows: tuple[int, ...], left_out: tuple[int, ...]) -> Rollouts:
    """Scored and annotated, with values that differ from row to row; 0 where none is computed.

    Args:
        rows: Which completions.
        left_out: Which of all are not trained on.
    """
    generator = torch.Generator().manual_seed(0)
    values = 3 * torch.rand(len(SIZES), max(SIZES), generator=generator)
    values[list(left_out)] = 0.0
    reward = 5 * torch.rand(len(SIZES), generator=generator)
    prompt = Prompt("p", (3,), PrefixAudit(num_train=1))
    made = [
        Completion(tuple([5] * n), tuple([-1.0] * n), FinishReason.STOP)
        for n in (SIZES[row] for row in rows)
    ]
    rollouts = Rollouts.from_groups([prompt], [made])
    rollouts.reward = reward[list(rows)]
    rollouts.leave_out(torch.tensor([row in left_out for row in rows]))
    rollouts.extra["values"] = values[list(rows), : rollouts.mask.shape[1]]
    return rollouts


def found(rollouts: Rollouts) -> tuple[Tensor, dict[str, Any]]:
    """Advantages ``(N, T)`` and metrics by PPO's own hook."""
    module = PPO(backbone="not read", gamma=0.9, gae_lambda=0.8)
    module.critic = ValueHead(2)
    advantages, metrics = module.advantages(rollouts)
    return advantages, {name: (float(a), float(b)) for name, (a, b) in metrics.items()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for case in sys.argv[2:]:
        shares, left_out = CASES[case]
        result = found(rollouts_of(shares[dist.get_rank()], left_out))
        torch.save(result, Path(sys.argv[1]) / f"{case}.{os.environ['RANK']}.pt")
    dist.destroy_process_group()

"""Passes over rollouts without gradient, a bounded number of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from datamodules.experience import Experience, Rollouts


@torch.no_grad()
def pieces_without_grad(
    module: Any, rollouts: Rollouts, part: Any, compute: Callable[[Experience], Tensor]
) -> list[Tensor]:
    """``compute(piece)`` of ``module.annotate_batch_size`` rows at a time, float32 on the CPU.

    Args:
        module: A ``PolicyModule``.
        rollouts: Whose completions.
        part: The module that computes; in eval mode and the Trainer's precision meanwhile, so that
            a ratio of log-probs is 1 before the first step.
        compute: From rows on the module's device to one tensor.
    """
    full, size = rollouts.batch(), module.annotate_batch_size
    was_training = part.training
    part.eval()
    pieces = []
    for start in range(0, len(full), size):
        rows = torch.arange(start, min(start + size, len(full)))
        plugin: Any = getattr(module._trainer, "precision_plugin", None)
        with plugin.forward_context() if plugin else nullcontext():
            result = compute(move_data_to_device(full.select(rows), module.device))
        pieces.append(result.detach().float().cpu())
    part.train(was_training)
    return pieces

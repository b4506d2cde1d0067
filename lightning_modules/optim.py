"""Optimizer and schedule from plain options."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from lightning_modules.functional.choices import check_choice
from lightning_modules.options import OptimizerOptions


def total_steps(trainer: Any) -> int:
    """Optimizer steps of a run.

    Args:
        trainer: Set up for training.
    """
    if trainer.max_steps > 0:
        return int(trainer.max_steps)
    total = int(trainer.estimated_stepping_batches)
    # Lightning has opened the loader for that, and would not hand it the place of a checkpoint,
    # which is read later: it is opened anew
    trainer.fit_loop._combined_loader = None
    return total


def lr_factor(step: int, options: OptimizerOptions, total_steps: int) -> float:
    """Factor on ``lr`` of optimizer step ``step`` (0 is the first)."""
    warmup = options.warmup_steps or math.ceil(options.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if options.schedule == "constant":
        return 1.0
    span = max(1, total_steps - warmup)
    progress = min(1.0, (step - warmup) / span)
    low = options.final_fraction
    if options.schedule == "linear":
        return 1.0 + (low - 1.0) * progress
    return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))


def staged_factor(step: int, options: OptimizerOptions, stages: Sequence[int]) -> float:
    """Factor on ``lr`` of optimizer step ``step`` of a run in stages.

    Args:
        step: 0 is the first.
        options: Of the schedule of every stage.
        stages: Optimizer steps of each; steps after the last belong to it.

    Example:
        >>> options = OptimizerOptions(warmup_steps=2)
        >>> [staged_factor(step, options, [3, 3]) for step in range(6)]
        [0.5, 1.0, 1.0, 0.5, 1.0, 1.0]
    """
    for steps in stages[:-1]:
        if step < steps:
            return lr_factor(step, options, steps)
        step -= steps
    return lr_factor(step, options, stages[-1])


def build_optimizer(
    groups: Iterable[Mapping[str, Any]], options: OptimizerOptions, stages: Sequence[int]
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns: the optimizer and a schedule stepped every step.

    Args:
        groups: Parameter groups; one with ``options`` has all of its own but the class.
        options: Of the optimizer, and of all other groups.
        stages: Optimizer steps of each stage of the run; the schedule starts again with a stage.

    Raises:
        ValueError: The class cannot be imported, or an unknown schedule.
    """
    parts = [dict(group) for group in groups]
    own: list[OptimizerOptions] = [part.pop("options", options) for part in parts]
    for each in own:
        check_choice("optimizer.schedule", each.schedule, ("constant", "linear", "cosine"))
    module, _, name = options.class_path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"optimizer.class_path={options.class_path!r} cannot be imported ({error}); "
            f"use for example 'torch.optim.AdamW'"
        ) from error
    known = inspect.signature(cls).parameters
    values: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    if "betas" in known:
        values["betas"] = tuple(options.betas)
    if cls in (torch.optim.Adam, torch.optim.AdamW):  # others have no fused step for shards
        values["fused"] = True
    values |= options.extra
    for part, each in zip(parts, own, strict=True):
        part |= {"lr": each.lr, "weight_decay": each.weight_decay}
        if "betas" in known:
            part["betas"] = tuple(each.betas)
        part |= each.extra
    optimizer = cls(parts, **values)
    factors: list[Any] = [partial(staged_factor, options=each, stages=stages) for each in own]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

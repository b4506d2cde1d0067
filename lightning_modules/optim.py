"""Optimizer and schedule from plain options."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch

from lightning_modules.functional.choices import check_choice
from lightning_modules.options import OptimizerOptions


def lr_factor(step: int, options: OptimizerOptions, total_steps: int) -> float:
    """Factor on ``lr`` of optimizer step ``step`` (0 is the first)."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return 1.0
    span = max(1, total_steps - options.warmup_steps)
    progress = min(1.0, (step - options.warmup_steps) / span)
    low = options.final_fraction
    if options.schedule == "linear":
        return 1.0 + (low - 1.0) * progress
    return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_optimizer(
    groups: Iterable[Mapping[str, Any]], options: OptimizerOptions, total_steps: int
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns: the optimizer and a schedule stepped every step.

    Args:
        groups: Parameter groups; one with ``options`` has all of its own but the class.
        options: Of the optimizer, and of all other groups.
        total_steps: Optimizer steps of the run.

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
    factors: list[Any] = [partial(lr_factor, options=each, total_steps=total_steps) for each in own]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

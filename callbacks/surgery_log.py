"""What gradient surgery shows: cosines between domains, who was boosted, what it cost.

Scalars go through the module's ``record`` (or ``log``), so that they are logged once a step; the
heat map and the histogram go straight to loggers that can take them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_modules.functional.surgery import conflict_fraction, cosine_to_sum, cosines
from lightning_modules.functional.units import KINDS, Units


class Step(NamedTuple):
    """One step's surgery.

    Args:
        gram: ``(P, K, K)`` dot products, a parameter.
        weights: ``(U, K)``.
        domains: ``K`` names.
        milliseconds: That it took.
        mebibytes: Of the domains' gradients on this rank.
    """

    gram: Tensor
    weights: Tensor
    domains: list[str]
    milliseconds: float
    mebibytes: float


class SurgeryLog:
    """Scalars, a histogram and heat maps of surgery.

    Args:
        every_n_steps: Between scalars.
        is_full: Also one cosine and weight a unit.
        image_every_n_steps: Between heat maps and histograms; 0 for none.
    """

    def __init__(self, every_n_steps: int, is_full: bool, image_every_n_steps: int) -> None:
        self.every_n_steps, self.is_full = every_n_steps, is_full
        self.image_every_n_steps = image_every_n_steps

    def write(self, trainer: Trainer, pl_module: LightningModule, units: Units, step: Step) -> None:
        """Log a step where that is due (steps are counted from 1, as for every other tag)."""
        number = trainer.global_step + 1
        if not bool(step.gram.isfinite().all()):
            return
        if number % self.every_n_steps == 0 or number == 1:
            values = scalars(units, step)
            if self.is_full:
                values |= unit_scalars(units, step)
            values = {tag: value for tag, value in values.items() if math.isfinite(value)}
            record = getattr(pl_module, "record", None)
            if callable(record):
                record({tag: (value, 1.0) for tag, value in values.items()})
            else:
                pl_module.log_dict(values)
        is_due = self.image_every_n_steps and (number - 1) % self.image_every_n_steps == 0
        if is_due and len(step.domains) > 1 and trainer.is_global_zero:
            for logger in trainer.loggers:
                board: Any = getattr(logger, "experiment", None)
                if hasattr(board, "add_figure") and hasattr(board, "add_histogram"):
                    _draw(board, units, step, number)


def scalars(units: Units, step: Step) -> dict[str, float]:
    """Tags and values of a step; nan where a domain has no gradient.

    Args:
        units: The partition.
        step: What happened.

    Returns:
        ``surgery/...`` -> value. ``surgery/cos/<kind>`` is the mean over layers of the cosine of
        all of a layer's parameters of that kind, whatever the granularity.
    """
    of_unit = _sum_by(step.gram, units.unit_of, len(units.names))
    of_cell = cosines(_sum_by(step.gram, units.cell_of, len(units.cells)))
    whole = step.gram.sum(0)
    norms = whole.diagonal().clamp(min=0).sqrt()
    overall = cosines(whole)
    values = {
        "surgery/conflict_frac": conflict_fraction(of_unit),
        "surgery/cos_final_naive": cosine_to_sum(of_unit, step.weights),
        "surgery/ms": step.milliseconds,
        "surgery/buffers_mib": step.mebibytes,
    }
    for index, domain in enumerate(step.domains):
        values[f"surgery/grad_norm/{domain}"] = float(norms[index])
        values[f"surgery/weight/{domain}"] = float(step.weights[:, index].mean())
    for name, a, b in _pairs(step.domains):
        values[f"surgery/cos_global/{name}"] = float(overall[a, b])
        values[f"surgery/grad_norm_ratio/{name}"] = float(norms[a] / norms[b])
        for kind in KINDS:
            rows = [index for index, (_, one) in enumerate(units.cells) if one == kind]
            values[f"surgery/cos/{kind}/{name}"] = float(of_cell[rows, a, b].nanmean())
    return values


def unit_scalars(units: Units, step: Step) -> dict[str, float]:
    """A cosine for each unit and pair, a weight for each unit and domain.

    Args:
        units: The partition.
        step: What happened.

    Returns:
        ``surgery/unit_cos/<unit>/<pair>`` and ``surgery/unit_weight/<unit>/<domain>``.
    """
    found = cosines(_sum_by(step.gram, units.unit_of, len(units.names)))
    values = {}
    for index, unit in enumerate(units.names):
        for name, a, b in _pairs(step.domains):
            values[f"surgery/unit_cos/{unit}/{name}"] = float(found[index, a, b])
        for domain, weight in zip(step.domains, step.weights[index].tolist(), strict=True):
            values[f"surgery/unit_weight/{unit}/{domain}"] = weight
    return values


def _pairs(domains: list[str]) -> Iterator[tuple[str, int, int]]:
    for (a, one), (b, other) in combinations(enumerate(domains), 2):
        yield f"{one}_{other}", a, b


def _sum_by(gram: Tensor, index: list[int], count: int) -> Tensor:
    total = torch.zeros(count, *gram.shape[1:], dtype=gram.dtype)
    return total.index_add_(0, torch.tensor(index), gram)


def _draw(board: Any, units: Units, step: Step, number: int) -> None:
    from matplotlib.figure import Figure

    of_unit = cosines(_sum_by(step.gram, units.unit_of, len(units.names)))
    of_cell = cosines(_sum_by(step.gram, units.cell_of, len(units.cells)))
    count = len(step.domains)
    a, b = torch.triu_indices(count, count, 1)
    pairs = of_unit[:, a, b]
    if bool((~pairs.isnan()).any()):
        board.add_histogram("surgery/unit_cos", pairs[~pairs.isnan()], number)
    layers = list(dict.fromkeys(layer for layer, _ in units.cells))
    for name, one, other in _pairs(step.domains):
        grid = torch.full((len(layers), len(KINDS)), torch.nan)
        for index, (layer, kind) in enumerate(units.cells):
            grid[layers.index(layer), KINDS.index(kind)] = of_cell[index, one, other]
        figure = Figure(figsize=(4.5, 1.2 + 0.3 * len(layers)), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(grid.numpy(), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        axes.set_xticks(range(len(KINDS)), KINDS)
        axes.set_yticks(range(len(layers)), [layer.split(".")[-1] or "-" for layer in layers])
        axes.set_ylabel("layer")
        axes.set_title(f"cosine of gradients, {name}, step {number}")
        figure.colorbar(image)
        board.add_figure(f"surgery/cosines/{name}", figure, number)

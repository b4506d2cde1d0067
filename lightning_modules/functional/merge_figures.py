"""Figures of a merge, collected tensor by tensor: cosines, distances, restored norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_modules.functional.merge_methods import gram_matrix

Matrix = list[list[float | None]]


@dataclass
class MergeReport:
    """What a merge did. None is a cosine with, or a quotient by, a vector of zeros.

    Args:
        cosines: ``(M, M)``, of the models' weights taken as one vector each.
        update_cosines: ``(M, M)``, of their differences from the reference; None without one.
        distances: ``(M,)`` norms of those differences, ``||W_m - W_0||``; None without one.
        distance: ``||W - W_0||`` of the merged model; None without one.
        norm_factor: Norm of the merge by that of the linear average (of its update, if the method
            works on a base): what restoring norms, scaling or trimming made of it.
        norm_factors: The same for each tensor.
    """

    cosines: Matrix = field(default_factory=list)
    update_cosines: Matrix | None = None
    distances: list[float] | None = None
    distance: float | None = None
    norm_factor: float | None = None
    norm_factors: dict[str, float | None] = field(default_factory=dict)


class MergeFigures:
    """Adds up the figures of ``MergeReport`` over tensors; those of whole numbers are left out.

    Args:
        weights: Of the models, as the method used them.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        size = len(weights) + 1
        self._weights = torch.tensor(list(weights), dtype=torch.float64)
        self._grams = torch.zeros(3, size, size, dtype=torch.float64)
        self._has_reference = False
        self._factors: dict[str, float | None] = {}

    def add(
        self,
        name: str,
        tensors: Sequence[Tensor],
        merged: Tensor,
        *,
        base: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> None:
        """Count one tensor.

        Args:
            name: Of the tensor.
            tensors: One a model.
            merged: Made of them.
            base: What the method worked on differences from, or None.
            reference: What updates are measured from, or None; the same object as ``base`` where it
                is that.

        Raises:
            ValueError: A value is not finite; names tensor and model.
        """
        if not merged.is_floating_point():
            return
        every = [*tensors, merged]
        plain = gram_matrix(every)
        for place, square in enumerate(plain.diagonal().tolist(), start=1):
            if not math.isfinite(square):
                whose = f"model {place}" if place <= len(tensors) else "the merge"
                raise ValueError(f"{name}: {whose} has values that are not finite")
        updates = torch.zeros_like(plain)
        if reference is not None:
            self._has_reference = True
            updates = gram_matrix(every, reference)
        worked_on = plain
        if base is not None:
            worked_on = updates if base is reference else gram_matrix(every, base)
        self._grams += torch.stack([plain, updates, worked_on])
        self._factors[name] = self._factor(worked_on)

    def report(self) -> MergeReport:
        """The figures of everything that was added."""
        plain, updates, worked_on = self._grams
        found = MergeReport(
            cosines=_cosines(plain[:-1, :-1]),
            norm_factor=self._factor(worked_on),
            norm_factors=dict(self._factors),
        )
        if self._has_reference:
            found.update_cosines = _cosines(updates[:-1, :-1])
            *found.distances, found.distance = updates.diagonal().sqrt().tolist()
        return found

    def _factor(self, gram: Tensor) -> float | None:
        average = float(self._weights @ gram[:-1, :-1] @ self._weights)
        return math.sqrt(float(gram[-1, -1]) / average) if average > 0 else None


def _cosines(gram: Tensor) -> Matrix:
    norms = gram.diagonal().sqrt().tolist()
    return [
        [
            max(-1.0, min(1.0, value / (norms[i] * norms[j]))) if norms[i] and norms[j] else None
            for j, value in enumerate(row)
        ]
        for i, row in enumerate(gram.tolist())
    ]

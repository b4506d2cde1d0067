"""What the back ends are given and what they give back.

Notation: ``N`` rows (tokens), ``H`` width, ``V`` vocabulary rows of the weight, ``V'`` those
allowed (``vocab_limit``). Scaled logits ``z = (hidden @ weight.T + bias + side) / temperature``.
Every row is described relative to its own maximum ``m``: ``d = z - m``, so that neither an offset
of 1e4 nor a row of logits near -50 costs digits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .regions import Region

#: The smallest relative logit that is told apart from "impossible"; its probability is 0.
FLOOR = -1e4


@dataclass
class Problem:
    """The inputs of one call, flattened to rows, without ignored rows.

    Args:
        hidden: ``(N, H)``.
        weight: ``(V, H)``.
        targets: ``(N,)`` int64.
        bias: ``(V,)`` or None.
        side_hidden: ``(N, r)`` or None; ``side_hidden @ side_weight.T`` is added to the logits.
        side_weight: ``(V, r)`` or None.
        temperature: Divides the logits.
        vocab_limit: Columns at and beyond it do not exist.
        region: Trust region or None.
        with_mean: Also the mean log-prob over the vocabulary (label smoothing).
        with_argmax: Also the most probable token.
        workspace: Bytes that logits (or their gradients) may take at once.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    side_hidden: Tensor | None
    side_weight: Tensor | None
    temperature: float
    vocab_limit: int
    region: Region | None
    with_mean: bool
    with_argmax: bool
    workspace: int

    @property
    def dtype(self) -> torch.dtype:
        """Of accumulators and results: float64 for float64 input, else float32."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def num_rows(self) -> int:
        """N."""
        return self.hidden.shape[0]

    def rows(self, part: Tensor | slice) -> Problem:
        """The same problem on some rows."""
        return replace(
            self,
            hidden=self.hidden[part],
            targets=self.targets[part],
            side_hidden=None if self.side_hidden is None else self.side_hidden[part],
        )


@dataclass
class RegionStats:
    """A region of every row. ``d`` are logits relative to the row's maximum.

    Args:
        log_sum: ``(N,)`` log of the sum of ``exp(d)`` over S.
        entropy: ``(N,)`` ``H_S``, unscaled. For ``TopK(1)`` it is the row's ``log_sum``.
        size: ``(N,)`` int32.
        tilt: ``(N,)`` the scalar of ``preserve_mass``: ``sum_S q^2 (log q + H_S) / sum_S q^2``;
            zero without it.
        ids: ``(N, K)`` int64 members (TopK), or ``(N, 0)``.
        values: ``(N, K)`` their ``d`` (TopK), or ``(N, 0)``.
        threshold: ``(N,)`` (TopP), or ``(0,)``: a column is in S if ``d > threshold``, or if
            ``d == threshold`` and its id is at most ``tie_column``.
        tie_column: ``(N,)`` int32 (TopP), or ``(0,)``. It is -1 where every column that equals
            the last one kept is in S; the threshold then lies below that value.
    """

    log_sum: Tensor
    entropy: Tensor
    size: Tensor
    tilt: Tensor
    ids: Tensor
    values: Tensor
    threshold: Tensor
    tie_column: Tensor


@dataclass
class RowStats:
    """Statistics of every row, ``(N,)`` each, in ``Problem.dtype``.

    Args:
        row_max: ``m``, the largest scaled logit.
        log_sum: ``log sum exp(d)``, at least 0; ``lse = m + log_sum``.
        target: ``d`` of the target.
        entropy: Shannon entropy.
        mean: Mean of ``d`` over the allowed columns, or ``(0,)`` where not asked for.
        argmax: int64 lowest id of the maximum, or ``(0,)`` where not asked for.
        region: Of the region, or None.
    """

    row_max: Tensor
    log_sum: Tensor
    target: Tensor
    entropy: Tensor
    mean: Tensor
    argmax: Tensor
    region: RegionStats | None


@dataclass
class Coefficients:
    """Row scalars ``(N,)`` that make the gradient of every logit; the temperature is inside.

    With ``lp = d - log_sum`` (the log-prob) and ``p = exp(lp)``::

        dZ = p * (flat + tilted * lp) + at_target * [j is the target] + everywhere
           + [j in S by threshold] * p * (region_flat + region_tilted * lp)

    where a product with ``p = 0`` is 0. The members of a TopK region are added by id afterwards.

    Args:
        flat: Multiplies ``p``.
        tilted: Multiplies ``p * lp``; None where no gradient reaches the entropy.
        at_target: Added at the target.
        everywhere: Added at every allowed column, or None.
        region_flat: As ``flat`` inside a TopP region, or None.
        region_tilted: As ``tilted`` inside a TopP region, or None.
        members: ``(N, K)`` added at the ids of a TopK region, or None.
    """

    flat: Tensor
    tilted: Tensor | None
    at_target: Tensor
    everywhere: Tensor | None
    region_flat: Tensor | None
    region_tilted: Tensor | None
    members: Tensor | None


def rescaled_sums(
    row_max: Tensor, log_sum: Tensor, entropy: Tensor, top: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums over a part of a row's columns, relative to the whole row's maximum.

    Parts (slices, ranks) are merged by adding these up.

    Args:
        row_max: ``(..., N)`` the part's maximum; minus infinity where no column is possible.
        log_sum: ``(..., N)`` of the part.
        entropy: ``(..., N)`` of the part.
        top: ``(N,)`` maximum of the whole row.

    Returns:
        Sums of ``exp(d)`` and of ``exp(d) * d``, ``d`` being logits minus ``top``.
    """
    is_dead = row_max.isneginf()
    exp_sum = torch.where(is_dead, 0.0, log_sum.exp())
    tilted = torch.where(is_dead, 0.0, exp_sum * (log_sum - entropy))
    shift = (row_max - top).clamp(min=FLOOR)
    weight = shift.exp()
    return weight * exp_sum, weight * (tilted + shift * exp_sum)

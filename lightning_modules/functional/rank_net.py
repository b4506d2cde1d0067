"""RankNet: the order of similarities within a group follows the order of integer scores.

Shape legend: ``B`` rows, ``G`` passages a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.functional.sums import Metrics, masked_sum_count


class RankLoss(NamedTuple):
    """A loss as sum and count, with metrics.

    Args:
        loss_sum: 0-d, with a gradient (of zero without pairs); float32 or wider.
        num_pairs: Ordered pairs in that sum.
        metrics: ``name -> (sum, count)``, detached.
    """

    loss_sum: Tensor
    num_pairs: int
    metrics: Metrics


def rank_net(
    similarities: Tensor,
    scores: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> RankLoss:
    """Cross-entropy of the order of pairs (RankNet, Burges et al. 2005; Agentic-R's card, 2.6).

    ``L = sum over r, i, j with score_ri > score_rj of log(1 + exp(-(s_ri - s_rj) / tau))``, to be
    divided by the number of such pairs [our choice: of all rows together, so that a row with many
    ties counts less]. Pairs are of one row; equal scores say nothing. Integers are compared, never
    rounded fractions (card, section 8).

    Args:
        similarities: ``(B, G)``.
        scores: ``(B, G)`` integers, the higher the better; negative for unknown.
        temperature: tau, above 0 (that of the contrastive loss [code]).
        mask: ``(B, G)`` bool, True on passages that take part; None for all.

    Returns:
        Sum and number of pairs, and metrics: ``rank_loss``, ``rank_accuracy`` (share of the pairs
        in the right order) and ``rank_pairs`` (a row).

    Raises:
        ValueError: Shapes that do not fit, scores that are no integers, or a temperature of 0 or
            below.

    Example:
        >>> found = rank_net(torch.tensor([[1.0, 0.0]]), torch.tensor([[90, 30]]))
        >>> round(found.loss_sum.item(), 4), found.num_pairs  # log(1 + exp(-1))
        (0.3133, 1)
    """
    _check(similarities, scores, temperature, mask)
    scores = scores.to(similarities.device)
    known = scores >= 0
    if mask is not None:
        known = known & mask.to(similarities.device, torch.bool)
    ordered = scores[:, :, None] > scores[:, None, :]
    pairs = ordered & known[:, :, None] & known[:, None, :]
    with torch.autocast(similarities.device.type, enabled=False):
        wide = similarities.to(torch.promote_types(similarities.dtype, torch.float32))
        gaps = (wide[:, :, None] - wide[:, None, :])[pairs]
        losses = F.softplus(-gaps / temperature)
    metrics: Metrics = {
        "rank_loss": masked_sum_count(losses),
        "rank_accuracy": masked_sum_count(gaps > 0),
        "rank_pairs": (float(len(gaps)), float(known.any(1).sum())),
    }
    return RankLoss(losses.sum(), len(gaps), metrics)


def _check(similarities: Tensor, scores: Tensor, temperature: float, mask: Tensor | None) -> None:
    """Refuse what would give silent nonsense."""
    for name, value in (("scores", scores), ("mask", mask)):
        if value is not None and value.shape != similarities.shape:
            shapes = f"{tuple(value.shape)} and {tuple(similarities.shape)}"
            raise ValueError(f"{name} and similarities must be of one shape (B, G), got {shapes}")
    if similarities.dim() != 2:
        raise ValueError(f"similarities must be (B, G), got {tuple(similarities.shape)}")
    if scores.is_floating_point() or scores.dtype == torch.bool:
        raise ValueError(f"scores must hold integers, got {scores.dtype}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be above 0")

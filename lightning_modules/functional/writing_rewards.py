"""Rewards of a text for its form: whether it planned, and how long it became.

Paper: "UniCreative", arXiv 2604.05517. A query wants a long or a short text. The structure reward
and the constants 5 are from [summary]; the form of the length penalty is [our choice], as nobody
states it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def structure_reward(is_long: Tensor, has_plan: Tensor, coef: float = 5.0) -> Tensor:
    """``-coef`` for a long text without a plan and for a short one with one, else 0.

    Args:
        is_long: ``(N,)`` bool.
        has_plan: ``(N,)`` bool.
        coef: beta_s [summary: 5].

    Returns:
        ``(N,)`` float32.

    Example:
        >>> structure_reward(torch.tensor([True, True, False]), torch.tensor([True, False, True]))
        tensor([ 0., -5., -5.])
    """
    return torch.where(is_long == has_plan, 0.0, -coef)


def length_reward(
    is_long: Tensor, tokens: Tensor, *, long_min: int, short_max: int, cap: float = 5.0
) -> Tensor:
    """Long texts lose by what they lack, short ones by what they have too much, at most ``cap``.

    ``-cap * min(1, max(0, long_min - n) / long_min)`` and
    ``-cap * min(1, max(0, n - short_max) / short_max)``: 0 inside of the allowed range, the cap at
    n = 0 (long) or n >= 2 short_max (short).

    Args:
        is_long: ``(N,)`` bool.
        tokens: ``(N,)`` tokens n of the text, without its plan.
        long_min: Fewest tokens of a long text, 1 or more.
        short_max: Most tokens of a short text, 1 or more.
        cap: gamma [summary: 5].

    Returns:
        ``(N,)`` float32, at most 0.

    Raises:
        ValueError: A bound below 1.

    Example:
        >>> is_long = torch.tensor([True, False, False])
        >>> length_reward(is_long, torch.tensor([3, 5, 90]), long_min=6, short_max=4)
        tensor([-2.5000, -1.2500, -5.0000])
    """
    if long_min < 1 or short_max < 1:
        raise ValueError(f"long_min={long_min} and short_max={short_max} must be at least 1")
    n = tokens.float()
    lacks = (long_min - n).clamp(min=0) / long_min
    exceeds = (n - short_max).clamp(min=0) / short_max
    return -cap * torch.where(is_long, lacks, exceeds).clamp(max=1)


def gated(total: Tensor, is_failed: Tensor, floor: float | None) -> Tensor:
    """``floor`` for texts that failed a hard constraint, whatever else they earned.

    Args:
        total: ``(N,)``.
        is_failed: ``(N,)`` bool: unparsable or empty.
        floor: None for no gate [our choice: -12, the least that the three rewards can sum to].

    Example:
        >>> gated(torch.tensor([2.0, 2.0]), torch.tensor([False, True]), -12.0)
        tensor([  2., -12.])
    """
    return total if floor is None else torch.where(is_failed, floor, total)

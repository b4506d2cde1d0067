"""Verdicts and votes of a pairwise judge: 1 or 2 names a slot, 0 an output that did not parse."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

UNPARSABLE = 0
"""Verdict of an output that holds no legal statement."""


def as_verdicts(verdicts: Tensor | Sequence[int], name: str = "verdicts") -> list[int]:
    """Verdicts as a list of plain numbers, checked.

    Args:
        verdicts: ``[N]`` values out of 0 (unparsable), 1 and 2.
        name: What to call them in the message.

    Returns:
        ``N`` numbers.

    Raises:
        ValueError: If one is another value (names its index) or the shape is not ``[N]``.

    Example:
        >>> as_verdicts([0, 1, 2])
        [0, 1, 2]
    """
    if isinstance(verdicts, Tensor) and verdicts.dim() != 1:
        raise ValueError(f"{name} must have shape [N], got {tuple(verdicts.shape)}")
    values = verdicts.tolist() if isinstance(verdicts, Tensor) else list(verdicts)
    for index, value in enumerate(values):
        if value not in (0, 1, 2):
            raise ValueError(f"{name}[{index}] is {value}; allowed: 0 (unparsable), 1, 2")
    return [int(value) for value in values]


def majority(
    verdicts: Tensor | Sequence[int],
    weights: Tensor | Sequence[float] | None = None,
    *,
    tie: float | None = None,
) -> int | None:
    """Majority of the parsable verdicts, with a coin for ties.

    Our choice: unparsable outputs have no vote, rather than a vote against both sides.

    Args:
        verdicts: ``[N]`` values out of 0 (unparsable), 1 and 2.
        weights: ``[N]`` weights of the votes, at least 0, or a boolean mask; None counts each as 1.
        tie: A coin in [0, 1): a tie gives 1 below one half, else 2. None leaves ties undecided.

    Returns:
        1 or 2; None if nobody voted, or on a tie without a coin.

    Raises:
        ValueError: For an illegal verdict or weight, a mismatched length, or a coin out of range.

    Example:
        >>> majority([1, 2, 2, 0]), majority([1, 2]), majority([1, 2], tie=0.7), majority([0])
        (2, None, 2, None)
    """
    values = as_verdicts(verdicts)
    shares = [1.0] * len(values) if weights is None else _as_weights(weights, len(values))
    if tie is not None:
        check_uniform("tie", tie)
    # fsum rounds once, so equal weights tie whatever the order in which they are added.
    first, second = (
        math.fsum(share for value, share in zip(values, shares, strict=True) if value == side)
        for side in (1, 2)
    )
    if first != second:
        return 1 if first > second else 2
    if first == 0 or tie is None:
        return None
    return 1 if tie < 0.5 else 2


def check_uniform(name: str, value: float) -> None:
    """Refuse a number that cannot be a draw from the uniform distribution on [0, 1).

    Args:
        name: Name of the argument, for the message.
        value: The draw; 1.0 is let through, since float32 draws may round up to it.

    Raises:
        ValueError: If it is nan or outside.

    Example:
        >>> check_uniform("coin", 0.25)
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must lie in [0, 1)")


def _as_weights(weights: Tensor | Sequence[float], size: int) -> list[float]:
    """Weights as a checked list of floats."""
    values = weights.tolist() if isinstance(weights, Tensor) else list(weights)
    if not isinstance(values, list) or len(values) != size:
        raise ValueError(f"weights must have one entry for each of the {size} verdicts")
    for index, value in enumerate(values):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"weights[{index}] is {value}; must be finite and at least 0")
    return [float(value) for value in values]

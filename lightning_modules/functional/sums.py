"""Metrics as sums and counts, so that micro-batches, windows and ranks add up exactly.

A mean of means weights a short micro-batch like a long one, and an absent domain would log a stale
or made-up value. So every function of this project hands out ``name -> (sum, count)``; whoever logs
adds them over the window and the ranks first and divides once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Metrics: TypeAlias = dict[str, tuple[Tensor | float, Tensor | float]]
"""``name -> (sum, count)``; both 0-d tensors or plain numbers."""


def accumulation_dtype(device: torch.device | str) -> torch.dtype:
    """Widest float type that a device can add in: float64, but float32 on Apple's ``mps``.

    Args:
        device: Where the sum is taken.

    Returns:
        The dtype.

    Example:
        >>> accumulation_dtype("cpu")
        torch.float64
    """
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def masked_sum_count(values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum and number of the values under a mask, detached and in float64.

    Masked values never enter, not even as ``0 * nan``.

    Args:
        values: Any shape; numbers or booleans.
        mask: Same shape (or broadcastable to it), nonzero where a value counts; None counts all.

    Returns:
        ``(sum, count)``, two 0-d tensors of one dtype, ready to be stacked and all-reduced.

    Example:
        >>> total, count = masked_sum_count(torch.tensor([1.0, float("nan")]), torch.tensor([1, 0]))
        >>> total.item(), count.item()
        (1.0, 1.0)
    """
    wide = values.detach().to(accumulation_dtype(values.device))
    if mask is None:
        return wide.sum(), wide.new_tensor(float(wide.numel()))
    live = mask.to(torch.bool).expand_as(wide)
    return torch.where(live, wide, 0.0).sum(), live.sum().to(wide.dtype)


def merge(a: Metrics, b: Metrics) -> Metrics:
    """Add two sets of metrics; a name in only one of them is kept as it is.

    Args:
        a: ``name -> (sum, count)``; not changed.
        b: ``name -> (sum, count)``; not changed.

    Returns:
        A new dictionary over the union of the names.

    Example:
        >>> merge({"x": (1.0, 2)}, {"x": (3.0, 2), "y": (1.0, 1)})
        {'x': (4.0, 4), 'y': (1.0, 1)}
    """
    merged = dict(a)
    for name, (total, count) in b.items():
        if name in merged:
            total, count = merged[name][0] + total, merged[name][1] + count
        merged[name] = (total, count)
    return merged


def means(metrics: Metrics) -> dict[str, float]:
    """Divide sums by counts; what was never counted is left out rather than logged as zero.

    Args:
        metrics: ``name -> (sum, count)``.

    Returns:
        ``name -> mean``, without the names whose count is 0.

    Example:
        >>> means({"x": (1.0, 4), "absent": (0.0, 0)})
        {'x': 0.25}
    """
    pairs = {name: (float(total), float(count)) for name, (total, count) in metrics.items()}
    return {name: total / count for name, (total, count) in pairs.items() if count != 0}


@dataclass(frozen=True)
class Summary:
    """What mean, standard deviation, minimum and maximum need, in a form that merges.

    Args:
        total: Sum of the values.
        square_total: Sum of their squares.
        count: Number of values.
        minimum: Smallest value, ``inf`` if there is none.
        maximum: Largest value, ``-inf`` if there is none.

    Example:
        >>> Summary(3.0, 5.0, 2.0, 1.0, 2.0).mean
        1.5
    """

    total: float = 0.0
    square_total: float = 0.0
    count: float = 0.0
    minimum: float = math.inf
    maximum: float = -math.inf

    @property
    def mean(self) -> float:
        """Mean of the values; nan if there is none."""
        return self.total / self.count if self.count else math.nan

    @property
    def std(self) -> float:
        """Population standard deviation (0 for one value); nan if there is none.

        Our choice: it describes the values that were seen, so one value has spread 0, not nan.
        """
        if not self.count:
            return math.nan
        variance = self.square_total / self.count - self.mean**2
        # Rounding can leave a tiny negative; nan is kept, since it means that a value was nan.
        return variance if math.isnan(variance) else math.sqrt(max(variance, 0.0))

    def merge(self, other: Summary) -> Summary:
        """Summary of both sets of values together.

        Args:
            other: Summary of further values.

        Returns:
            A new summary.

        Example:
            >>> Summary(1.0, 1.0, 1.0, 1.0, 1.0).merge(Summary(3.0, 9.0, 1.0, 3.0, 3.0)).mean
            2.0
        """
        return Summary(
            self.total + other.total,
            self.square_total + other.square_total,
            self.count + other.count,
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
        )


def moments(prefix: str, values: Tensor, mask: Tensor | None = None) -> dict[str, Summary]:
    """Summarise values under one name, for quantities whose mean alone is not enough.

    Args:
        prefix: Name of the quantity, such as ``reward``.
        values: Any shape.
        mask: Same shape, nonzero where a value counts; None counts all.

    Returns:
        ``{prefix: Summary}``, to be merged with ``merge_summaries``.

    Example:
        >>> moments("reward", torch.tensor([1.0, -1.0]))["reward"].std
        1.0
    """
    live = values.detach().to(accumulation_dtype(values.device))
    live = live.flatten() if mask is None else live[mask.to(torch.bool).expand_as(live)]
    if live.numel() == 0:
        return {prefix: Summary()}
    numbers = torch.stack([live.sum(), live.square().sum(), live.min(), live.max()]).tolist()
    total, square_total, minimum, maximum = numbers  # one transfer from the device, not four
    return {prefix: Summary(total, square_total, float(live.numel()), minimum, maximum)}


def merge_summaries(a: dict[str, Summary], b: dict[str, Summary]) -> dict[str, Summary]:
    """Merge two sets of summaries; a name in only one of them is kept as it is.

    Args:
        a: ``name -> Summary``; not changed.
        b: ``name -> Summary``; not changed.

    Returns:
        A new dictionary over the union of the names.

    Example:
        >>> merge_summaries({"x": Summary()}, {"y": Summary()}).keys()
        dict_keys(['x', 'y'])
    """
    return {**a, **{name: a[name].merge(new) if name in a else new for name, new in b.items()}}


def summary_scalars(summaries: dict[str, Summary]) -> dict[str, float]:
    """Spell summaries out as scalars; empty ones are left out.

    Args:
        summaries: ``name -> Summary``.

    Returns:
        ``name_mean``, ``name_std``, ``name_min`` and ``name_max`` of each name.

    Example:
        >>> summary_scalars(moments("x", torch.tensor([2.0])))
        {'x_mean': 2.0, 'x_std': 0.0, 'x_min': 2.0, 'x_max': 2.0}
    """
    scalars: dict[str, float] = {}
    for name, summary in summaries.items():
        if summary.count:
            scalars[f"{name}_mean"] = summary.mean
            scalars[f"{name}_std"] = summary.std
            scalars[f"{name}_min"] = summary.minimum
            scalars[f"{name}_max"] = summary.maximum
    return scalars

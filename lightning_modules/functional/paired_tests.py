"""Is a difference more than chance: tests and intervals for paired rows, and rank correlations.

Rows are paired when they are about the same item: a minimal pair, or one item under two models.
Written here because scipy is no dependency of the core. Everything random takes a seed of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

_CHUNK = 1 << 22  # numbers that are drawn at once

Values = Tensor | Sequence[float]


@dataclass(frozen=True)
class McNemar:
    """Verdict of ``mcnemar``.

    Args:
        only_first: Pairs where the first is true and the second is not.
        only_second: The reverse.
        p_value: Two-sided, exact.
    """

    only_first: int
    only_second: int
    p_value: float


@dataclass(frozen=True)
class Interval:
    """A statistic and the interval that its resampled values fill.

    Args:
        estimate: On all rows.
        low: Lower end.
        high: Upper end.
        undefined: Resamples in which the statistic was NaN; the ends are those of the others.
    """

    estimate: float
    low: float
    high: float
    undefined: int = 0


def mcnemar(first: Values, second: Values) -> McNemar:
    """Whether one of two true-or-false marks of the same items is true more often (McNemar 1947).

    Exact: of the pairs that differ, which side is true is a fair coin under the null, so the
    p-value is twice the smaller tail of Binomial(differing pairs, 1/2), at most 1.

    Args:
        first: ``(N,)`` marks, 0 or 1, such as FF of prior-consistent items.
        second: ``(N,)`` marks of the same items, such as FF of their counterfactual twins.

    Returns:
        Both kinds of differing pairs and the p-value; 1 where none differs.

    Raises:
        ValueError: Shapes differ, or a mark is neither 0 nor 1.

    Example:
        >>> mcnemar([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0])
        McNemar(only_first=5, only_second=0, p_value=0.0625)
    """
    one, two = _pair(first=first, second=second)
    for name, marks in (("first", one), ("second", two)):
        if not ((marks == 0) | (marks == 1)).all():
            raise ValueError(f"{name} must hold only 0 and 1")
    ups, downs = int((one > two).sum()), int((one < two).sum())
    return McNemar(ups, downs, _fair_coin(ups, downs))


def paired_bootstrap(
    first: Values,
    second: Values,
    *,
    seed: int | str,
    samples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of the mean of ``first - second``, by resampling items.

    Args:
        first: ``(N,)`` finite values.
        second: ``(N,)`` values of the same items.
        seed: Of the resampling.
        samples: Resamples, at least 1.
        level: Share of them inside of the interval, in (0, 1).

    Returns:
        The mean difference and its interval.

    Raises:
        ValueError: Shapes that differ, no item, values that are not finite, or a wrong option.

    Example:
        >>> paired_bootstrap([2.0, 3.0], [1.0, 2.0], seed=0)
        Interval(estimate=1.0, low=1.0, high=1.0, undefined=0)
    """
    one, two = _pair(first=first, second=second)
    gaps = one - two
    _check_bootstrap(len(gaps), samples, level)
    found = [gaps[places].mean(dim=1) for places in _resamples(len(gaps), samples, seed)]
    return _interval(float(gaps.mean()), torch.cat(found), level)


def bootstrap(
    rows: Tensor,
    statistic: Callable[[Tensor], float],
    *,
    seed: int | str,
    samples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of any statistic of rows, by resampling rows.

    A row is what is drawn independently: slots of one text belong into one row, as a sum and a
    count, and rows of two models side by side.

    Args:
        rows: ``(N, ...)``.
        statistic: Of ``(N, ...)`` rows, which may repeat; NaN where it has no value.
        seed: Of the resampling.
        samples: Resamples, at least 1.
        level: Share of them inside of the interval, in (0, 1).

    Returns:
        The statistic of all rows and its interval.

    Raises:
        ValueError: No row, a wrong option, or no resample in which the statistic has a value.

    Example:
        >>> right_and_slots = torch.tensor([[2.0, 2.0], [2.0, 2.0]])
        >>> bootstrap(right_and_slots, lambda r: float(r[:, 0].sum() / r[:, 1].sum()), seed=0).low
        1.0
    """
    _check_bootstrap(len(rows), samples, level)
    data = rows.detach().cpu()
    drawn = (row for places in _resamples(len(data), samples, seed) for row in places)
    found = torch.tensor([statistic(data[row]) for row in drawn], dtype=torch.float64)
    return _interval(float(statistic(data)), found, level)


def ranks(values: Values) -> Tensor:
    """Ranks from 1, equal values sharing the mean of theirs.

    Args:
        values: ``(N,)`` finite.

    Returns:
        ``(N,)`` float64.

    Raises:
        ValueError: A wrong shape, or values that are not finite.

    Example:
        >>> ranks([3.0, 1.0, 3.0]).tolist()
        [2.5, 1.0, 2.5]
    """
    wide = _vector("values", values)
    _, which, counts = wide.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[which]


def spearman(x: Values, y: Values) -> float:
    """Spearman's rank correlation: Pearson's of the ranks.

    Args:
        x: ``(N,)`` finite.
        y: ``(N,)`` finite.

    Returns:
        From -1 to 1; NaN where one of them does not vary, or N is below 2.

    Raises:
        ValueError: Shapes that differ, or values that are not finite.

    Example:
        >>> round(spearman([1.0, 2.0, 3.0], [1.0, 4.0, 9.0]), 9)
        1.0
    """
    one, two = _pair(x=x, y=y)
    return _correlation(_centred(one), _centred(two))


def partial_spearman(x: Values, y: Values, control: Values) -> float:
    """Spearman's correlation of x and y, once the ranks of a third variable are taken off both.

    The correlation of what a line through the control's ranks leaves of the ranks of x and y. With
    cross-entropy as control: do rank and overwriting go together at equal loss (card 2.1).

    Args:
        x: ``(N,)`` finite.
        y: ``(N,)`` finite.
        control: ``(N,)`` finite; where it does not vary there is nothing to take off.

    Returns:
        From -1 to 1; NaN where the control leaves nothing of x or y.

    Raises:
        ValueError: Shapes that differ, or values that are not finite.

    Example:
        >>> round(partial_spearman([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 2, 1]), 9)
        1.0
    """
    one, two = _pair(x=x, y=y)
    third, _ = _pair(control=control, x=x)
    base = _centred(third)
    return _correlation(*(_without(_centred(values), base) for values in (one, two)))


def spearman_p_value(x: Values, y: Values, *, seed: int | str, permutations: int = 10_000) -> float:
    """How often shuffled pairs correlate as strongly as these, whatever the sign.

    Exact, over all orders, where those are no more than ``permutations`` (7 points have 5040);
    else ``(1 + hits) / (1 + permutations)`` over random orders.

    Args:
        x: ``(N,)`` finite, N from 2.
        y: ``(N,)`` finite.
        seed: Of the random orders.
        permutations: Orders to try, at least 1.

    Returns:
        Two-sided p-value; NaN where ``spearman`` is.

    Raises:
        ValueError: As for ``spearman``, or no permutation.

    Example:
        >>> spearman_p_value([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], seed=0)  # 2 of 24
        0.08333333333333333
    """
    if permutations < 1:
        raise ValueError(f"permutations={permutations} must be at least 1")
    one, two = (_centred(values) for values in _pair(x=x, y=y))
    if math.isnan(_correlation(one, two)):
        return math.nan
    size = len(one)
    limit = (one @ two).abs()  # of halves, so that equal ones are equal to the last bit
    if math.factorial(min(size, 20)) <= permutations:
        orders = torch.tensor(list(itertools.permutations(range(size))))
        return float(((two[orders] @ one).abs() >= limit).double().mean())
    maker, hits = _generator(seed), 0
    step = max(1, _CHUNK // size)
    for start in range(0, permutations, step):
        some = min(step, permutations - start)
        orders = torch.rand(some, size, generator=maker, dtype=torch.float64).argsort(dim=1)
        hits += int(((two[orders] @ one).abs() >= limit).sum())
    return (1 + hits) / (1 + permutations)


def _fair_coin(ups: int, downs: int) -> float:
    """Two-sided p-value of these many heads and tails, in whole numbers."""
    total, term, tail = ups + downs, 1, 0
    for k in range(min(ups, downs) + 1):
        tail += term
        term = term * (total - k) // (k + 1)
    return min(1.0, 2 * tail / 2**total)


def _generator(seed: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(Random(f"paired_tests/{seed}").getrandbits(63))


def _resamples(size: int, samples: int, seed: int | str) -> Iterator[Tensor]:
    """Places drawn with replacement, ``(some, size)`` each, ``samples`` rows in all."""
    maker, step = _generator(seed), max(1, _CHUNK // size)
    for start in range(0, samples, step):
        yield torch.randint(size, (min(step, samples - start), size), generator=maker)


def _interval(estimate: float, found: Tensor, level: float) -> Interval:
    kept = found[~found.isnan()]
    if not len(kept):
        raise ValueError(f"the statistic is NaN in all {len(found)} resamples")
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = kept.quantile(edges).tolist()
    return Interval(estimate, low, high, len(found) - len(kept))


def _check_bootstrap(size: int, samples: int, level: float) -> None:
    problems = []
    if not size:
        problems.append("there must be at least one row")
    if samples < 1:
        problems.append(f"samples={samples} must be at least 1")
    if not 0 < level < 1:
        problems.append(f"level={level} must be in (0, 1)")
    if problems:
        raise ValueError("; ".join(problems))


def _vector(name: str, values: Values) -> Tensor:
    """The values as float64 on the CPU."""
    wide = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if wide.dim() != 1:
        raise ValueError(f"{name} must be (N,), got {tuple(wide.shape)}")
    if not wide.isfinite().all():
        place = int((~wide.isfinite()).nonzero()[0])
        raise ValueError(f"{name}[{place}] is not finite")
    return wide


def _pair(**values: Values) -> tuple[Tensor, Tensor]:
    """Two vectors of one length."""
    (first, one), (second, two) = ((name, _vector(name, some)) for name, some in values.items())
    if one.shape != two.shape:
        raise ValueError(f"{len(one)} values of {first} cannot pair with {len(two)} of {second}")
    return one, two


def _centred(values: Tensor) -> Tensor:
    """Ranks less their mean."""
    return ranks(values) - (len(values) + 1) / 2


def _without(values: Tensor, base: Tensor) -> Tensor:
    """What a line through the base leaves of the values.

    Ranks that the base explains wholly are its own or their negatives: then exactly 0 is left.
    """
    energy = base @ base
    return values - base * (values @ base / energy) if energy else values


def _correlation(one: Tensor, two: Tensor) -> float:
    """Pearson's correlation of centred values; NaN where one of them is 0 throughout."""
    size = one.norm() * two.norm()
    return float((one @ two / size).clamp(-1, 1)) if size else math.nan

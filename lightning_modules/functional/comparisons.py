"""Rewards of a group from comparisons of its members.

A comparison of rows ``i`` and ``j`` has an outcome for ``i``: 1 won, -1 lost, 0 a tie or anything
between (a soft verdict); that for ``j`` is its negative. Schemes, for a group of G rows:

* ``bootstrap``: one member, drawn at random, is the reference; every other one meets it, G - 1
  comparisons [summary: UniCreative, after Writing-Zero, arXiv 2506.00103]. The reference gets the
  mean of its own outcomes [our choice: it is informative and wastes no sample].
* ``random_opponent``: every member meets one other; G comparisons.
* ``round_robin``: every pair meets once; G (G - 1) / 2 comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_modules.functional.choices import check_choice

Scheme = Literal["bootstrap", "random_opponent", "round_robin"]


def matches(
    groups: Sequence[int], scheme: Scheme, uniform: Callable[[int], float]
) -> list[tuple[int, int]]:
    """Which rows meet: pairs ``(i, j)`` of row numbers, i's outcome to be found.

    Args:
        groups: Group of every row.
        scheme: See above.
        uniform: A draw in [0, 1) for a row number: the reference of a group is drawn with that of
            its first row, an opponent with that of the row it meets.

    Returns:
        Pairs within groups only; none for a group of one.

    Raises:
        ValueError: An unknown scheme.

    Example:
        >>> matches([0, 0, 0], "bootstrap", lambda row: 0.5)
        [(0, 1), (2, 1)]
        >>> matches([0, 0, 0], "round_robin", lambda row: 0.0)
        [(0, 1), (0, 2), (1, 2)]
    """
    check_choice("scheme", scheme, get_args(Scheme))
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    found: list[tuple[int, int]] = []
    for rows in members.values():
        size = len(rows)
        if size < 2:
            continue
        if scheme == "bootstrap":
            reference = rows[min(int(uniform(rows[0]) * size), size - 1)]
            found += [(row, reference) for row in rows if row != reference]
        elif scheme == "round_robin":
            found += [(one, other) for n, one in enumerate(rows) for other in rows[n + 1 :]]
        else:
            for place, row in enumerate(rows):
                shift = 1 + min(int(uniform(row) * (size - 1)), size - 2)
                found.append((row, rows[(place + shift) % size]))
    return found


def relative_rewards(
    pairs: Sequence[tuple[int, int]], outcomes: Sequence[float], rows: int, scheme: Scheme
) -> Tensor:
    """One number a row in [-1, 1], from the outcomes of its comparisons.

    ``bootstrap``: the row's own outcome, the reference's is minus the mean of the others', so that
    a group sums to 0 only where G = 2; ``random_opponent``: the outcome of the comparison that the
    row itself asked for; ``round_robin``: (wins - losses) / (G - 1), which sums to 0 in a group.

    Args:
        pairs: As ``matches`` gave them.
        outcomes: Of the first row of every pair, in [-1, 1].
        rows: N.
        scheme: As for ``matches``.

    Returns:
        ``(N,)`` float32; 0 for rows that met nobody.

    Raises:
        ValueError: An unknown scheme, or as many outcomes as pairs are not there.

    Example:
        >>> relative_rewards([(0, 1), (2, 1)], [1.0, -1.0], 3, "bootstrap")
        tensor([ 1.,  0., -1.])
    """
    check_choice("scheme", scheme, get_args(Scheme))
    if len(pairs) != len(outcomes):
        raise ValueError(f"{len(pairs)} comparisons have {len(outcomes)} outcomes")
    total, count = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    for (one, other), outcome in zip(pairs, outcomes, strict=True):
        total[one] += outcome
        count[one] += 1
        if scheme != "random_opponent":
            total[other] -= outcome
            count[other] += 1
    return (total / count.clamp(min=1)).float()


def soft_outcome(margin: float) -> float:
    """``tanh(margin / 2)``: the expected outcome of a verdict with these log-odds (nats).

    Example:
        >>> soft_outcome(0.0)
        0.0
    """
    return float(torch.tensor(margin / 2, dtype=torch.float64).tanh())

"""Bags: parts of every data set, drawn once, on which models are trained that are merged later."""

from __future__ import annotations

from collections.abc import Sequence

from datamodules.schedules import MIXED, Batch, check_sizes, exact, permutation


def bag(
    sizes: Sequence[int],
    percent: float,
    *,
    seed: int,
    member: int = 0,
    nested: bool = False,
    batch_size: int = 1,
) -> list[list[int]]:
    """Rows of one bag: of every data set ``floor(percent / 100 * n_i)``, without replacement.

    Proportions between data sets stay (BOOM [summary]). A data set keeps at least one batch, or all
    its rows if it has fewer [our choice].

    Args:
        sizes: Rows of each data set.
        percent: Above 0, up to 100.
        seed: Of the draw.
        member: Number of the bag: members are drawn independently of each other.
        nested: Leave ``member`` out of account, so that a smaller bag is part of a larger one.
        batch_size: Rows a batch over all ranks.

    Returns:
        For each data set the rows, ascending: schedule their numbers, then ``select``.

    Raises:
        ValueError: A percentage out of range, or as in ``batch_shuffle``.

    Example:
        >>> [len(rows) for rows in bag([10, 7, 1], 40, seed=0)]
        [4, 2, 1]
    """
    check_sizes(sizes, batch_size)
    if not 0 < percent <= 100:
        raise ValueError(f"percent={percent} must be above 0 and at most 100")
    found = []
    for place, size in enumerate(sizes):
        share = int(exact(percent) * size / 100)  # exact: 29 percent of 100 are 29 rows, not 28
        kept = max(share, min(batch_size, size))
        key = ("bag", place) if nested else ("bag", place, member)
        found.append(sorted(permutation(size, seed, *key)[:kept]))
    return found


def select(batches: Sequence[Batch], kept: Sequence[Sequence[int]]) -> list[Batch]:
    """A schedule over a bag's rows, in the numbers of the whole data sets.

    Args:
        batches: Made for ``[len(rows) for rows in kept]``, of one data set each.
        kept: Rows of each data set, as ``bag`` gives them.

    Raises:
        ValueError: A mixed batch: choose its rows by ``locate`` first.
    """
    if any(batch.dataset == MIXED for batch in batches):
        raise ValueError("rows of mixed batches have no data set: use locate, then kept[set][row]")
    return [
        batch._replace(rows=tuple(kept[batch.dataset][row] for row in batch.rows))
        for batch in batches
    ]

"""In which order the batches of several data sets come: pure functions of (sizes, seed, epoch).

A schedule is a list of ``Batch``: a data set and rows of it, the same list on every rank, each
batch for all ranks together; ``share`` takes one rank's rows. Rows are numbers only, so nothing is
read. The arms are those of BOOM's study (arXiv 2602.05787 [paper]); their details are [our choice].

One rule for what does not divide evenly, ``drop_last``. True: the rows of a data set that do not
fill a batch are left out of this epoch (others in the next), but a data set smaller than one batch
still gives one. False: they make a batch too. Such batches are filled up with further rows of the
same data set (of the same order, from its start), which do not count: ``Batch.num_counted``.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

import torch

MIXED = -1
"""Data set of a batch with rows of several; its rows number all data sets one after the other."""


class Batch(NamedTuple):
    """Rows that are trained on together, over all ranks (or one rank's share).

    Args:
        dataset: Index of the data set, or ``MIXED``.
        rows: Indexes into that data set; with ``MIXED``, see ``locate``.
        num_counted: The first so many are real, the rest fill up and shall not count.
    """

    dataset: int
    rows: tuple[int, ...]
    num_counted: int


def batch_shuffle(
    sizes: Sequence[int], batch_size: int, *, seed: int, epoch: int = 0, drop_last: bool = True
) -> list[Batch]:
    """Batches of one data set each, their order shuffled over all data sets (BLS).

    So in-batch negatives come from the same task, and no data set is seen in one stretch (BOOM
    [code]).

    Args:
        sizes: Rows of each data set.
        batch_size: Rows a batch over all ranks.
        seed: Of rows and order.
        epoch: Another one gives other batches in another order.
        drop_last: See the top of this file.

    Raises:
        ValueError: An empty data set or a batch size below 1.

    Example:
        >>> [batch.dataset for batch in batch_shuffle([4, 2], 2, seed=0)]
        [0, 0, 1]
    """
    found = _all_batches(sizes, batch_size, (seed, epoch), drop_last)
    return _shuffled([batch for each in found for batch in each], seed, epoch, "order")


def example_shuffle(
    sizes: Sequence[int], batch_size: int, *, seed: int, epoch: int = 0, drop_last: bool = True
) -> list[Batch]:
    """All rows shuffled together: batches of mixed data sets, the control of ``batch_shuffle``.

    Args:
        sizes: Rows of each data set.
        batch_size: Rows a batch over all ranks.
        seed: Of the order.
        epoch: Another one gives another order.
        drop_last: See the top of this file, of all rows together.

    Returns:
        Batches of ``MIXED``; ``locate`` says where their rows are.

    Raises:
        ValueError: An empty data set or a batch size below 1.
    """
    check_sizes(sizes, batch_size)
    return _cut(MIXED, sum(sizes), batch_size, (seed, epoch, "mixed"), drop_last)


def sequential(
    sizes: Sequence[int],
    batch_size: int,
    *,
    seed: int,
    epoch: int = 0,
    order: Sequence[int] | None = None,
    replay: float = 0.0,
    drop_last: bool = True,
) -> list[Batch]:
    """Data set after data set, each with batches of earlier ones mixed in on request.

    Args:
        sizes: Rows of each data set.
        batch_size: Rows a batch over all ranks.
        seed: Of rows and replay.
        epoch: Another one gives other batches in the same order of data sets.
        order: Each data set once; None for the order given.
        replay: Batches of earlier data sets as a share of the current one's, rounded down; drawn
            evenly from all earlier batches, without replacement until none is left. They come on
            top: count them where arms shall see the same number of rows.
        drop_last: See the top of this file.

    Raises:
        ValueError: An order that is no permutation, a negative or infinite share, or as in
            ``batch_shuffle``.
    """
    places = list(range(len(sizes))) if order is None else list(order)
    if sorted(places) != list(range(len(sizes))):
        raise ValueError(f"order={places} must name each of {len(sizes)} data sets once")
    if not 0 <= replay < float("inf"):
        raise ValueError(f"replay={replay} must be a share of at least 0")
    found = _all_batches(sizes, batch_size, (seed, epoch), drop_last)
    batches: list[Batch] = []
    earlier: list[Batch] = []
    for stage, place in enumerate(places):
        own = found[place]
        wanted = int(exact(replay) * len(own)) if earlier else 0
        again: list[Batch] = []
        while len(again) < wanted:
            again += _shuffled(earlier, seed, epoch, "replay", stage, len(again))
        both = own + again[:wanted]
        batches += _shuffled(both, seed, epoch, "stage", stage) if wanted else own
        earlier += own
    return batches


def two_stage(
    sizes: Sequence[int],
    batch_size: int,
    groups: Sequence[Sequence[int]],
    *,
    seed: int,
    epoch: int = 0,
    drop_last: bool = True,
) -> list[Batch]:
    """Groups of data sets one after the other, ``batch_shuffle`` within each.

    ``stage_lengths`` says where a stage ends, for a learning rate that starts again.

    Args:
        sizes: Rows of each data set.
        batch_size: Rows a batch over all ranks.
        groups: Data sets of each stage, two stages or more. A data set may come in several (then
            in other batches), but must come in one.
        seed: Of rows and order.
        epoch: Another one gives other batches in another order.
        drop_last: See the top of this file.

    Raises:
        ValueError: Groups that are empty, name no data set or leave one out, or as in
            ``batch_shuffle``.
    """
    _check_groups(len(sizes), groups)
    batches: list[Batch] = []
    for stage, group in enumerate(groups):
        salt = (seed, epoch) if stage == 0 else (seed, epoch, "stage", stage)
        found = _all_batches(sizes, batch_size, salt, drop_last)
        own = [batch for place in group for batch in found[place]]
        batches += _shuffled(own, *salt, "order")
    return batches


def stage_lengths(
    sizes: Sequence[int],
    batch_size: int,
    groups: Sequence[Sequence[int]],
    *,
    drop_last: bool = True,
) -> list[int]:
    """Batches of each stage of ``two_stage`` (of ``sequential`` without replay: one set a group).

    Args:
        sizes: Rows of each data set.
        batch_size: Rows a batch over all ranks.
        groups: Data sets of each stage.
        drop_last: As for the schedule.

    Raises:
        ValueError: As ``two_stage``.
    """
    check_sizes(sizes, batch_size)
    return [sum(num_batches(sizes[i], batch_size, drop_last=drop_last) for i in g) for g in groups]


def temperature_sampling(
    sizes: Sequence[int],
    batch_size: int,
    *,
    steps: int,
    seed: int,
    epoch: int = 0,
    temperature: float = 1.0,
) -> list[Batch]:
    """The data set of every batch is drawn, with probability in proportion to ``n_i^(1 / T)``.

    ``T = 1`` is proportional sampling; larger ones raise the share of small data sets (arXiv
    1907.05019, section 4.2), ``inf`` draws them evenly. A data set's rows come in a shuffled order,
    and in a new one when it is used up: no batch crosses that border, so it has no row twice.

    Args:
        sizes: Rows of each data set.
        batch_size: Rows a batch over all ranks.
        steps: Batches.
        seed: Of the draws and the rows.
        epoch: Another one gives other draws; the rows start again.
        temperature: T, above 0.

    Raises:
        ValueError: Steps below 1, a temperature of 0 or below, or as in ``batch_shuffle``.
    """
    check_sizes(sizes, batch_size)
    if steps < 1 or not temperature > 0:
        raise ValueError(f"steps={steps} must be at least 1 and temperature={temperature} above 0")
    logs = torch.tensor([float(size) for size in sizes], dtype=torch.float64).log() / temperature
    generator = _generator(seed, epoch, "draw")
    drawn = torch.multinomial(logs.softmax(0), steps, replacement=True, generator=generator)
    waiting: list[list[Batch]] = [[] for _ in sizes]
    passes = [0] * len(sizes)
    batches = []
    for place in drawn.tolist():
        if not waiting[place]:
            salt = (seed, epoch, "rows", place, passes[place])
            waiting[place] = _cut(place, sizes[place], batch_size, salt, True)[::-1]
            passes[place] += 1
        batches.append(waiting[place].pop())
    return batches


def proportional_sampling(
    sizes: Sequence[int], batch_size: int, *, steps: int, seed: int, epoch: int = 0
) -> list[Batch]:
    """``temperature_sampling`` at temperature 1: large data sets are drawn more often."""
    return temperature_sampling(sizes, batch_size, steps=steps, seed=seed, epoch=epoch)


def locate(batch: Batch, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Data set and row of each row of a batch, mixed or not.

    Args:
        batch: Of any schedule.
        sizes: Rows of each data set, as for the schedule.

    Example:
        >>> locate(Batch(MIXED, (0, 5), 2), [4, 2])
        [(0, 0), (1, 1)]
    """
    if batch.dataset != MIXED:
        return [(batch.dataset, row) for row in batch.rows]
    ends = list(accumulate(sizes))
    places = [bisect_right(ends, row) for row in batch.rows]
    starts = [0, *ends]
    return [(place, row - starts[place]) for place, row in zip(places, batch.rows, strict=True)]


def share(batches: Sequence[Batch], rank: int, world_size: int) -> list[Batch]:
    """One rank's part: of every batch the rows ``rank, rank + world_size, ...``.

    Every rank gets as many batches, of the same data sets, with as many rows each.

    Args:
        batches: The whole schedule.
        rank: Of this process.
        world_size: Number of processes.

    Raises:
        ValueError: A rank out of range, or a batch that cannot be shared evenly.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must be from 0 to {world_size - 1}")
    found = []
    for batch in batches:
        if len(batch.rows) % world_size:
            raise ValueError(
                f"a batch of {len(batch.rows)} rows cannot be shared evenly by {world_size} "
                f"processes: use a multiple"
            )
        counted = len(range(rank, batch.num_counted, world_size))
        found.append(Batch(batch.dataset, batch.rows[rank::world_size], counted))
    return found


def whole_windows(batches: Sequence[Batch], window: int) -> list[Batch]:
    """The schedule without its last batches that fill no accumulation window.

    Args:
        batches: The whole schedule, or a share.
        window: Micro-batches an optimizer step.

    Raises:
        ValueError: Not one window is full.
    """
    kept = len(batches) // window * window if window > 0 else 0
    if not kept:
        raise ValueError(f"{len(batches)} batches do not fill one window of {window}")
    return list(batches[:kept])


def num_batches(size: int, batch_size: int, *, drop_last: bool = True) -> int:
    """Batches that a data set gives in an epoch: at least one."""
    return max(1, size // batch_size if drop_last else -(-size // batch_size))


def check_sizes(sizes: Sequence[int], batch_size: int) -> None:
    """Refuse data sets without rows and batches without any.

    Raises:
        ValueError: Names the value.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes={list(sizes)}: every data set needs at least one row")


def permutation(size: int, *salt: int | str) -> list[int]:
    """Numbers below ``size`` in an order that is a pure function of ``salt``."""
    return torch.randperm(size, generator=_generator(*salt)).tolist()


def exact(value: float) -> Fraction:
    """The number as it is written, not its nearest binary fraction."""
    return Fraction(str(value))


def _all_batches(
    sizes: Sequence[int], batch_size: int, salt: tuple[int | str, ...], drop_last: bool
) -> list[list[Batch]]:
    """Batches of each data set in a shuffled order of its rows, which the others do not change."""
    check_sizes(sizes, batch_size)
    return [
        _cut(place, size, batch_size, (*salt, "rows", place), drop_last)
        for place, size in enumerate(sizes)
    ]


def _cut(
    dataset: int, size: int, batch_size: int, salt: tuple[int | str, ...], drop_last: bool
) -> list[Batch]:
    """Shuffled rows in batches of equal size, by the rule at the top of this file."""
    order = permutation(size, *salt)
    batches = []
    for start in range(
        0, num_batches(size, batch_size, drop_last=drop_last) * batch_size, batch_size
    ):
        rows = order[start : start + batch_size]
        counted = len(rows)
        rows += [order[i % size] for i in range(batch_size - counted)]
        batches.append(Batch(dataset, tuple(rows), counted))
    return batches


def _shuffled(batches: Sequence[Batch], *salt: int | str) -> list[Batch]:
    return [batches[place] for place in permutation(len(batches), *salt)]


def _generator(*salt: int | str) -> torch.Generator:
    """A generator of its own for every purpose, the same on every machine and rank."""
    digest = hashlib.sha256(repr(salt).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def _check_groups(count: int, groups: Sequence[Sequence[int]]) -> None:
    """Refuse stages that cannot be, or that forget a data set."""
    if len(groups) < 2 or not all(groups):
        raise ValueError(f"groups={groups} must be two stages or more, none of them empty")
    named = [place for group in groups for place in group]
    if any(len(set(group)) < len(group) for group in groups) or set(named) != set(range(count)):
        raise ValueError(
            f"groups={groups} must name every data set from 0 to {count - 1}, once in a stage"
        )

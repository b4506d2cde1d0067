"""The order of a whole run: data sets, epochs and bags as one list of batches.

Options in terms of names; the arms themselves are in ``schedules`` and ``bags``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args

from datamodules.bags import bag, select
from datamodules.schedules import (
    Batch,
    batch_shuffle,
    example_shuffle,
    sequential,
    temperature_sampling,
    two_stage,
    whole_windows,
)
from datamodules.sources import nearest

Name = Literal["batch_shuffle", "example_shuffle", "sequential", "two_stage", "temperature"]
REST = "rest"
"""In the percentages of a bag: all data sets that are not named."""


@dataclass(frozen=True)
class Plan:
    """Batches of a run, in order.

    Args:
        batches: Over all ranks.
        stages: Batches of each stage; a stage starts with a new learning-rate schedule (bags).
    """

    batches: list[Batch]
    stages: list[int]


class Schedule:
    """Which batches a run trains on.

    Args:
        name: ``batch_shuffle`` (batches of one data set, in shuffled order), ``example_shuffle``
            (mixed batches), ``sequential`` (data set after data set), ``two_stage`` (groups of data
            sets) or ``temperature`` (data sets are drawn).
        epochs: Passes over the data.
        order: ``sequential``: names of the data sets in order; None for the task's.
        replay: ``sequential``: batches of earlier data sets, as a share of the current one's.
        groups: ``two_stage``: names of the data sets of each stage.
        temperature: Of ``temperature``; 1 is in proportion to sizes, larger is more even.
        steps: Batches of ``temperature``; None for as many as the other schedules have.
        drop_last: See ``schedules``.
        bags: Models trained one after the other on parts of the data (BOOM); each starts from the
            same weights (``callbacks/model_merging.py``). A bag is ``{percent: 60}`` of every data
            set, or ``{percent: {web: 100, rest: 40}}``; data sets at 0 are left out. None for one
            model on everything.
        nested: Draw bags from one order, so that a smaller one is part of a larger one.

    Raises:
        ValueError: A value is not allowed.

    Example:
        >>> plan = Schedule(bags=[{"percent": 50}, {"percent": 100}]).plan(
        ...     {"a": 8, "b": 4}, batch_size=2, seed=0
        ... )
        >>> plan.stages
        [3, 6]
    """

    def __init__(
        self,
        *,
        name: Name = "batch_shuffle",
        epochs: int = 1,
        order: list[str] | None = None,
        replay: float = 0.0,
        groups: list[list[str]] | None = None,
        temperature: float = 1.0,
        steps: int | None = None,
        drop_last: bool = True,
        bags: list[dict[str, Any]] | None = None,
        nested: bool = False,
    ) -> None:
        problems = []
        if name not in get_args(Name):
            problems.append(
                f"data.schedule.name={name!r} must be one of {', '.join(get_args(Name))}"
                f"{nearest(str(name), get_args(Name))}"
            )
        if epochs < 1:
            problems.append(f"data.schedule.epochs={epochs} must be at least 1")
        if name == "two_stage" and not groups:
            problems.append("data.schedule.name=two_stage needs data.schedule.groups")
        if bags is not None and name == "example_shuffle":
            problems.append("data.schedule.bags cannot be cut into mixed batches (example_shuffle)")
        for number, each in enumerate(bags or []):
            problems += _bag_problems(number, each)
        if bags is not None and not bags:
            problems.append("data.schedule.bags=[] holds no bag; null trains one model")
        if problems:
            raise ValueError("; ".join(problems))
        self.name, self.epochs, self.order, self.replay = name, epochs, order, replay
        self.groups, self.temperature, self.steps = groups, temperature, steps
        self.drop_last, self.bags, self.nested = drop_last, bags, nested

    def plan(
        self, sizes: Mapping[str, int], *, batch_size: int, seed: int, window: int = 1
    ) -> Plan:
        """The batches of a run.

        Args:
            sizes: Rows of each data set, by name.
            batch_size: Rows a batch over all ranks.
            seed: Of everything drawn.
            window: Micro-batches an optimizer step; what does not fill one is left out.

        Raises:
            ValueError: An unknown data set, an empty bag, or too few rows for one window.
        """
        names, counts = list(sizes), list(sizes.values())
        if self.bags is None:
            batches = whole_windows(self._batches(names, counts, batch_size, seed), window)
            return Plan(batches, [len(batches)])
        found: list[Batch] = []
        stages = []
        for number, each in enumerate(self.bags):
            kept = self._bag(number, each["percent"], names, counts, batch_size, seed)
            chosen = [place for place, rows in enumerate(kept) if rows]
            # another order for every bag, and for bags of 100 percent nothing else (a seed soup)
            part = self._without({names[place] for place, rows in enumerate(kept) if not rows})
            batches = part._batches(
                [names[place] for place in chosen],
                [len(kept[place]) for place in chosen],
                batch_size,
                seed * 1009 + number,
            )
            batches = [batch._replace(dataset=chosen[batch.dataset]) for batch in batches]
            batches = whole_windows(select(batches, kept), window)
            found += batches
            stages.append(len(batches))
        return Plan(found, stages)

    def _bag(
        self,
        number: int,
        percent: float | Mapping[str, float],
        names: Sequence[str],
        counts: Sequence[int],
        batch_size: int,
        seed: int,
    ) -> list[list[int]]:
        """Rows of each data set in a bag; [] where it is left out."""
        shares = percent if isinstance(percent, Mapping) else {REST: percent}
        if unknown := sorted(set(shares) - {REST, *names}):
            raise ValueError(
                f"data.schedule.bags[{number}].percent names the unknown data set {unknown[0]!r}"
                f"{nearest(unknown[0], names)}; there are {', '.join(names)} (and {REST!r})"
            )
        kept = []
        for place, name in enumerate(names):
            share = float(shares.get(name, shares.get(REST, 0.0)))
            rows: list[int] = []
            if share:
                rows = bag(
                    counts,
                    share,
                    seed=seed,
                    member=number,
                    nested=self.nested,
                    batch_size=batch_size,
                )[place]
            kept.append(rows)
        if not any(kept):
            raise ValueError(f"data.schedule.bags[{number}] is empty: every data set is at 0")
        return kept

    def _without(self, left_out: set[str]) -> Schedule:
        """This schedule for a bag without some data sets."""
        part = copy(self)
        if self.order is not None:
            part.order = [name for name in self.order if name not in left_out]
        if self.groups is not None:
            groups = [[name for name in group if name not in left_out] for group in self.groups]
            part.groups = [group for group in groups if group] if left_out else groups
        if left_out and self.name == "two_stage" and len(part.groups or []) == 1:
            part.name = "batch_shuffle"  # one stage is left
        return part

    def _batches(
        self, names: Sequence[str], sizes: Sequence[int], batch_size: int, seed: int
    ) -> list[Batch]:
        batches: list[Batch] = []
        for epoch in range(self.epochs):
            own: dict[str, Any] = {"seed": seed, "epoch": epoch}
            if self.name == "temperature":
                steps = self.steps or sum(max(1, size // batch_size) for size in sizes)
                batches += temperature_sampling(
                    sizes, batch_size, steps=steps, temperature=self.temperature, **own
                )
                continue
            own["drop_last"] = self.drop_last
            if self.name == "batch_shuffle":
                batches += batch_shuffle(sizes, batch_size, **own)
            elif self.name == "example_shuffle":
                batches += example_shuffle(sizes, batch_size, **own)
            elif self.name == "sequential":
                order = None if self.order is None else self._places(self.order, names, "order")
                batches += sequential(sizes, batch_size, order=order, replay=self.replay, **own)
            else:
                groups = [self._places(group, names, "groups") for group in self.groups or []]
                batches += two_stage(sizes, batch_size, groups, **own)
        return batches

    @staticmethod
    def _places(chosen: Sequence[str], names: Sequence[str], key: str) -> list[int]:
        if unknown := [name for name in chosen if name not in names]:
            raise ValueError(
                f"data.schedule.{key} names the unknown data set {unknown[0]!r}"
                f"{nearest(unknown[0], names)}; there are {', '.join(names)}"
            )
        return [list(names).index(name) for name in chosen]


def _bag_problems(number: int, each: Any) -> list[str]:
    key = f"data.schedule.bags[{number}]"
    if not isinstance(each, Mapping) or set(each) != {"percent"}:
        return [f"{key}={each!r} must be {{percent: 60}} or {{percent: {{name: 100, rest: 40}}}}"]
    percent = each["percent"]
    shares = percent if isinstance(percent, Mapping) else {REST: percent}
    lowest = 0 if isinstance(percent, Mapping) else 1e-9
    return [
        f"{key}.percent{'' if shares is not percent else '.' + str(name)}={share!r} must be a "
        f"number above 0, at most 100"
        for name, share in shares.items()
        if isinstance(share, bool)
        or not isinstance(share, (int, float))
        or not lowest <= share <= 100
    ]

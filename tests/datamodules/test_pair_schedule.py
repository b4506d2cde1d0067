"""The order of a whole run: bags, their sizes and independence, windows, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from datamodules.pair_schedule import Plan, Schedule
from datamodules.schedules import Batch, locate

SIZES = {"web": 40, "sts": 25, "wiki": 64, "tiny": 3}
NAMES = list(SIZES)
HALVES = [{"percent": 50}, {"percent": 50}]


def plan(sizes: dict[str, int] = SIZES, seed: int = 0, window: int = 1, **options: Any) -> Plan:
    return Schedule(**options).plan(sizes, batch_size=4, seed=seed, window=window)


def stages(found: Plan) -> list[list[Batch]]:
    """Batches of each stage."""
    parts, start = [], 0
    for length in found.stages:
        parts.append(found.batches[start : start + length])
        start += length
    assert start == len(found.batches)
    return parts


def counted(batches: list[Batch], sizes: dict[str, int] = SIZES) -> list[tuple[str, int]]:
    """Data set and row of all rows that count."""
    return [
        (NAMES[place], row)
        for batch in batches
        for place, row in locate(batch, list(sizes.values()))[: batch.num_counted]
    ]


def rows_of(batches: list[Batch], name: str) -> set[int]:
    return {row for other, row in counted(batches) if other == name}


@pytest.mark.parametrize("percent", [20, 29, 60, 100, 37.5])
def test_a_bag_has_its_share_of_every_data_set_each_row_once(percent: float) -> None:
    (batches,) = stages(plan(bags=[{"percent": percent}], drop_last=False))
    seen = counted(batches)
    assert len(seen) == len(set(seen))
    for name, size in SIZES.items():
        least = min(4, size)  # a data set gives one batch at least
        assert len(rows_of(batches, name)) == max(int(round(percent * size, 6) // 100), least)


def test_percentages_by_data_set_and_the_rest() -> None:
    bags = [{"percent": {"web": 100, "rest": 40}}, {"percent": {"sts": 80, "wiki": 0}}]
    first, second = stages(plan(bags=bags, drop_last=False))
    assert [len(rows_of(first, name)) for name in NAMES] == [40, 10, 25, 3]
    assert [len(rows_of(second, name)) for name in NAMES] == [0, 20, 0, 0]


def test_bags_are_drawn_apart_and_nested_ones_inside_each_other() -> None:
    sizes = {"web": 400}
    one, two = (rows_of(part, "web") for part in stages(plan(sizes, bags=HALVES)))
    assert len(one) == len(two) == 200
    assert 70 < len(one & two) < 130, "half of a half, but for chance"
    other, _ = (rows_of(part, "web") for part in stages(plan(sizes, bags=HALVES, seed=1)))
    assert other != one
    bags = [{"percent": 20}, {"percent": 60}, {"percent": 60}]
    small, large, again = (
        rows_of(part, "web") for part in stages(plan(sizes, bags=bags, nested=True))
    )
    assert small < large == again


def test_bags_of_everything_differ_in_order_alone() -> None:
    one, two = stages(plan(bags=[{"percent": 100}] * 2, drop_last=False))
    assert set(counted(one)) == set(counted(two)) and one != two


@pytest.mark.parametrize(
    "options",
    [
        {"name": "batch_shuffle", "epochs": 2},
        {"name": "sequential", "order": ["wiki", "tiny", "web", "sts"], "replay": 0.5},
        {"name": "two_stage", "groups": [["web", "wiki"], ["sts", "tiny"]]},
        {"name": "temperature", "temperature": 3.0, "steps": 20},
        {"bags": HALVES},
    ],
)
def test_a_plan_is_a_pure_function_of_its_seed(options: dict[str, Any]) -> None:
    first = plan(**options)
    assert first == plan(**options)
    assert first != plan(seed=1, **options)
    assert all(batch.dataset >= 0 for batch in first.batches), "one data set a batch"


def test_epochs_see_every_row_again_in_another_order() -> None:
    found = plan(epochs=2, drop_last=False)
    half = len(found.batches) // 2
    passes = [counted(found.batches[:half]), counted(found.batches[half:])]
    assert set(passes[0]) == set(passes[1])
    assert len(passes[0]) == len(set(passes[0])) == sum(SIZES.values())
    assert passes[0] != passes[1]


def test_sequential_order_and_stages_of_groups_follow_the_names() -> None:
    order = ["wiki", "tiny", "web", "sts"]
    found = plan(name="sequential", order=order)
    seen = list(dict.fromkeys(NAMES[batch.dataset] for batch in found.batches))
    assert seen == order
    groups = [["sts", "web"], ["tiny", "wiki"]]
    names = [NAMES[batch.dataset] for batch in plan(name="two_stage", groups=groups).batches]
    border = 10 + 6  # batches of the first group
    assert set(names[:border]) == set(groups[0]) and set(names[border:]) == set(groups[1])


def test_a_bag_may_leave_out_what_order_and_groups_name() -> None:
    bags = [{"percent": 100}, {"percent": {"wiki": 100, "sts": 100}}]
    order = ["wiki", "tiny", "web", "sts"]
    whole, part = stages(plan(name="sequential", order=order, bags=bags))
    assert list(dict.fromkeys(NAMES[batch.dataset] for batch in whole)) == order
    assert list(dict.fromkeys(NAMES[batch.dataset] for batch in part)) == ["wiki", "sts"]
    for groups in ([["sts"], ["wiki", "web", "tiny"]], [["web", "tiny"], ["wiki", "sts"]]):
        _, part = stages(plan(name="two_stage", groups=groups, bags=bags))
        assert {NAMES[batch.dataset] for batch in part} == {"wiki", "sts"}
        assert len(part) == 16 + 6
    two = [NAMES[batch.dataset] for batch in part]
    assert two != sorted(two), "one group is left: shuffled as one"


def test_every_stage_is_cut_to_whole_windows() -> None:
    bags = [{"percent": 30}, {"percent": 70}]
    loose = plan(bags=bags)
    for window in (2, 3):
        found = plan(bags=bags, window=window)
        assert found.stages == [n // window * window for n in loose.stages]
        for mine, whole in zip(stages(found), stages(loose), strict=True):
            assert mine == whole[: len(mine)]
    with pytest.raises(ValueError, match="do not fill one window of 50"):
        plan(bags=bags, window=50)


def test_temperature_draws_as_many_batches_as_a_pass_has() -> None:
    assert len(plan(name="temperature").batches) == 10 + 6 + 16 + 1
    assert len(plan(name="temperature", steps=7).batches) == 7
    assert len(plan(name="temperature", bags=HALVES).stages) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "batch_shufle"}, "'batch_shufle' must be one of .*did you mean 'batch_shuffle'"),
        ({"epochs": 0}, "data.schedule.epochs=0 must be at least 1"),
        ({"name": "two_stage"}, "two_stage needs data.schedule.groups"),
        ({"bags": []}, r"bags=\[\] holds no bag; null trains one model"),
        ({"bags": HALVES, "name": "example_shuffle"}, "bags cannot be cut into mixed batches"),
        ({"bags": [{"percnt": 40}]}, r"bags\[0\]=\{'percnt': 40\} must be \{percent: 60\}"),
        ({"bags": [40]}, r"bags\[0\]=40 must be"),
        ({"bags": [{"percent": 60}, {"percent": 0}]}, r"bags\[1\].percent=0 must be a number"),
        ({"bags": [{"percent": {"web": 101}}]}, r"bags\[0\].percent.web=101 must be a number"),
        ({"bags": [{"percent": True}]}, r"bags\[0\].percent=True must be a number"),
        ({"bags": [{"percent": {"web": 0}}]}, r"bags\[0\] is empty: every data set is at 0"),
        (
            {"bags": [{"percent": {"wbe": 50}}]},
            r"bags\[0\].percent names the unknown data set 'wbe'.*did you mean 'web'.*'rest'",
        ),
        (
            {"name": "sequential", "order": ["web", "sts", "wki", "tiny"]},
            "data.schedule.order names the unknown data set 'wki'.*did you mean 'wiki'",
        ),
        (
            {"name": "two_stage", "groups": [["web"], ["sts", "wiki", "tini"]]},
            "data.schedule.groups names the unknown data set 'tini'.*did you mean 'tiny'",
        ),
        ({"name": "sequential", "order": ["web", "sts"]}, "must name each of 4 data sets once"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**options)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ValueError) as error:
        Schedule(name="sequential", epochs=0, bags=[{"percent": 200}, {"part": 1}])
    for part in ("epochs=0", "bags[0].percent=200", "bags[1]="):
        assert part in str(error.value)

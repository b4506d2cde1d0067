"""Orders of batches: homogeneity, every row once, stages, replay, draws, ranks, determinism."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from datamodules.bags import bag, select
from datamodules.schedules import (
    MIXED,
    Batch,
    batch_shuffle,
    example_shuffle,
    locate,
    num_batches,
    proportional_sampling,
    sequential,
    share,
    stage_lengths,
    temperature_sampling,
    two_stage,
    whole_windows,
)
from tests.runs import call

SIZES = [40, 3, 17, 64]
GROUPS = [[0, 3], [1, 2]]
SCHEDULES: dict[str, Callable[..., list[Batch]]] = {
    "batch_shuffle": batch_shuffle,
    "example_shuffle": example_shuffle,
    "sequential": sequential,
    "replay": lambda *a, **k: sequential(*a, replay=0.5, **k),
    "two_stage": lambda *a, **k: two_stage(*a, GROUPS, **k),
    "temperature": lambda *a, **k: temperature_sampling(*a, steps=30, temperature=3.0, **k),
}
HOMOGENEOUS = [name for name in SCHEDULES if name != "example_shuffle"]
ONCE = ["batch_shuffle", "example_shuffle", "sequential", "two_stage"]


def rows_of(batches: list[Batch], sizes: list[int] = SIZES) -> list[tuple[int, int]]:
    """Data set and row of all rows that count."""
    return [pair for batch in batches for pair in locate(batch, sizes)[: batch.num_counted]]


def every_row(sizes: list[int] = SIZES) -> list[tuple[int, int]]:
    return [(place, row) for place, size in enumerate(sizes) for row in range(size)]


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_every_batch_has_one_data_set_and_its_rows(name):
    for batch in SCHEDULES[name](SIZES, 4, seed=0):
        assert batch.dataset in range(len(SIZES)) and len(batch.rows) == 4
        assert all(0 <= row < SIZES[batch.dataset] for row in batch.rows)
        real = batch.rows[: batch.num_counted]
        assert real and len(set(real)) == len(real)


@pytest.mark.parametrize("name", ONCE)
def test_each_row_once_when_batches_are_filled_up(name):
    found = rows_of(SCHEDULES[name](SIZES, 4, seed=3, drop_last=False))
    assert sorted(found) == every_row()


@pytest.mark.parametrize("name", ONCE)
def test_dropping_leaves_out_less_than_a_batch_of_a_data_set(name):
    batches = SCHEDULES[name](SIZES, 4, seed=3)
    counts = Counter(place for place, _ in rows_of(batches))
    assert len(set(rows_of(batches))) == sum(counts.values())
    if name == "example_shuffle":
        assert sum(counts.values()) == sum(SIZES) // 4 * 4
    else:
        # the set of 3 rows is less than a batch, but gives one, filled up
        assert counts == {0: 40, 1: 3, 2: 16, 3: 64}
        (small,) = [batch for batch in batches if batch.dataset == 1]
        assert small.num_counted == 3 and sorted(set(small.rows)) == [0, 1, 2]


def test_a_filled_up_batch_has_no_row_twice_where_there_are_enough():
    for batch in batch_shuffle([6, 9], 4, seed=1, drop_last=False):
        assert len(set(batch.rows)) == 4
    assert num_batches(9, 4) == 2 and num_batches(9, 4, drop_last=False) == 3
    assert num_batches(3, 4) == 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_pure_function_of_seed_and_epoch(name):
    make = SCHEDULES[name]
    once = make(SIZES, 4, seed=5, epoch=2)
    assert once == make(SIZES, 4, seed=5, epoch=2)
    assert once != make(SIZES, 4, seed=5, epoch=3)
    assert once != make(SIZES, 4, seed=6, epoch=2)


def test_another_process_makes_the_same():
    """No hash seed, thread or global random state has a part in it."""
    code = (
        "import json, torch; torch.manual_seed(123)\n"
        "from datamodules.schedules import batch_shuffle\n"
        f"print(json.dumps(batch_shuffle({SIZES}, 4, seed=5, epoch=1)))"
    )
    result = call(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    here = [
        [x.dataset, list(x.rows), x.num_counted] for x in batch_shuffle(SIZES, 4, seed=5, epoch=1)
    ]
    assert json.loads(result.stdout) == here


def test_order_of_batch_shuffle_is_not_sequential():
    shuffled = [batch.dataset for batch in batch_shuffle(SIZES, 4, seed=0)]
    assert shuffled != sorted(shuffled)
    changes = sum(a != b for a, b in zip(shuffled, shuffled[1:], strict=False))
    assert changes > 2 * (len(SIZES) - 1)
    rows = [row for batch in batch_shuffle([64], 4, seed=0) for row in batch.rows]
    assert rows != sorted(rows)


def test_example_shuffle_mixes():
    batches = example_shuffle(SIZES, 8, seed=0)
    assert {batch.dataset for batch in batches} == {MIXED}
    mixed = sum(len({place for place, _ in locate(batch, SIZES)}) > 1 for batch in batches)
    assert mixed > len(batches) / 2


def test_sequential_takes_the_order_given():
    batches = sequential(SIZES, 4, seed=0, order=[2, 0, 3, 1])
    assert list(dict.fromkeys(batch.dataset for batch in batches)) == [2, 0, 3, 1]
    changes = sum(a.dataset != b.dataset for a, b in zip(batches, batches[1:], strict=False))
    assert changes == len(SIZES) - 1


@pytest.mark.parametrize("replay", [0.29, 0.5, 2.0])
def test_replay_adds_batches_of_earlier_sets_only(replay):
    sizes = [8, 400, 400]
    plain = sequential(sizes, 4, seed=0)
    batches = sequential(sizes, 4, seed=0, replay=replay)
    extra = int(round(replay * 100)) * 100 // 100
    assert len(batches) == len(plain) + 2 * extra
    first = batches[:2]
    second, third = batches[2 : 102 + extra], batches[102 + extra :]
    assert {batch.dataset for batch in first} == {0}
    again = [batch for batch in second if batch.dataset == 0]
    assert len(again) == extra and set(again) <= set(first)
    assert {batch.dataset for batch in third} == {0, 1, 2}
    counts = Counter(batch for batch in third if batch.dataset != 2)
    assert sum(counts.values()) == extra
    assert max(counts.values()) - min(counts.values()) <= 1  # none again before all were used
    assert any(a.dataset == 1 and b.dataset == 0 for a, b in zip(second, second[1:], strict=False))


def test_stages_come_one_after_the_other():
    batches = two_stage(SIZES, 4, GROUPS, seed=0)
    first, second = stage_lengths(SIZES, 4, GROUPS)
    assert (first, second) == (26, 5) and len(batches) == 31
    assert {batch.dataset for batch in batches[:first]} == {0, 3}
    assert {batch.dataset for batch in batches[first:]} == {1, 2}
    order = [batch.dataset for batch in batches[:first]]
    assert order != sorted(order)


def test_a_data_set_of_two_stages_comes_in_other_batches():
    batches = two_stage([20, 20], 4, [[0], [0, 1]], seed=0)
    first, second = batches[:5], [batch for batch in batches[5:] if batch.dataset == 0]
    assert len(second) == 5 and not set(first) & set(second)


def test_temperature_flattens_the_shares():
    sizes = [1000, 100, 10]
    for temperature, powers in ((1.0, 1.0), (2.0, 0.5), (float("inf"), 0.0)):
        batches = temperature_sampling(sizes, 4, steps=6000, seed=0, temperature=temperature)
        counts = Counter(batch.dataset for batch in batches)
        weights = [size**powers for size in sizes]
        for place, weight in enumerate(weights):
            assert counts[place] / 6000 == pytest.approx(weight / sum(weights), abs=0.02)
    drawn = temperature_sampling(sizes, 4, steps=50, seed=0, temperature=1.0)
    assert proportional_sampling(sizes, 4, steps=50, seed=0) == drawn


def test_drawn_rows_are_used_up_before_they_come_again():
    batches = temperature_sampling([9], 4, steps=4, seed=0)
    passes = [{row for batch in batches[i : i + 2] for row in batch.rows} for i in (0, 2)]
    assert [len(rows) for rows in passes] == [8, 8]
    assert [b.rows for b in batches[:2]] != [b.rows for b in batches[2:]]


# --- bags -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("percent", [20, 29, 33.3, 60, 100])
def test_a_bag_has_the_floor_of_each_data_set(percent):
    sizes = [100, 1000, 7]
    found = bag(sizes, percent, seed=0)
    exact = {20: [20, 200, 1], 29: [29, 290, 2], 33.3: [33, 333, 2], 60: [60, 600, 4], 100: sizes}
    assert [len(rows) for rows in found] == exact[percent]
    for rows, size in zip(found, sizes, strict=True):
        assert rows == sorted(set(rows)) and rows[0] >= 0 and rows[-1] < size
    assert found == bag(sizes, percent, seed=0)
    if percent < 100:
        assert found != bag(sizes, percent, seed=1)


def test_a_bag_keeps_one_batch_of_a_small_set():
    assert [len(rows) for rows in bag([100, 10, 3], 20, seed=0, batch_size=8)] == [20, 8, 3]


def test_members_are_independent_unless_nested():
    small, large = (set(bag([1000], k, seed=0, member=m)[0]) for m, k in enumerate((40, 60)))
    assert len(small & large) == pytest.approx(240, abs=50)  # 40% of 60%
    small, large = (
        set(bag([1000], k, seed=0, member=m, nested=True)[0]) for m, k in enumerate((40, 60))
    )
    assert small < large
    # the second bag of one seed is not the first of the next
    assert bag([1000], 40, seed=0, member=1) != bag([1000], 40, seed=1, member=0)


@pytest.mark.parametrize("name", ["batch_shuffle", "sequential", "two_stage"])
def test_a_schedule_over_a_bag_has_its_rows_once(name):
    kept = bag(SIZES, 50, seed=0, batch_size=4)
    sizes = [len(rows) for rows in kept]
    batches = select(SCHEDULES[name](sizes, 4, seed=0, drop_last=False), kept)
    expected = [(place, row) for place, rows in enumerate(kept) for row in rows]
    assert sorted(rows_of(batches)) == expected
    assert Counter(p for p, _ in rows_of(batches)) == {0: 20, 1: 3, 2: 8, 3: 32}
    with pytest.raises(ValueError, match="locate"):
        select(example_shuffle(sizes, 4, seed=0), kept)


# --- ranks and windows ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_every_batch(name, world):
    options: dict[str, Any] = {} if name == "temperature" else {"drop_last": False}
    whole = SCHEDULES[name](SIZES, 4, seed=0, **options)
    shares = [share(whole, rank, world) for rank in range(world)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert {part.dataset for part in parts} == {batch.dataset}
        assert {len(part.rows) for part in parts} == {4 // world}
        assert sorted(row for part in parts for row in part.rows) == sorted(batch.rows)
        real = [row for part in parts for row in part.rows[: part.num_counted]]
        assert sorted(real) == sorted(batch.rows[: batch.num_counted])


def test_whole_windows():
    batches = batch_shuffle([28], 4, seed=0)
    assert whole_windows(batches, 3) == batches[:6]
    assert whole_windows(batches, 7) == batches
    for window in (0, 8):
        with pytest.raises(ValueError, match="window"):
            whole_windows(batches, window)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: batch_shuffle([4, 0], 2, seed=0), "at least one row"),
        (lambda: batch_shuffle([], 2, seed=0), "at least one row"),
        (lambda: example_shuffle([4], 0, seed=0), "batch_size=0"),
        (lambda: sequential([4, 4], 2, seed=0, order=[0, 0]), "once"),
        (lambda: sequential([4, 4], 2, seed=0, replay=-1), "replay=-1"),
        (lambda: two_stage([4, 4, 4], 2, [[0], [1]], seed=0), "every data set from 0 to 2"),
        (lambda: two_stage([4, 4], 2, [[0, 1]], seed=0), "two stages"),
        (lambda: two_stage([4, 4], 2, [[0, 0], [1]], seed=0), "once in a stage"),
        (lambda: temperature_sampling([4], 2, steps=0, seed=0), "steps=0"),
        (lambda: temperature_sampling([4], 2, steps=1, seed=0, temperature=0), "temperature=0"),
        (lambda: bag([4], 0, seed=0), "percent=0"),
        (lambda: bag([4], 101, seed=0), "percent=101"),
        (lambda: share([Batch(0, (1, 2, 3), 3)], 0, 2), "cannot be shared evenly"),
        (lambda: share([], 2, 2), "rank=2"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Tests of pairs and rank correlations against whole distributions, scipy and known worlds."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from torch import Tensor

from lightning_modules.functional.paired_tests import (
    bootstrap,
    mcnemar,
    paired_bootstrap,
    partial_spearman,
    ranks,
    spearman,
    spearman_p_value,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def marks(ups: int, downs: int, equal: int) -> tuple[list[int], list[int]]:
    return [1] * ups + [0] * downs + [1] * equal, [0] * ups + [1] * downs + [1] * equal


@pytest.mark.parametrize(("ups", "downs"), [(0, 0), (1, 0), (0, 6), (3, 3), (2, 9), (7, 4)])
def test_mcnemar_by_tossing_all_coins(ups, downs):
    found = mcnemar(*marks(ups, downs, equal=5))
    heads = [sum(toss) for toss in itertools.product((0, 1), repeat=ups + downs)]
    least = sum(h <= min(ups, downs) for h in heads) / len(heads)
    assert (found.only_first, found.only_second) == (ups, downs)
    assert found.p_value == pytest.approx(min(1.0, 2 * least), abs=1e-15)
    assert mcnemar(*reversed(marks(ups, downs, equal=5))).p_value == found.p_value


@pytest.mark.parametrize(("ups", "downs"), [(0, 1), (5, 17), (200, 240), (60, 0), (1000, 1100)])
def test_mcnemar_equals_scipy(ups, downs):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(ups, ups + downs).pvalue
    assert mcnemar(*marks(ups, downs, equal=3)).p_value == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_many_pairs_is_fast_and_finite():
    start = time.perf_counter()
    found = mcnemar(torch.ones(3000, dtype=torch.bool), torch.zeros(3000, dtype=torch.bool))
    assert 0 <= found.p_value < 1e-300 and time.perf_counter() - start < 5
    many = torch.arange(6000) % 2
    assert mcnemar(many, 1 - many).p_value == 1


def test_mcnemar_takes_marks_only():
    with pytest.raises(ValueError, match="second must hold only 0 and 1"):
        mcnemar([1, 0], [0.5, 0])
    with pytest.raises(ValueError, match="2 values of first cannot pair with 1 of second"):
        mcnemar([1, 0], [0])


def test_bootstrap_of_means_equals_bootstrap_of_the_statistic():
    one, two = randn(40), randn(40, seed=1)
    fast = paired_bootstrap(one, two, seed="x", samples=300, level=0.9)
    rows = torch.stack([one, two], dim=1)
    slow = bootstrap(
        rows, lambda r: float((r[:, 0] - r[:, 1]).mean()), seed="x", samples=300, level=0.9
    )
    assert (fast.low, fast.high) == pytest.approx((slow.low, slow.high))
    assert fast.estimate == pytest.approx(float((one - two).mean()))
    assert fast.low < fast.estimate < fast.high


def test_percentile_interval_over_all_resamples():
    """Of two rows with 0 and 1 a resample's mean is 0, 1/2 or 1 with 1/4, 1/2 and 1/4."""
    wide = paired_bootstrap([0.0, 1.0], [0.0, 0.0], seed=0, samples=4000, level=0.6)
    assert (wide.low, wide.high) == (0.0, 1.0)
    narrow = paired_bootstrap([0.0, 1.0], [0.0, 0.0], seed=0, samples=4000, level=0.4)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_interval_is_as_wide_as_the_normal_one():
    gaps = randn(400)
    found = paired_bootstrap(gaps, torch.zeros(400), seed=3, samples=4000)
    half = 1.96 * float(gaps.std()) / 20
    assert found.high - found.low == pytest.approx(2 * half, rel=0.06)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for trial in range(300):
        found = paired_bootstrap(
            randn(60, seed=trial) + 0.5, torch.zeros(60), seed=trial, samples=400, level=0.8
        )
        covered += found.low <= 0.5 <= found.high
    assert 0.72 < covered / 300 < 0.87


def test_pairing_matters():
    level = randn(100) * 10
    one, two = level + 0.1 * randn(100, seed=1) + 0.2, level
    paired = paired_bootstrap(one, two, seed=0)
    broken = paired_bootstrap(one, two.roll(1), seed=0)
    assert paired.low > 0 > broken.low


def test_seeds_decide_and_global_state_does_not():
    one, two = randn(30), randn(30, seed=1)
    torch.manual_seed(1)
    first = paired_bootstrap(one, two, seed="a", samples=50)
    state = torch.get_rng_state()
    assert paired_bootstrap(one, two, seed="a", samples=50) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert paired_bootstrap(one, two, seed="b", samples=50) != first


def test_texts_with_several_slots_are_drawn_whole():
    """Slots that fail together: an interval over texts is wider than one over slots."""
    right = torch.tensor([4.0, 0.0]).repeat(20)
    texts = torch.stack([right, torch.full((40,), 4.0)], dim=1)
    slots = torch.tensor([1.0, 0.0]).repeat_interleave(4).repeat(20)
    by_text = bootstrap(texts, lambda r: float(r[:, 0].sum() / r[:, 1].sum()), seed=0)
    by_slot = paired_bootstrap(slots, torch.zeros(160), seed=0)
    ratio = (by_text.high - by_text.low) / (by_slot.high - by_slot.low)
    assert ratio == pytest.approx(2, rel=0.15)


def test_undefined_resamples_are_counted():
    rows = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    found = bootstrap(rows, lambda r: spearman(r[:, 0], r[:, 1]), seed=0, samples=400)
    assert (found.low, found.high) == pytest.approx((1, 1))
    assert 150 < found.undefined < 250  # both rows equal in half of them
    with pytest.raises(ValueError, match="NaN in all 10 resamples"):
        bootstrap(rows, lambda r: math.nan, seed=0, samples=10)


def test_wrong_bootstrap_options_are_named_at_once():
    expected = r"at least one row; samples=0 must be at least 1; level=1 must be in \(0, 1\)"
    with pytest.raises(ValueError, match=expected):
        paired_bootstrap([], [], seed=0, samples=0, level=1)
    with pytest.raises(ValueError, match=r"first\[1\] is not finite"):
        paired_bootstrap([0.0, math.nan], [0.0, 0.0], seed=0)
    with pytest.raises(ValueError, match=r"first must be \(N,\)"):
        paired_bootstrap(torch.zeros(2, 2), torch.zeros(2), seed=0)


def test_ranks_by_counting():
    values = [3.0, -1.0, 3.0, 2.0, 3.0, -1.0]
    expected = [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]
    assert ranks(values).tolist() == expected == [5.0, 1.5, 5.0, 3.0, 5.0, 1.5]
    assert ranks([]).tolist() == []


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_spearman_equals_scipy_also_with_ties(levels):
    stats = pytest.importorskip("scipy.stats")
    for seed in range(10):
        maker = torch.Generator().manual_seed(seed)
        x, y = torch.randint(levels, (2, 25), generator=maker).double()
        expected = stats.spearmanr(x.numpy(), y.numpy()).statistic
        assert spearman(x, y) == pytest.approx(float(expected), abs=1e-12)
        torch.testing.assert_close(ranks(x), torch.tensor(stats.rankdata(x.numpy())))


def test_spearman_sees_order_alone():
    x, y = randn(30), randn(30, seed=1) + randn(30)
    found = spearman(x, y)
    assert spearman(x.exp(), y**3) == pytest.approx(found)
    assert spearman(-x, y) == pytest.approx(-found) and spearman(y, x) == pytest.approx(found)
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert math.isnan(spearman(x, torch.ones(30))) and math.isnan(spearman([1.0], [2.0]))


def test_partial_spearman_by_its_formula():
    for seed in range(10):
        z = randn(20, seed=seed).round(decimals=0)
        x, y = z + randn(20, seed=seed + 100), z + randn(20, seed=seed + 200)
        xy, xz, yz = spearman(x, y), spearman(x, z), spearman(y, z)
        expected = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
        assert partial_spearman(x, y, z) == pytest.approx(expected, abs=1e-12)


def test_a_common_cause_is_taken_off():
    z = randn(2000)
    x, y = z + 0.3 * randn(2000, seed=1), z + 0.3 * randn(2000, seed=2)
    assert spearman(x, y) > 0.85
    assert abs(partial_spearman(x, y, z)) < 0.12


def test_controls_that_explain_nothing_or_everything():
    x, y = randn(15), randn(15, seed=1)
    assert partial_spearman(x, y, torch.ones(15)) == pytest.approx(spearman(x, y))
    for ties in (x, x.round(), (x > 0).double()):
        assert math.isnan(partial_spearman(ties, y, ties.exp()))
        assert math.isnan(partial_spearman(y, ties, -ties))
    assert math.isnan(partial_spearman(x, torch.ones(15), y))


def test_p_value_over_all_orders():
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 4.0, 3.0, 3.0]
    all_found = [abs(spearman(x, order)) for order in itertools.permutations(y)]
    expected = sum(found >= abs(spearman(x, y)) - 1e-9 for found in all_found) / len(all_found)
    assert spearman_p_value(x, y, seed=0) == pytest.approx(expected)
    drawn = spearman_p_value(x, y, seed=0, permutations=119)
    many = spearman_p_value([*x, 6, 7, 8], [*y, 3, 5, 4], seed=0, permutations=40_000)
    exact = spearman_p_value([*x, 6, 7, 8], [*y, 3, 5, 4], seed=0, permutations=40_320)
    assert drawn == pytest.approx(expected, abs=0.15) and many == pytest.approx(exact, abs=0.01)
    assert many != exact


def test_p_value_is_even_under_chance():
    found = [spearman_p_value(randn(6, seed=s), randn(6, seed=s + 500), seed=s) for s in range(200)]
    assert 0.02 < sum(p <= 0.1 for p in found) / 200 < 0.19
    assert math.isnan(spearman_p_value([1.0, 2.0], [1.0, 1.0], seed=0))
    with pytest.raises(ValueError, match="permutations=0"):
        spearman_p_value([1.0, 2.0], [1.0, 2.0], seed=0, permutations=0)

"""Pseudo-labels, their memory, and the bonus of critiques that agree."""

from __future__ import annotations

import itertools

import pytest
import torch

from lightning_modules.functional.consistency import (
    mean_similarity,
    pseudo_label,
    remember,
    sign_of,
    slot_of,
    tally,
    top_share_bonus,
    vote_metrics,
)


@pytest.mark.parametrize(
    ("online", "memory", "rule", "label"),
    [
        ((2, 8), (0, 0), "sum_sign", 1),  # votes (+5, -3), nothing remembered
        ((2, 8), (-2, 8), "sum_sign", 0),  # +0.25 and -0.25 cancel exactly
        ((2, 8), (-3, 3), "sum_sign", -1),  # +0.25 and -1: the stronger one
        ((2, 8), (-3, 3), "agree_only", 0),
        ((2, 8), (1, 3), "agree_only", 1),
        ((0, 0), (-1, 7), "sum_sign", -1),  # nobody voted now
        ((0, 0), (0, 0), "sum_sign", 0),
        ((1, 3), (-1, 3), "sum_sign", 0),  # thirds: no float would cancel for sure
    ],
)
def test_label_table(online, memory, rule, label):
    assert pseudo_label(online, memory, rule=rule) == label
    flipped = [(-total, count) for total, count in (online, memory)]
    assert pseudo_label(*flipped, rule=rule) == -label


def test_ties_are_exact_for_all_small_tallies():
    for n, m in itertools.product(range(1, 12), repeat=2):
        for a in range(-n, n + 1):
            if (a * m) % n == 0 and abs(a * m // n) <= m:
                assert pseudo_label((a, n), (-a * m // n, m)) == 0


def test_majority_is_no_memory_and_no_order():
    votes = [1, 1, -1, 0, 1, -1, 0, -1]
    for order in itertools.islice(itertools.permutations(votes), 50):
        assert tally(order) == (0, 6)
    assert pseudo_label(tally([1, 0, 0])) == 1


def test_threshold_asks_for_more():
    assert pseudo_label((2, 8), threshold=0.25) == 0
    assert pseudo_label((3, 8), threshold=0.25) == 1
    for bad in (-0.1, 2.0):
        with pytest.raises(ValueError, match="threshold"):
            pseudo_label((1, 1), threshold=bad)


def test_decay_prefers_the_new():
    assert tally([1, -1], decay=0.5) == (-0.5, 1.5)
    assert pseudo_label((0, 0), tally([1, -1], decay=0.5)) == -1


def test_full_memory_forgets_a_dissenter_first():
    entries = [1] * 15 + [-1] * 5
    kept = remember(entries, 1)
    assert len(kept) == 20
    assert kept.count(-1) == 4
    assert remember(entries, 1, evict="fifo").count(-1) == 5
    assert remember([1, -1], 0) == [1, -1, 0]


def test_eviction_draws_among_equals():
    entries = [1, -1, 1, -1, 1]
    places = {tuple(remember(entries, 1, size=5, uniform=u)) for u in (0.0, 0.6, 1.0)}
    assert places == {(1, 1, -1, 1, 1), (1, -1, 1, 1, 1)}
    with pytest.raises(ValueError, match="size"):
        remember([], 1, size=0)
    with pytest.raises(ValueError, match="did you mean 'fifo'"):
        remember([], 1, evict="fif")


def test_slots_and_signs_are_inverse():
    assert [slot_of(sign_of(slot)) for slot in (1, 2, None, 0)] == [1, 2, None, None]


def test_outlier_gets_no_bonus_and_equals_share_it():
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    subgroups = torch.zeros(4, dtype=torch.long)
    scores, sizes = mean_similarity(rows, subgroups)
    torch.testing.assert_close(scores, torch.tensor([2 / 3, 2 / 3, 2 / 3, 0.0]))
    assert sizes.tolist() == [4] * 4
    assert top_share_bonus(scores, subgroups).tolist() == pytest.approx([0.1, 0.1, 0.1, 0.0])


def test_bonus_counts_up_and_needs_peers():
    three = top_share_bonus(torch.tensor([0.3, 0.2, 0.1]), torch.zeros(3, dtype=torch.long))
    assert three.tolist() == pytest.approx([0.1, 0.1, 0.0])
    assert top_share_bonus(torch.tensor([0.9]), torch.tensor([0])).tolist() == [0.0]
    wrong = top_share_bonus(torch.tensor([0.9, 0.8]), torch.tensor([-1, -1]))
    assert wrong.tolist() == [0.0, 0.0]
    failed = top_share_bonus(torch.tensor([torch.nan, 0.8, 0.7]), torch.zeros(3, dtype=torch.long))
    assert failed.tolist() == pytest.approx([0.0, 0.1, 0.0])


def test_order_of_rows_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(24, 6, generator=generator)
    rows[5] = rows[4]
    subgroups = torch.arange(24) % 3 - 1
    order = torch.randperm(24, generator=generator)

    def bonus(vectors: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        return top_share_bonus(mean_similarity(vectors, groups)[0], groups)

    assert torch.equal(bonus(rows, subgroups)[order], bonus(rows[order], subgroups[order]))
    assert bonus(rows, subgroups).sum() == pytest.approx(0.1 * 8)  # half of 8 in each of two


def test_metrics_of_votes():
    found = vote_metrics([1, 0, -1], [(8, 8), (0, 8), (-2, 8)], [(0, 0), (1, 4), (1, 2)])
    means = {name: float(total) / float(count) for name, (total, count) in found.items()}
    assert means == pytest.approx(
        {"zero": 1 / 3, "balance": 0.0, "online": 1.25 / 3, "memory": 0.25, "agreement": 0.0}
    )

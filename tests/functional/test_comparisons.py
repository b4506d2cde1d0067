"""Who meets whom in a group, and what the outcomes make of it."""

from __future__ import annotations

import itertools

import pytest
import torch

from lightning_modules.functional.comparisons import matches, relative_rewards, soft_outcome
from lightning_modules.functional.writing_rewards import gated, length_reward, structure_reward

GROUPS = [0, 0, 0, 0, 1, 1, 1, 2]


def draw(row: int) -> float:
    return (row * 0.37) % 1


def ordered(pairs: list[tuple[int, int]]) -> list[float]:
    """A judge with a fixed total order: the larger row number is better."""
    return [1.0 if one > other else -1.0 for one, other in pairs]


def test_bootstrap_has_one_reference_a_group():
    pairs = matches(GROUPS, "bootstrap", draw)
    assert len(pairs) == 3 + 2
    for group in (0, 1):
        references = {other for one, other in pairs if GROUPS[one] == group}
        assert len(references) == 1
    rewards = relative_rewards(pairs, ordered(pairs), len(GROUPS), "bootstrap")
    for group, rows in ((0, range(4)), (1, range(4, 7))):
        (reference,) = {other for one, other in pairs if GROUPS[one] == group}
        others = [row for row in rows if row != reference]
        assert [float(rewards[row]) for row in others] == [
            1.0 if row > reference else -1.0 for row in others
        ]
        assert float(rewards[reference]) == pytest.approx(
            -sum(float(rewards[row]) for row in others) / len(others)
        )
    assert float(rewards[7]) == 0.0  # alone


def test_every_member_can_be_the_reference():
    found = {matches([0] * 4, "bootstrap", lambda row, u=u: u)[0][1] for u in (0.1, 0.3, 0.6, 0.99)}
    assert found == {0, 1, 2, 3}


def test_round_robin_sums_to_zero_and_ranks():
    pairs = matches(GROUPS, "round_robin", draw)
    assert len(pairs) == 6 + 3
    rewards = relative_rewards(pairs, ordered(pairs), len(GROUPS), "round_robin")
    assert rewards[:4].tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1])
    assert float(rewards[4:7].sum()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 0.999])
def test_random_opponents_are_others_of_the_group(uniform):
    pairs = matches(GROUPS, "random_opponent", lambda row: uniform)
    assert [one for one, _ in pairs] == list(range(7))
    assert all(GROUPS[one] == GROUPS[other] and one != other for one, other in pairs)
    rewards = relative_rewards(pairs, ordered(pairs), len(GROUPS), "random_opponent")
    assert set(rewards.tolist()) <= {-1.0, 0.0, 1.0}


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="did you mean 'round_robin'"):
        matches([0], "round_robi", draw)
    with pytest.raises(ValueError, match="1 comparisons have 0 outcomes"):
        relative_rewards([(0, 1)], [], 2, "bootstrap")


def test_soft_outcome_is_between():
    assert soft_outcome(0.0) == 0.0
    assert soft_outcome(2.0) == pytest.approx(0.76159, abs=1e-5)
    assert soft_outcome(-2.0) == -soft_outcome(2.0)


def test_reward_table_of_the_card():
    """Type x plan x verdict, by hand; without a length reward the mode comes first."""
    expected = {
        ("long", True, 2): 2, ("long", True, -2): -2, ("long", False, 2): -3,
        ("long", False, -2): -7, ("short", True, 2): -3, ("short", True, -2): -7,
        ("short", False, 2): 2, ("short", False, -2): -2,
    }  # fmt: skip
    right, wrong = [], []
    for (kind, plan, verdict), total in expected.items():
        structure = structure_reward(torch.tensor([kind == "long"]), torch.tensor([plan]))
        assert float(structure) + verdict == total
        (right if (kind == "long") == plan else wrong).append(total)
    assert min(right) > max(wrong)


def test_length_reward_is_one_sided_and_capped():
    sizes = torch.arange(0, 40)
    bounds = {"long_min": 6, "short_max": 4}
    long = length_reward(torch.ones(40, dtype=torch.bool), sizes, **bounds)
    short = length_reward(torch.zeros(40, dtype=torch.bool), sizes, **bounds)
    assert float(long[0]) == -5.0
    assert torch.all(long[6:] == 0)
    assert torch.all(long.diff() >= 0)
    assert torch.all(short[:5] == 0)
    assert float(short[8]) == float(short[39]) == -5.0
    assert torch.all(short.diff() <= 0)
    with pytest.raises(ValueError, match="short_max=0"):
        length_reward(torch.tensor([True]), torch.tensor([1]), long_min=1, short_max=0)


def test_gate_is_the_least_of_all():
    lowest = min(a + b + c for a, b, c in itertools.product((2, -2), (0, -5), (0, -5)))
    assert lowest == -12
    total = torch.tensor([2.0, float(lowest)])
    assert gated(total, torch.tensor([True, False]), -12.0).tolist() == [-12.0, -12.0]
    assert gated(total, torch.tensor([True, False]), None) is total

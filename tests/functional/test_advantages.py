"""Group advantages against a slow loop, hand-made groups and the identities of the method card."""

from __future__ import annotations

import statistics

import pytest
import torch

from lightning_modules.functional.advantages import group_advantages

torch.set_num_threads(1)


def slow(rewards, groups, normalize_std, eps, baseline):
    """The definition, one completion at a time, in Python floats."""
    out = []
    for reward, group in zip(rewards, groups, strict=True):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        if len(set(members)) == 1:
            out.append(0.0)
            continue
        value = reward - statistics.fmean(members)
        if baseline == "leave_one_out":
            value = reward - (sum(members) - reward) / (len(members) - 1)
        out.append(value / (statistics.stdev(members) + eps) if normalize_std else value)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
def test_equals_the_slow_loop(seed, baseline, normalize_std, eps):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(40, generator=generator, dtype=torch.float64)
    rewards[:15] = rewards[:15].round()
    ids = torch.tensor([-5, 0, 3, 10**12, 77, 78])
    groups = ids[torch.randint(0, 6, (40,), generator=generator)]
    result = group_advantages(
        rewards, groups, normalize_std=normalize_std, eps=eps, baseline=baseline
    )
    expected = slow(rewards.tolist(), groups.tolist(), normalize_std, eps, baseline)
    torch.testing.assert_close(result.advantages, expected, rtol=1e-12, atol=1e-12)
    for index, group in enumerate(groups.tolist()):
        members = rewards[groups == group]
        torch.testing.assert_close(result.group_mean[index], members.mean())
        std = members.std() if len(members) > 1 else torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(result.group_std[index], std)


def test_hand_made_groups_in_mixed_order():
    rewards = torch.tensor([1.0, 4.0, 3.0, 4.0, 9.0, 5.0])
    groups = torch.tensor([2, 8, 2, 8, 5, 2])
    result = group_advantages(rewards, groups, eps=0.0)
    assert result.advantages.tolist() == [-1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert result.zero_variance.tolist() == [False, True, False, True, True, False]
    assert result.group_mean.tolist() == [3.0, 4.0, 3.0, 4.0, 9.0, 3.0]
    assert result.group_std.tolist() == [2.0, 0.0, 2.0, 0.0, 0.0, 2.0]
    rloo = group_advantages(rewards, groups, normalize_std=False, baseline="leave_one_out")
    assert rloo.advantages.tolist() == [-3.0, 0.0, 0.0, 0.0, 0.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -0.7, 1e-30, 1e30, 0.0])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 64])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_constant_group_is_exactly_zero(dtype, value, size, baseline):
    value = min(value, torch.finfo(dtype).max)  # half precision ends at 65504
    rewards = torch.full((size,), value, dtype=dtype)
    for normalize_std in (True, False):
        result = group_advantages(
            rewards,
            torch.zeros(size, dtype=torch.long),
            normalize_std=normalize_std,
            eps=0.0,
            baseline=baseline,
        )
        assert result.advantages.tolist() == [0.0] * size
        assert bool(result.zero_variance.all())
        assert result.group_std.tolist() == [0.0] * size
        assert torch.equal(result.group_mean, rewards.to(result.group_mean.dtype))


@pytest.mark.parametrize("scale", [1e-6, 0.1, 3.7, 1e6, 1e150])
@pytest.mark.parametrize("shift", [-100.0, 0.0, 0.3])
def test_positive_affine_reward_changes_cancel(scale, shift):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(24, generator=generator, dtype=torch.float64)
    groups = torch.arange(24) // 8
    plain = group_advantages(rewards, groups, eps=0.0).advantages
    # The shift is scaled too: rounding of the changed rewards themselves is not our affair.
    changed = group_advantages(scale * (rewards + shift), groups, eps=0.0).advantages
    torch.testing.assert_close(changed, plain, rtol=1e-12, atol=1e-12)


def test_shift_cancels_exactly_where_the_rewards_are_exact():
    groups = torch.zeros(5, dtype=torch.long)
    rewards = torch.tensor([1.0, -1.0, 1.0, 0.5, -3.0])
    plain = group_advantages(rewards, groups).advantages
    assert torch.equal(group_advantages(rewards + 1024, groups).advantages, plain)


def test_reward_schemes_agree_without_malformed_outputs():
    generator = torch.Generator().manual_seed(3)
    right = torch.rand(64, generator=generator) < 0.6
    groups = torch.arange(64) // 8
    malformed = torch.zeros(64, dtype=torch.bool)
    schemes = {
        "plus_minus": torch.where(right, 1.0, -1.0),
        "one_zero": right.float(),
        "sibling": torch.where(malformed, -3.0, torch.where(right, 1.0, -1.0) + 0.1),
    }
    results = {name: group_advantages(r, groups).advantages for name, r in schemes.items()}
    for values in results.values():
        torch.testing.assert_close(values, results["one_zero"], rtol=1e-5, atol=0)
    schemes["sibling"][0] = -3.0
    changed = group_advantages(schemes["sibling"], groups).advantages
    assert not torch.allclose(changed[:8], results["one_zero"][:8])
    assert torch.equal(changed[8:], results["sibling"][8:])


def test_leave_one_out_is_a_rescaled_mean_baseline():
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    groups = torch.zeros(4, dtype=torch.long)
    mean = group_advantages(rewards, groups, normalize_std=False).advantages
    rloo = group_advantages(rewards, groups, normalize_std=False, baseline="leave_one_out")
    torch.testing.assert_close(rloo.advantages, mean * 4 / 3)
    torch.testing.assert_close(mean.sum(), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.int64, torch.float32),
        (torch.bool, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes_and_no_gradient(dtype, expected):
    rewards = torch.tensor([1, 0, 1]).to(dtype)
    if rewards.is_floating_point():
        rewards.requires_grad_()
    result = group_advantages(rewards, torch.tensor([0, 0, 0], dtype=torch.int32))
    assert result.advantages.dtype == result.group_std.dtype == expected
    assert not result.advantages.requires_grad


def test_no_completions():
    result = group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert [len(part) for part in result] == [0, 0, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_reward_that_is_not_finite_is_named(bad):
    rewards = torch.tensor([0.0, 1.0, bad, bad])
    with pytest.raises(ValueError, match=r"rewards\[2\] is -?(nan|inf) in group 9 \(and 1 more\)"):
        group_advantages(rewards, torch.tensor([4, 4, 9, 9]))


@pytest.mark.parametrize(
    ("rewards", "groups", "options", "message"),
    [
        ([1.0, 2.0], [0], {}, "vectors of one length"),
        ([[1.0]], [[0]], {}, "vectors of one length"),
        ([1.0], [0.0], {}, "integer ids"),
        ([1.0], [0], {"eps": -1.0}, "eps=-1.0"),
        ([1.0], [0], {"baseline": "leave-one-out"}, "did you mean 'leave_one_out'"),
        ([1.0], [0], {"baseline": "xyz"}, "allowed: 'mean', 'leave_one_out'$"),
    ],
)
def test_bad_input(rewards, groups, options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.tensor(rewards), torch.tensor(groups), **options)

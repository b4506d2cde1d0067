"""Generalized advantages and the clipped value loss against slow loops and hand-made numbers."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.functional.advantages import generalized_advantages
from lightning_modules.functional.policy_losses import clipped_value_loss


def slow(rewards, values, sizes, gamma, lam):
    """Sums of discounted deltas, written out."""
    out = torch.zeros_like(rewards)
    for row, size in enumerate(sizes):
        deltas = []
        for t in range(size):
            following = values[row, t + 1] if t + 1 < size else 0.0
            deltas.append(float(rewards[row, t] + gamma * following - values[row, t]))
        for t in range(size):
            out[row, t] = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, size))
    return out


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.0, 1.0)])
def test_equals_the_sum_of_discounted_deltas(gamma: float, lam: float) -> None:
    sizes = [5, 1, 3, 0]
    mask = torch.arange(5)[None, :] < torch.tensor(sizes)[:, None]
    rewards, values = torch.randn(4, 5), torch.randn(4, 5)
    rewards[~mask], values[~mask] = float("nan"), float("inf")  # padding must not matter
    got, returns = generalized_advantages(rewards, values, mask, gamma=gamma, gae_lambda=lam)
    wanted = slow(rewards, values, sizes, gamma, lam)
    torch.testing.assert_close(got, wanted)
    assert not got[~mask].any() and not returns[~mask].any()
    torch.testing.assert_close(returns[mask], (wanted + values)[mask])


def test_without_discount_it_is_the_reward_to_come_minus_the_value() -> None:
    rewards = torch.tensor([[0.0, 0.0, 2.0, 0.0]])
    values, mask = torch.randn(1, 4), torch.tensor([[1, 1, 1, 0]])
    got, returns = generalized_advantages(rewards, values, mask)
    torch.testing.assert_close(got[0, :3], 2.0 - values[0, :3])
    assert returns[0].tolist() == pytest.approx([2.0, 2.0, 2.0, 0.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"gamma": 1.5}, "gamma=1.5"), ({"gae_lambda": -0.1}, "gae_lambda=-0.1")],
)
def test_factors_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match=message):
        generalized_advantages(one, one, one, **options)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="one shape"):
        generalized_advantages(torch.ones(2, 2), torch.ones(2, 1), torch.ones(2, 2))


def test_value_loss_is_the_worse_of_both_errors() -> None:
    values = torch.tensor([[2.0, 2.0, -1.0, 0.2]], requires_grad=True)
    old, returns = torch.zeros(1, 4), torch.tensor([[3.0, 0.0, 0.0, 0.1]])
    mask = torch.tensor([[1, 1, 1, 1]])
    loss, metrics = clipped_value_loss(values, old, returns, mask, clip=0.5)
    # towards the target but too far: the clipped error counts and gives no gradient
    assert loss[0].tolist() == pytest.approx([6.25, 4.0, 1.0, 0.01])
    loss.sum().backward()
    assert values.grad[0].tolist() == pytest.approx([0.0, 4.0, -2.0, 0.2])
    assert [float(x) for x in metrics["value_clip_share"]] == [1.0, 4.0]
    assert [float(x) for x in metrics["value_loss"]] == pytest.approx([11.26, 4.0])


def test_value_loss_without_a_clip_is_the_squared_error_and_ignores_padding() -> None:
    values = torch.tensor([[2.0, float("nan")]], requires_grad=True)
    nan = torch.full((1, 2), float("nan"))
    nan[0, 0] = 0.5
    loss, _ = clipped_value_loss(values, nan, nan, torch.tensor([[1, 0]]), clip=None)
    assert loss[0].tolist() == [2.25, 0.0]
    loss.sum().backward()
    assert values.grad[0].tolist() == [3.0, 0.0]
    with pytest.raises(ValueError, match="clip=0"):
        clipped_value_loss(values, nan, nan, torch.tensor([[1, 0]]), clip=0)

"""Advantages: beyond the group's own baseline, or beyond what a critic expected of each token."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.sums import accumulation_dtype

Baseline = Literal["mean", "leave_one_out"]


class GroupAdvantages(NamedTuple):
    """Advantages and the statistics of each completion's group, all of shape ``[N]``.

    Args:
        advantages: Advantage of each completion.
        zero_variance: True where the whole group earned the same (or has one member), so that it
            teaches nothing.
        group_mean: Mean reward of the completion's group.
        group_std: Sample standard deviation of the group's rewards; 0 for a group of one.
    """

    advantages: Tensor
    zero_variance: Tensor
    group_mean: Tensor
    group_std: Tensor


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    normalize_std: bool = True,
    eps: float = 1e-6,
    baseline: Baseline = "mean",
) -> GroupAdvantages:
    """Reward minus the group's baseline, divided by the group's standard deviation on request.

    ``A_i = (R_i - mean_g R) / (std_g R + eps)`` (GRPO, arXiv 2402.03300, section 4.1.2).
    ``normalize_std=False`` is Dr. GRPO (arXiv 2503.20783). ``leave_one_out`` takes the mean of
    the *other* members as the baseline (RLOO, arXiv 2402.14740), which is ``n / (n - 1)`` times
    ``R_i - mean``; dividing that by the standard deviation as well is allowed, but not RLOO.
    The standard deviation is the unbiased sample one (n - 1), as in TRL and verl. Our choice: a
    group of one or of equal rewards has advantage exactly 0. Adding a constant to all rewards of
    a group cancels; so does a positive factor, up to a relative ``eps / std``.

    Args:
        rewards: ``[N]`` rewards, any real dtype.
        groups: ``[N]`` integer ids, equal within a prompt; any values, order and group sizes.
        normalize_std: Whether to divide by ``std + eps``.
        eps: Added to the standard deviation, in units of reward; 0 is safe.
        baseline: ``mean`` or ``leave_one_out``.

    Returns:
        Detached tensors of shape ``[N]``; float64 if ``rewards`` is, else float32.

    Raises:
        ValueError: For a reward that is not finite (names its index) or any bad argument.

    Example:
        >>> group_advantages(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([7, 7, 3])).advantages
        tensor([ 0.7071, -0.7071,  0.0000])
    """
    check_choice("baseline", baseline, get_args(Baseline))
    _check_inputs(rewards, groups, eps)
    ids, group = torch.unique(groups, return_inverse=True)
    wide = rewards.detach().to(accumulation_dtype(rewards.device))
    stats = _group_statistics(wide, group, len(ids))
    spread, constant, size = (x[group] for x in (stats.spread, stats.constant, stats.size))
    # In units of the spread from here on, where affine changes are gone: see _group_statistics.
    values = (wide - stats.low[group]) / spread - stats.mean[group]
    if baseline == "leave_one_out":
        values = values * size / (size - 1).clamp(min=1)
    if normalize_std:
        values = values / torch.where(constant, 1.0, stats.std[group] + eps / spread)
    else:
        values = values * spread
    mean = torch.where(stats.constant, stats.low, stats.low + stats.mean * stats.spread)
    out = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return GroupAdvantages(
        advantages=torch.where(constant, 0.0, values).to(out),
        zero_variance=constant,
        group_mean=mean[group].to(out),
        group_std=(stats.std * stats.spread)[group].to(out),
    )


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates of completions that end: what follows is worth 0.

    ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lambda A_{t+1}`` (GAE, arXiv
    1506.02438, eq. 16); returns are ``A_t + V_t``. With ``gamma = lambda = 1`` that is the reward
    still to come minus the value. Our choice, as in verl: a completion that was cut off ends like
    any other, without a bootstrapped value. ``t + 1`` is the next token under the mask: over a gap
    (tokens that an environment wrote) the recursion goes on with the policy's next token, one step
    of gamma and lambda however long the gap [our reading of Search-R1's state masking].

    Args:
        rewards: ``[N, T]`` reward of each token.
        values: ``[N, T]`` value of the state in which the token was written.
        mask: ``[N, T]`` nonzero at the policy's own tokens.
        gamma: Discount a token, in [0, 1].
        gae_lambda: Weight of longer estimates, in [0, 1].

    Returns:
        ``(advantages, returns)``, detached, ``[N, T]``, 0 under a zero of the mask.

    Raises:
        ValueError: Mismatched shapes or a factor out of range.

    Example:
        >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
        >>> generalized_advantages(rewards, values, torch.ones(1, 2))[0]
        tensor([[0.5000, 0.7500]])
    """
    if not rewards.shape == values.shape == mask.shape or rewards.dim() != 2:
        shapes = ", ".join(str(tuple(x.shape)) for x in (rewards, values, mask))
        raise ValueError(f"rewards, values and mask must be of one shape [N, T], got {shapes}")
    for name, factor in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name}={factor} must be in [0, 1]")
    live = mask.to(torch.bool)
    values = torch.where(live, values.detach(), 0.0)
    rewards = torch.where(live, rewards.detach(), 0.0).to(values.dtype)
    advantages = torch.zeros_like(values)
    running, following = values.new_zeros(len(values)), values.new_zeros(len(values))
    for step in reversed(range(values.shape[1])):
        here = live[:, step]
        delta = rewards[:, step] + gamma * following - values[:, step]
        running = torch.where(here, delta + gamma * gae_lambda * running, running)
        following = torch.where(here, values[:, step], following)
        advantages[:, step] = torch.where(here, running, 0.0)
    return advantages, torch.where(live, advantages + values, 0.0)


class _GroupStatistics(NamedTuple):
    """One entry for each group; mean and std are those of ``(reward - low) / spread``."""

    low: Tensor
    spread: Tensor
    constant: Tensor
    size: Tensor
    mean: Tensor
    std: Tensor


def _group_statistics(rewards: Tensor, group: Tensor, num_groups: int) -> _GroupStatistics:
    """Statistics on each group's own scale (min 0, max 1).

    There a constant or a factor in the rewards is gone before anything is summed, and the square
    of a tiny or huge reward neither underflows nor overflows.
    """
    zeros = rewards.new_zeros(num_groups)
    low = zeros.scatter_reduce(0, group, rewards, "amin", include_self=False)
    high = zeros.scatter_reduce(0, group, rewards, "amax", include_self=False)
    # Constancy is a comparison, not a variance: the mean of three times 0.1 need not be 0.1.
    constant = low == high
    spread = torch.where(constant, 1.0, high - low)
    size = torch.bincount(group, minlength=num_groups).to(rewards.dtype)
    scaled = (rewards - low[group]) / spread[group]
    mean = zeros.index_add(0, group, scaled) / size
    squares = zeros.index_add(0, group, (scaled - mean[group]).square())
    std = torch.where(constant, 0.0, (squares / (size - 1).clamp(min=1)).sqrt())
    return _GroupStatistics(low, spread, constant, size, mean, std)


def _check_inputs(rewards: Tensor, groups: Tensor, eps: float) -> None:
    """Refuse what would give silent nonsense."""
    if rewards.dim() != 1 or rewards.shape != groups.shape:
        raise ValueError(
            "rewards and groups must be vectors of one length, got shapes "
            f"{tuple(rewards.shape)} and {tuple(groups.shape)}"
        )
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise ValueError(f"groups must hold integer ids, got {groups.dtype}")
    if not eps >= 0:
        raise ValueError(f"eps={eps} must be at least 0")
    bad = (~torch.isfinite(rewards.detach())).nonzero().flatten().tolist()
    if bad:
        first = bad[0]
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise ValueError(
            f"rewards[{first}] is {rewards[first].item()} in group {groups[first].item()}{more}; "
            "every reward must be finite"
        )

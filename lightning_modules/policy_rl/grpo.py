"""GRPO, written as the general clipped method that its variants are settings of.

Paper: DeepSeekMath, arXiv 2402.03300 (Group Relative Policy Optimization).

For each prompt draw G completions; the advantage of a completion is its reward minus the group's
mean, divided by the group's standard deviation; all its tokens share it:

    A_i = (R_i - mean_g R) / (std_g R + eps)
    loss = max(-A rho, -A clip(rho, 1 - low, 1 + high)) + beta (exp(d) - d - 1)
    rho = exp(logp - logp_old),  d = logp_ref - logp

Variants as settings: Dr. GRPO (``normalize_std=false loss_aggregation=sequence_sum_const``), RLOO
(``baseline=leave_one_out normalize_std=false``), DAPO's clip-higher (``clip_high=0.28``), dual clip
(``dual_clip=3``), DAPO's overlong filter (``train_truncated=false``), sequence mean as in the GRPO
paper (``loss_aggregation=sequence_mean``).

Hooks overridden: ``advantages``, ``policy_loss``, ``regularizer``.

Where we differ from the paper: the default aggregation is the token mean over the whole window
[our choice: verl's default, long completions are not under-weighted]; beta is 0 by default [our
choice: most later work drops the KL].
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.experience import Experience, FinishReason, Rollouts
from lightning_modules.functional.advantages import group_advantages
from lightning_modules.functional.policy_losses import clipped_policy_loss, kl_penalty
from lightning_modules.functional.sums import Metrics, masked_sum_count
from lightning_modules.ops import LogprobEntropy
from lightning_modules.policy_rl.base import PolicyModule


class GRPO(PolicyModule):
    """Group-relative policy optimization.

    Args:
        clip_low: Distance of the lower clip bound from 1.
        clip_high: Distance of the upper clip bound from 1.
        dual_clip: Bound on the ratio where the advantage is negative; None for none.
        kl_coef: Weight of the KL to the frozen start policy; 0 needs no reference.
        kl_estimator: ``k1``, ``k2`` or ``k3`` (see ``functional.policy_losses.kl_penalty``).
        normalize_std: Divide advantages by the group's standard deviation.
        baseline: ``mean`` or ``leave_one_out``.
        train_truncated: Train on completions that were cut off; without (DAPO's overlong filter)
            they count in their group's baseline but give no gradient.
        **kwargs: Of ``PolicyModule``.
    """

    def __init__(
        self,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        kl_coef: float = 0.0,
        kl_estimator: Literal["k1", "k2", "k3"] = "k3",
        normalize_std: bool = True,
        baseline: Literal["mean", "leave_one_out"] = "mean",
        train_truncated: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"needs_reference": kl_coef != 0.0} | kwargs)
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip
        self.kl_coef = kl_coef
        self.kl_estimator: Literal["k1", "k2", "k3"] = kl_estimator
        self.normalize_std = normalize_std
        self.baseline: Literal["mean", "leave_one_out"] = baseline
        self.train_truncated = train_truncated

    def advantages(self, rollouts: Rollouts) -> tuple[Tensor, Metrics]:
        """Group-relative advantages ``(N,)``; groups are prompts, so tasks share no baseline."""
        assert rollouts.reward is not None
        if not self.train_truncated:
            ended = [c.finish_reason is FinishReason.STOP for c in rollouts.completions]
            rollouts.leave_out(~torch.tensor(ended))
        result = group_advantages(
            rollouts.reward,
            rollouts.groups,
            normalize_std=self.normalize_std,
            baseline=self.baseline,
        )
        return result.advantages, {"rollout/zero_variance": masked_sum_count(result.zero_variance)}

    def policy_loss(self, tokens: LogprobEntropy, batch: Experience) -> tuple[Tensor, Metrics]:
        """Clipped surrogate ``(N, T)``; without old log-probs the policy is the sampler."""
        old = tokens.logprob.detach() if batch.old_logprobs is None else batch.old_logprobs
        return clipped_policy_loss(
            tokens.logprob,
            old,
            batch.advantages,
            batch.mask,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )

    def regularizer(
        self, tokens: LogprobEntropy, batch: Experience
    ) -> tuple[Tensor | None, Metrics]:
        """``kl_coef`` times the KL estimate to the reference, ``(N, T)``."""
        if self.kl_coef == 0.0 or batch.ref_logprobs is None:
            return None, {}
        kl = kl_penalty(
            tokens.logprob, batch.ref_logprobs, estimator=self.kl_estimator, mask=batch.mask
        )
        return self.kl_coef * kl, {"kl": masked_sum_count(kl, batch.mask)}

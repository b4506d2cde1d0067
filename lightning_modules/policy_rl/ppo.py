"""PPO with a critic: GRPO's clipped loss, but the baseline is learned, token by token.

Paper: Proximal Policy Optimization, arXiv 1707.06347; details as in verl v0.4 [code], on which the
TRE paper builds (arXiv 2602.03635).

The critic V gives every state a value; the reward stands on the policy's last token:

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t),   A_t = delta_t + gamma lambda A_{t+1}   (GAE)
    A is then whitened over the rollout's tokens; returns are the raw A_t + V(s_t)
    loss = clipped policy loss (see GRPO) + c max((V - R)^2, (clip(V, V_old +- 0.5) - R)^2)

``critic``: ``separate`` is a decoder of its own (the paper's), ``head`` a linear layer on the
policy's hidden states (cheap; its gradient reaches the policy unless ``detach_critic``), ``none``
is GRPO itself, so methods built on this one choose their advantages by a setting. Actor and critic
are two parameter groups of one optimizer, clipped each by its own norm, each with its own learning
rate (``critic_optimizer``). Several passes over a rollout are ``data.passes`` and
``data.mini_batches``.

Hooks overridden: ``annotate`` (values), ``advantages`` (GAE), ``auxiliary_loss`` (the critic's).

Where we differ: the value head starts at zero [our choice]; whitening uses the tokens of the whole
rollout and losses those of the whole window, over all ranks, not those of a micro-batch [our
choice: the result does not depend on how a batch is cut].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.experience import Experience, Rollouts, span
from datamodules.loader import gather_objects
from lightning_modules.backbones.causal_lm import spread
from lightning_modules.backbones.critic import Critic, ValueHead
from lightning_modules.functional.advantages import generalized_advantages
from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.policy_losses import clipped_value_loss
from lightning_modules.functional.sums import Metrics, masked_sum_count
from lightning_modules.options import OptimizerOptions, read_options
from lightning_modules.policy_rl.grpo import GRPO


class PPO(GRPO):
    """Proximal policy optimization with a value function.

    Args:
        critic: ``separate``, ``head`` or ``none`` (group-relative advantages as in GRPO).
        critic_optimizer: Options of the critic's parameter group that differ from the actor's.
        gamma: Discount a token.
        gae_lambda: Weight of longer advantage estimates.
        whiten_advantages: Mean 0 and standard deviation 1 over the trained tokens of a rollout.
        value_clip: Largest change of a value that counts; None for no clip.
        value_coef: Weight of the critic's loss.
        detach_critic: With ``critic=head``: the critic's gradient stops at its linear layer.
        **kwargs: Of ``GRPO``.

    Raises:
        ValueError: A value is out of range.
    """

    trainable_parts = ("policy", "critic")

    def __init__(
        self,
        *,
        critic: Literal["separate", "head", "none"] = "separate",
        critic_optimizer: Mapping[str, Any] | None = None,
        gamma: float = 1.0,
        gae_lambda: float = 1.0,
        whiten_advantages: bool = True,
        value_clip: float | None = 0.5,
        value_coef: float = 1.0,
        detach_critic: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("model.critic", critic, ("separate", "head", "none"))
        bounds = {"gamma": gamma, "gae_lambda": gae_lambda}
        problems = [
            f"model.{k}={v} must be in [0, 1]" for k, v in bounds.items() if not 0 <= v <= 1
        ]
        if value_clip is not None and not value_clip > 0:
            problems.append(f"model.value_clip={value_clip} must be above 0, or null for no clip")
        if not value_coef > 0:
            problems.append(f"model.value_coef={value_coef} must be above 0")
        own = asdict(self.optimizer_options) | dict(critic_optimizer or {})
        if own.get("class_path") != self.optimizer_options.class_path:
            problems.append("model.critic_optimizer.class_path: actor and critic share optimizer's")
        if problems:
            raise ValueError("; ".join(problems))
        self.critic_kind = critic
        self.critic_options = read_options(OptimizerOptions, own, "model.critic_optimizer")
        self.gamma, self.gae_lambda = gamma, gae_lambda
        self.whiten_advantages = whiten_advantages
        self.value_clip, self.value_coef = value_clip, value_coef
        self.detach_critic = detach_critic
        self.critic: Any = None
        self.needs_hidden = critic == "head"

    def build(self) -> None:
        """The policy and its critic."""
        super().build()
        if self.critic_kind == "separate":
            self.critic = Critic(self.backbone_options)
        elif self.critic_kind == "head":
            width = self.policy.config.get_text_config().hidden_size
            self.critic = ValueHead(width)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The actor's and the critic's, each with its own schedule and norm."""
        groups = super().parameter_groups()
        if self.critic is None:
            return groups
        critic = set(self.critic.parameters())
        actor = [p for p in groups[0]["params"] if p not in critic]
        own = [p for p in self.critic.parameters() if p.requires_grad]
        return [
            {"params": actor, "role": "policy"},
            {"params": own, "role": "critic", "options": self.critic_options},
        ]

    # ------------------------------------------------------------------ hooks

    def annotate(self, rollouts: Rollouts) -> dict[str, Tensor | None]:
        """Also ``values`` ``(N, T)`` of the critic before it is trained on this rollout."""
        found = super().annotate(rollouts)
        if self.critic is not None:
            part = self.policy if self.critic_kind == "head" else self.critic
            found["values"] = self.without_grad(rollouts, part, self._fresh_values)
        return found

    def advantages(self, rollouts: Rollouts) -> tuple[Tensor, Metrics]:
        """GAE ``(N, T)`` of the critic's values; group-relative without a critic."""
        if self.critic is None:
            return super().advantages(rollouts)
        assert rollouts.reward is not None
        _, metrics = super().advantages(rollouts)  # the share of groups without a signal
        mask, values = rollouts.written_mask, rollouts.extra["values"]
        is_last = torch.arange(mask.shape[1]) == span(mask)[:, None] - 1
        rewards = torch.where(is_last, rollouts.reward[:, None].float(), 0.0)
        advantages, returns = generalized_advantages(
            rewards, values, mask, gamma=self.gamma, gae_lambda=self.gae_lambda
        )
        rollouts.extra["returns"] = returns
        trained = rollouts.trained_mask  # rows that were left out have no values
        mean, std, explained = _statistics(advantages, returns, values, trained)
        metrics["rollout/explained_variance"] = (explained, 1.0)
        metrics["rollout/value"] = masked_sum_count(values, trained)
        if self.whiten_advantages:
            advantages = torch.where(mask, (advantages - mean) / (std + 1e-8), 0.0)
        return advantages, metrics

    def auxiliary_loss(
        self, hidden: Tensor | None, batch: Experience
    ) -> tuple[Tensor | None, Metrics]:
        """``value_coef`` times the clipped squared error of the critic, ``(N, T)``."""
        if self.critic is None:
            return None, {}
        loss, metrics = clipped_value_loss(
            self._values(hidden, batch),
            batch.extra["values"],
            batch.extra["returns"],
            batch.mask,
            clip=self.value_clip,
        )
        return self.value_coef * loss, metrics

    # ------------------------------------------------------------------ the critic

    def _values(self, hidden: Tensor | None, batch: Experience) -> Tensor:
        """Values ``(N, T)``; from the given hidden states where the critic is a head on them."""
        if self.critic_kind == "head":
            assert hidden is not None
            flat = self.critic(hidden.detach() if self.detach_critic else hidden)
        else:
            flat = self.critic(batch.input_ids, self.completions(batch))
        return spread(flat, batch.mask)

    def _fresh_values(self, batch: Experience) -> Tensor:
        hidden = self.completion_states(batch) if self.critic_kind == "head" else None
        return self._values(hidden, batch)


def _statistics(
    advantages: Tensor, returns: Tensor, values: Tensor, mask: Tensor
) -> tuple[float, float, float]:
    """Mean and deviation of advantages and explained variance of returns, over all ranks."""
    a, r = advantages[mask].double(), returns[mask].double()
    error = r - values[mask].double()
    sums = [a.sum(), a.square().sum(), r.sum(), r.square().sum(), error.sum()]
    own = [float(len(a)), *torch.stack([*sums, error.square().sum()]).tolist()]
    ranks = gather_objects(own)
    count, total, squares, *rest = (sum(numbers) for numbers in zip(*ranks, strict=True))
    mean = total / max(count, 1)
    variance = max(squares / max(count, 1) - mean**2, 0.0)
    spread_of = rest[1] - rest[0] ** 2 / max(count, 1)
    missed = rest[3] - rest[2] ** 2 / max(count, 1)
    explained = 1 - missed / spread_of if spread_of > 0 else 0.0
    return mean, variance**0.5, explained

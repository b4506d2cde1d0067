"""TRE: an entropy bonus over the tokens that the policy already finds plausible.

Paper: "TRE: Encouraging Exploration in the Trust Region", arXiv 2602.03635. Code: a fork of verl
v0.4.0 (WhyChaos); the formulas are the code's, since the paper's body could not be read.

With a large vocabulary and long completions an ordinary entropy bonus moves probability into a tail
of invalid tokens. TRE takes the entropy inside a region S of each token's distribution only:

    S       the K largest logits (TRE-K), or the nucleus of mass P (TRE-P)
    H_t     entropy of softmax(z) renormalised over S;  s_t = log V / log |S|
    loss    = policy loss - alpha s_t H_t        (it replaces the global bonus, it is not added)

S and s_t are constants of the gradient. "Trust region" is a set of tokens; it has nothing to do
with the KL regions of TRPO and PPO.

``regularizer``: ``none``, ``global_entropy``, ``tre_k``, ``tre_p``, or ``kl_cov``: of the
``kl_cov_share`` of tokens whose advantage and log-prob covary most, |logp - logp_old| is added
(inert in the first step after a rollout, where both are equal). ``policy_loss``: ``clip``, or
``forking_tokens``: only the ``forking_share`` of tokens of the highest entropy are trained on, and
the mean is over those. Advantages: of a critic (the paper) or of the group (``critic: none``).

Hooks overridden: ``regularizer``, ``policy_loss``.

Where we differ: token means run over the accumulation window of all ranks, not over a micro-batch
[our choice: no dependence on how a batch is cut]; both shares are of a micro-batch, as in the code.
``preserve_mass`` (off: the paper) removes the part of the gradient that drains the region
[derived: raising a minor logit as a dominant one falls shrinks the region's mass; a hook for this
stands commented out in the code]. ``entropy_decay_steps`` lets the bonus end [our choice: it keeps
acting after the task is solved].
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.experience import Experience
from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.exploration import forking_weights, kl_cov_tokens
from lightning_modules.functional.sums import Metrics, masked_sum_count
from lightning_modules.ops import LogprobEntropy, TopK, TopP
from lightning_modules.policy_rl.ppo import PPO

Regularizer = Literal["none", "global_entropy", "tre_k", "tre_p", "kl_cov"]


class TRE(PPO):
    """Policy RL with trust-region entropy, and the baselines that it must beat.

    Args:
        regularizer: ``none``, ``global_entropy``, ``tre_k``, ``tre_p`` or ``kl_cov``.
        policy_loss: ``clip`` or ``forking_tokens``.
        entropy_coef: Weight alpha of the entropy bonus.
        entropy_decay_steps: Optimizer steps over which alpha falls linearly to 0; None keeps it.
        top_k: Tokens K of the region of ``tre_k``; also of the region that is only logged where
            another regularizer is on and ``log_region`` is set.
        top_p: Mass P of the region of ``tre_p``.
        max_region: Most tokens of that nucleus; None for no bound (the code has 256).
        scale_entropy: Multiply by ``log V / log |S|``; without it alpha must be larger.
        preserve_mass: Project the gradient so that the region keeps its mass (to first order).
        log_region: Log region size and mass in every arm.
        kl_cov_share: Share of tokens of ``kl_cov``.
        kl_cov_coef: Weight of their penalty.
        forking_share: Share of tokens of ``forking_tokens``.
        **kwargs: Of ``PPO``.

    Raises:
        ValueError: A value is out of range, or K is larger than the vocabulary.
    """

    def __init__(
        self,
        *,
        regularizer: Regularizer = "tre_k",
        policy_loss: Literal["clip", "forking_tokens"] = "clip",
        entropy_coef: float = 0.001,
        entropy_decay_steps: int | None = None,
        top_k: int = 2,
        top_p: float = 0.99,
        max_region: int | None = 256,
        scale_entropy: bool = True,
        preserve_mass: bool = False,
        log_region: bool = False,
        kl_cov_share: float = 0.002,
        kl_cov_coef: float = 1.0,
        forking_share: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        kinds = ("none", "global_entropy", "tre_k", "tre_p", "kl_cov")
        check_choice("model.regularizer", regularizer, kinds)
        check_choice("model.policy_loss", policy_loss, ("clip", "forking_tokens"))
        shares = {"kl_cov_share": kl_cov_share, "forking_share": forking_share}
        problems = [
            f"model.{name}={share} must be in (0, 1]"
            for name, share in shares.items()
            if not 0 < share <= 1
        ]
        if policy_loss == "forking_tokens" and self.loss_aggregation != "token_mean":
            problems.append(
                f"model.loss_aggregation={self.loss_aggregation}: policy_loss=forking_tokens is a "
                f"mean over the kept tokens; use token_mean"
            )
        if not 0 < top_p < 1:
            problems.append(f"model.top_p={top_p} must be inside (0, 1)")
        if top_k < 1:
            problems.append(f"model.top_k={top_k} must be at least 1")
        if max_region is not None and max_region < 1:
            problems.append(f"model.max_region={max_region} must be at least 1, or null")
        if entropy_decay_steps is not None and entropy_decay_steps < 1:
            problems.append(f"model.entropy_decay_steps={entropy_decay_steps} must be 1 or more")
        if problems:
            raise ValueError("; ".join(problems))
        self.regularizer_kind, self.policy_loss_kind = regularizer, policy_loss
        self.entropy_coef, self.entropy_decay_steps = entropy_coef, entropy_decay_steps
        self.kl_cov_share, self.kl_cov_coef = kl_cov_share, kl_cov_coef
        self.forking_share = forking_share
        is_on = entropy_coef != 0.0
        self.entropy_grad = regularizer == "global_entropy" and is_on
        needs_entropy = self.entropy_grad or policy_loss == "forking_tokens"
        self.with_entropy = self.with_entropy or needs_entropy
        scale: Literal["log_vocab", "none"] = "log_vocab" if scale_entropy else "none"
        if regularizer == "tre_p" and is_on:
            self.region = TopP(top_p, scale=scale, max_size=max_region, preserve_mass=preserve_mass)
        elif regularizer == "tre_k" and is_on:
            self.region = TopK(top_k, scale=scale, preserve_mass=preserve_mass)
        elif log_region:
            self.region = TopK(top_k, scale=scale)

    def build(self) -> None:
        """As usual, once the region is known to fit into the vocabulary."""
        super().build()
        size = self.policy.base.get_output_embeddings().weight.shape[0]
        if isinstance(self.region, TopK) and self.region.k > size:
            raise ValueError(
                f"model.top_k={self.region.k} is more than the {size} tokens of this model's "
                f"vocabulary; use model.top_k={size} or less"
            )

    # ------------------------------------------------------------------ hooks

    def policy_loss(self, tokens: LogprobEntropy, batch: Experience) -> tuple[Tensor, Metrics]:
        """Clipped loss ``(N, T)``, of the forking tokens alone where asked for."""
        loss, metrics = super().policy_loss(tokens, batch)
        if self.policy_loss_kind == "forking_tokens":
            assert tokens.entropy is not None
            weights = forking_weights(tokens.entropy, batch.mask, share=self.forking_share)
            loss = loss * weights
            metrics["forking_share"] = masked_sum_count(weights > 0, batch.mask)
        return loss, metrics

    def regularizer(
        self, tokens: LogprobEntropy, batch: Experience
    ) -> tuple[Tensor | None, Metrics]:
        """Minus alpha times the chosen entropy, or KL-Cov; besides the KL of ``kl_coef``."""
        penalty, metrics = super().regularizer(tokens, batch)
        metrics |= self._region_metrics(tokens, batch.mask)
        own = None
        if self.regularizer_kind == "kl_cov":
            old = tokens.logprob.detach() if batch.old_logprobs is None else batch.old_logprobs
            chosen = kl_cov_tokens(
                tokens.logprob, batch.advantages, batch.mask, share=self.kl_cov_share
            )
            own = self.kl_cov_coef * chosen * (tokens.logprob - old).abs()
            metrics["kl_cov_share"] = masked_sum_count(chosen, batch.mask)
        elif self.regularizer_kind != "none" and self.entropy_coef != 0.0:
            is_global = self.regularizer_kind == "global_entropy"
            bonus = tokens.entropy if is_global else tokens.region_entropy
            assert bonus is not None
            own = -self.alpha * bonus
            metrics["entropy_coef"] = (self.alpha, 1.0)
        if own is not None:
            penalty = own if penalty is None else penalty + own
        return penalty, metrics

    @property
    def alpha(self) -> float:
        """Weight of the bonus at this optimizer step."""
        if self.entropy_decay_steps is None:
            return self.entropy_coef
        left = 1.0 - self.global_step / self.entropy_decay_steps
        return self.entropy_coef * max(0.0, left)

    def _region_metrics(self, tokens: LogprobEntropy, mask: Tensor) -> Metrics:
        if tokens.region_size is None:
            return {}
        assert tokens.region_mass is not None and tokens.region_entropy is not None
        size = tokens.region_size
        found: dict[str, Tensor] = {
            "region/entropy": tokens.region_entropy,
            "region/size": size,
            "region/single": size == 1,
            "region/mass": tokens.region_mass,
            "region/tail_mass": 1 - tokens.region_mass,
        }
        if isinstance(self.region, TopP) and self.region.max_size is not None:
            found["region/at_bound"] = size >= self.region.max_size
        return {name: masked_sum_count(torch.as_tensor(v), mask) for name, v in found.items()}

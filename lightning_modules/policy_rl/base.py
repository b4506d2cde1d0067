"""PolicyModule: the training step of every policy-RL method, cut into six hooks.

    rollout     prompts -> completions               (one flat sample; trees override this)
    score       completions -> reward and its parts  (the task's verifier; judges override this)
    annotate    old and reference log-probs, without gradient
    advantages  reward -> one number a token
    policy_loss log-probs and advantages -> loss a token
    regularizer further loss a token (KL, entropy), or None

Methods with further parts (a critic) add ``auxiliary_loss``, of the same forward pass.

A hook takes tensors or dataclasses and returns tensors plus metrics as sums and counts; it neither
logs nor steps. The datamodule calls the first four when a new rollout is due; ``training_step``
calls the last two and is a pure function of its batch. Lightning does the rest.

Shape legend: ``N`` sequences, ``T`` completion tokens (padded), ``L`` prompt plus completion.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from datamodules.engines.base import Engine, Sampling
from datamodules.experience import Experience, FinishReason, Prompt, Rollouts
from datamodules.loader import Rows
from datamodules.rewards import RewardFunction
from lightning_modules.backbones.causal_lm import (
    Completions,
    completion_logprobs,
    load_causal_lm,
)
from lightning_modules.evaluation import EvaluatedModule, by_domain
from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.policy_losses import Aggregation, aggregate, sampler_weights
from lightning_modules.functional.sums import (
    Metrics,
    masked_sum_count,
    moments,
)
from lightning_modules.ops import LogprobEntropy, TopK, TopP
from lightning_modules.policy_rl.annotating import pieces_without_grad


class PolicyModule(EvaluatedModule):
    """The family of policy-RL methods.

    Args:
        samples_per_prompt: Group size G.
        max_new_tokens: Most tokens a completion.
        temperature: Of sampling, and of the softmax behind every log-prob of training.
        loss_aggregation: ``token_mean``, ``sequence_mean`` or ``sequence_sum_const`` (see
            ``functional.policy_losses.aggregate``), over the whole accumulation window.
        needs_reference: Whether ``annotate`` computes log-probs of the frozen start policy.
        annotate_batch_size: Sequences a forward pass without gradient.
        with_entropy: Log the entropy of the policy (a little time in the head).
        share_prompts: Read a group's prompt once for all its completions, where the backbone
            allows it; equal to rounding.
        sampler_correction: Cap of the importance weight between the trainer's and the sampler's
            log-probs (see ``functional.policy_losses.sampler_weights``); None for no weights.
        eval_samples: Samples a prompt of a validation or test, besides the greedy completion:
            rows ``sampled/...`` with means over samples and ``pass_at_<n>``; 0 for none.
        eval_temperature: Of these samples.
        eval_top_p: Nucleus mass of these samples.
        **kwargs: Of ``BaseModule``.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self,
        *,
        samples_per_prompt: int = 8,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        loss_aggregation: Aggregation = "token_mean",
        needs_reference: bool = False,
        annotate_batch_size: int = 128,
        with_entropy: bool = True,
        share_prompts: bool = True,
        sampler_correction: float | None = None,
        eval_samples: int = 0,
        eval_temperature: float = 1.0,
        eval_top_p: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice(
            "model.loss_aggregation",
            loss_aggregation,
            ("token_mean", "sequence_mean", "sequence_sum_const"),
        )
        problems = [
            f"model.{name}={value} must be {bound}"
            for name, value, is_right, bound in (
                ("samples_per_prompt", samples_per_prompt, samples_per_prompt >= 1, "at least 1"),
                ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
                ("temperature", temperature, temperature > 0, "above 0"),
                (
                    "annotate_batch_size",
                    annotate_batch_size,
                    annotate_batch_size >= 1,
                    "at least 1",
                ),
                (
                    "sampler_correction",
                    sampler_correction,
                    sampler_correction is None or sampler_correction > 0,
                    "above 0, or null for none",
                ),
                ("eval_samples", eval_samples, eval_samples >= 0, "0 (none) or more"),
            )
            if not is_right
        ]
        if problems:
            raise ValueError("; ".join(problems))
        self.samples_per_prompt = samples_per_prompt
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.loss_aggregation: Aggregation = loss_aggregation
        self.needs_reference = needs_reference
        self.annotate_batch_size = annotate_batch_size
        self.with_entropy = with_entropy
        self.share_prompts = share_prompts
        self.sampler_correction = sampler_correction
        self.eval_samples = eval_samples
        self.eval_temperature, self.eval_top_p = eval_temperature, eval_top_p
        #: What else a training pass gives: hidden states for ``auxiliary_loss``, gradients through
        #: the entropy, the entropy of a trust region (``ops.TopK``, ``ops.TopP``).
        self.needs_hidden = False
        self.entropy_grad = False
        self.region: TopK | TopP | None = None
        self.reference: Any = None
        #: ``rollout`` looks at weights: ``mode=plan`` then takes flat samples at once.
        self.reads_weights = False

    def build(self) -> None:
        """The policy and, where a KL needs it and no adapter can be switched off, a frozen copy."""
        super().build()
        if self.needs_reference and self.lora_options is None:
            reference = load_causal_lm(self.backbone_options, kernel=self.kernel_options)
            self.reference = reference.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PolicyModule:
        """Train mode for everything but the frozen reference."""
        super().train(mode)
        if getattr(self, "reference", None) is not None:
            self.reference.eval()
        return self

    # ------------------------------------------------------------------ hooks

    def rollout(self, prompts: Sequence[Prompt], engine: Engine) -> Rollouts:
        """Sample ``samples_per_prompt`` completions for each prompt."""
        sampling = Sampling(
            temperature=self.temperature,
            samples=self.samples_per_prompt,
            max_new_tokens=self.max_new_tokens,
        )
        return Rollouts.from_groups(prompts, engine.generate(prompts, sampling))

    def score(self, rollouts: Rollouts, reward: RewardFunction) -> dict[str, Tensor]:
        """Parts of the reward ``(N,)``; ``reward`` is the total."""
        return reward(rollouts)

    def annotate(self, rollouts: Rollouts) -> dict[str, Tensor | None]:
        """``old_logprobs`` and ``ref_logprobs``, each ``(N, T)`` or None where not needed.

        Old log-probs are recomputed by the trainer itself, not taken from the sampler. With one
        update a rollout they equal the current ones, so no forward pass is spent on them.
        """
        old = None
        if rollouts.num_updates > 1:
            old = self.logprobs_without_grad(rollouts, self.policy)
        ref = None
        if self.needs_reference and self.reference is not None:
            ref = self.logprobs_without_grad(rollouts, self.reference)
        elif self.needs_reference:
            with self.policy.adapter_off():
                ref = self.logprobs_without_grad(rollouts, self.policy)
        return {"old_logprobs": old, "ref_logprobs": ref}

    @abstractmethod
    def advantages(self, rollouts: Rollouts) -> tuple[Tensor, Metrics]:
        """Advantages ``(N,)`` or ``(N, T)`` of scored rollouts, and metrics."""

    @abstractmethod
    def policy_loss(self, tokens: LogprobEntropy, batch: Experience) -> tuple[Tensor, Metrics]:
        """Loss a token ``(N, T)`` of log-probs (and entropies) ``(N, T)``, and metrics."""

    def regularizer(
        self, tokens: LogprobEntropy, batch: Experience
    ) -> tuple[Tensor | None, Metrics]:
        """A further loss a token ``(N, T)``, or None, and metrics."""
        return None, {}

    def auxiliary_loss(
        self, hidden: Tensor | None, batch: Experience
    ) -> tuple[Tensor | None, Metrics]:
        """Loss a token ``(N, T)`` of further parts, or None, and metrics.

        Args:
            hidden: ``(K, H)`` states that predict the K tokens of ``batch.mask``, row by row, where
                ``needs_hidden`` asks for them.
            batch: As in ``policy_loss``.
        """
        return None, {}

    # ------------------------------------------------------------------ the step

    def training_step(self, batch: Experience, batch_idx: int) -> Tensor:
        """Loss of one micro-batch: a pure function of the batch and the weights."""
        tokens = completion_logprobs(
            self.policy,
            batch.input_ids,
            batch.prompt_lengths,
            batch.mask,
            groups=batch.groups if self.share_prompts else None,
            temperature=self.temperature,
            with_entropy=self.with_entropy,
            entropy_grad=self.entropy_grad,
            region=self.region,
            output="both" if self.needs_hidden else "tokens",
        )
        tokens, hidden = tokens if self.needs_hidden else (tokens, None)
        per_token, metrics = self.policy_loss(tokens, batch)
        self.record({f"train/{name}": value for name, value in metrics.items()})
        if self.sampler_correction is not None:
            mine = tokens.logprob if batch.old_logprobs is None else batch.old_logprobs
            weights, metrics = sampler_weights(
                mine, batch.sampler_logprobs, batch.mask, cap=self.sampler_correction
            )
            per_token = per_token * weights
            self.record({f"train/{name}": value for name, value in metrics.items()})
        penalty, metrics = self.regularizer(tokens, batch)
        self.record({f"train/{name}": value for name, value in metrics.items()})
        if penalty is not None:
            per_token = per_token + penalty
        auxiliary, metrics = self.auxiliary_loss(hidden, batch)
        self.record({f"train/{name}": value for name, value in metrics.items()})
        if auxiliary is not None:
            per_token = per_token + auxiliary
        # Lightning divides by the window's micro-batches; the denominators are the window's own
        loss = batch.window_size * aggregate(
            per_token,
            batch.mask,
            mode=self.loss_aggregation,
            num_tokens=batch.window_tokens or None,
            num_sequences=batch.window_sequences or None,
            max_length=self.max_new_tokens,
        )
        self.record(self._step_metrics(loss, tokens, batch))
        return loss

    def _step_metrics(self, loss: Tensor, tokens: LogprobEntropy, batch: Experience) -> Metrics:
        size = batch.window_size
        lag = float(self.trainer.global_step - batch.policy_version) if self._trainer else 0.0
        gap = (tokens.logprob.detach() - batch.sampler_logprobs).abs()
        metrics: Metrics = {
            "train/loss": (loss.detach() / size, 1.0 / size),
            "train/policy_lag": (lag, 1.0),
            "train/sampler_logprob_gap": masked_sum_count(gap, batch.mask),
        }
        if tokens.entropy is not None:
            metrics["train/entropy"] = masked_sum_count(tokens.entropy, batch.mask)
        return metrics

    def logprobs_without_grad(self, rollouts: Rollouts, policy: Any) -> Tensor:
        """Log-probs ``(N, T)`` of completions under ``policy``, in batches, on the CPU."""

        def logprobs(piece: Experience) -> Tensor:
            return completion_logprobs(
                policy,
                piece.input_ids,
                piece.prompt_lengths,
                piece.mask,
                groups=piece.groups if self.share_prompts else None,
                temperature=self.temperature,
                with_entropy=False,
            ).logprob

        return self.without_grad(rollouts, policy, logprobs)

    def without_grad(
        self, rollouts: Rollouts, part: Any, compute: Callable[[Experience], Tensor]
    ) -> Tensor:
        """``compute(piece)`` of ``annotate_batch_size`` rows at a time, ``(N, T)`` on the CPU.

        Args:
            rollouts: Whose completions.
            part: The module that computes, see ``annotating.pieces_without_grad``.
            compute: From rows on this module's device to ``(n, t)``.
        """
        pieces = pieces_without_grad(self, rollouts, part, compute)
        width = rollouts.mask.shape[1]
        pad = torch.nn.functional.pad
        return torch.cat([pad(piece, (0, width - piece.shape[1])) for piece in pieces])

    def completions(self, batch: Experience) -> Completions:
        """Which tokens of a batch are completions, and whose prompts are read once."""
        groups = batch.groups if self.share_prompts else None
        return Completions(batch.prompt_lengths, batch.mask, groups)

    def completion_states(self, batch: Experience) -> Tensor:
        """Hidden states ``(K, H)`` that predict the K tokens of ``batch.mask``, row by row."""
        where = self.completions(batch)
        states: Tensor = self.policy(batch.input_ids, completions=where, output="hidden")
        return states

    # ------------------------------------------------------------------ metrics of rollouts

    def rollout_metrics(self, rollouts: Rollouts) -> dict[str, Any]:
        """What is logged of every rollout, overall and for each domain."""
        completions, reward = rollouts.completions, rollouts.reward
        assert reward is not None
        own = {"length": torch.tensor([float(c.num_written) for c in completions])}
        if any(c.observed is not None for c in completions):
            seen = [float(len(c.token_ids) - c.num_written) for c in completions]
            own["observed"] = torch.tensor(seen)
        cut = torch.tensor([c.finish_reason is not FinishReason.STOP for c in completions])
        metrics: dict[str, Any] = {"rollout/truncated": masked_sum_count(cut)}
        metrics |= moments("rollout/reward", reward)
        for name, value in own.items():
            metrics |= moments(f"rollout/{name}", value)
        domains = [prompt.domain for prompt in rollouts.prompts]
        for domain in sorted(set(domains)):
            mask = torch.tensor([name == domain for name in domains])
            for name, value in (rollouts.parts | own | {"truncated": cut}).items():
                if name == "reward":
                    metrics |= moments(f"rollout/reward/{domain}", value, mask)
                else:
                    metrics[f"rollout/{name}/{domain}"] = masked_sum_count(value, mask)
        return metrics

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, batch: Rows, split: str) -> dict[str, dict[str, Any]]:
        """Greedy completions of a batch of records, verified; samples, too (``eval_samples``).

        Returns:
            Arm -> name -> (sum, count): ``reward`` and the other parts, by domain where the batch
            has several (``reward/<domain>``).
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        prompts = [data.task.prompt(record) for record in batch.items]
        counted = torch.tensor(batch.counted)
        data.engine.sync(self.policy, self.global_step)
        sampling = Sampling(temperature=0.0, max_new_tokens=self.max_new_tokens)
        found = {"": self._verified(prompts, sampling, data)}
        if self.eval_samples:
            sampling = Sampling(
                temperature=self.eval_temperature,
                top_p=self.eval_top_p,
                samples=self.eval_samples,
                max_new_tokens=self.max_new_tokens,
            )
            with data.engine.keyed(f"{data.seed}/{split}"):
                parts = self._verified(prompts, sampling, data)
            best = parts["reward"].view(len(prompts), -1).amax(1)
            found["sampled"] = {
                name: value.view(len(prompts), -1).mean(1) for name, value in parts.items()
            } | {f"pass_at_{self.eval_samples}": best}
        domains = [prompt.domain for prompt in prompts]
        return {arm: by_domain(parts, counted, domains) for arm, parts in found.items()}

    def _verified(
        self, prompts: Sequence[Prompt], sampling: Sampling, data: Any
    ) -> dict[str, Tensor]:
        """Parts of the reward, each ``(prompts x samples,)``."""
        rollouts = self.evaluation_rollouts(prompts, sampling, data.engine)
        length = torch.tensor([float(c.num_written) for c in rollouts.completions])
        return {**self.score_evaluation(rollouts, data.reward), "length": length}

    def evaluation_rollouts(
        self, prompts: Sequence[Prompt], sampling: Sampling, engine: Engine
    ) -> Rollouts:
        """Completions of a validation or test."""
        return Rollouts.from_groups(prompts, engine.generate(prompts, sampling))

    def score_evaluation(self, rollouts: Rollouts, reward: RewardFunction) -> dict[str, Tensor]:
        """Parts ``(N,)`` of a validation or test, ``reward`` among them.

        Those of training, or what a reward that needs several completions a prompt gives instead.
        """
        own = getattr(reward, "evaluation", None)
        return self.score(rollouts, reward) if own is None else own(rollouts)

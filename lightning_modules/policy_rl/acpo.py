"""ACPO: a writer that learns from comparisons of its own texts, and when to plan.

Paper: "UniCreative", arXiv 2604.05517. Its body and code were not readable: forms and constants are
those of independent summaries [summary], the rest [our choice].

    R = R_rel + R_struct + R_len,  then GRPO on R

* R_rel = +-2: texts of a group are compared by a frozen judge (AC-GenRM, ``reward=judge``) on
  their content alone, so that the length of a plan cannot buy reward. One member is the reference.
* R_struct = -5 for a long text without a plan, or a short one with one.
* R_len: down to -5 for a long text that is too short or a short one that is too long.

Whether a query wants a long text is known to the rewards and to no prompt, and no reference text is
read: the policy has to find out by itself.

Group normalisation removes what a whole group shares: where all members plan, R_struct teaches
nothing. ``mode_explore`` forces the plan or its absence on a share of each group (forced tokens
belong to the prompt: no gradient) [our choice].

Hooks overridden: ``rollout`` (forced modes), ``score`` (the three rewards, each a method of its
own), ``advantages`` (``normalise=each``). Off switches: ``relative_coef=0``, ``structure_coef=0``,
``length_cap=0``; ``reward.show_plan=true`` lets the judge read plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from datamodules.engines.base import Engine, Sampling
from datamodules.experience import Completion, Prompt, Rollouts
from datamodules.loader import Rows
from datamodules.rewards import RewardFunction, VerifierReward
from datamodules.tasks.planning import Mode, PlannedTask, PlannedText
from lightning_modules.functional.advantages import group_advantages
from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.sums import Metrics, masked_sum_count
from lightning_modules.functional.writing_rewards import gated, length_reward, structure_reward
from lightning_modules.grm.judge_reward import ComparisonReward, pair_of_texts
from lightning_modules.policy_rl.grpo import GRPO

REWARDS = ("relative", "structure", "length")


class ACPO(GRPO):
    """Relative, structure and length rewards.

    Args:
        relative_coef: Reward of a comparison won, and its negative for one lost [summary: 2]; 0
            asks no judge.
        structure_coef: beta_s [summary: 5].
        structure_warmup: Optimizer steps over which it rises from 0 [our choice: 0].
        length_cap: gamma [summary: 5].
        long_min: Fewest content tokens of a long text [our choice: 1000].
        short_max: Most content tokens of a short text [our choice: 150].
        failed_reward: Reward of a text that does not parse or is empty; None for no such gate
            [our choice: -12].
        normalise: ``sum`` of the rewards in each group [summary], or ``each`` of them before they
            are summed [our choice].
        mode_explore: Share of a group that is forced to plan, or not to, by turns.
        force_mode: ``plan`` or ``direct`` forces every text, in tests too; None for none.
        test_against_start: Compare greedy texts of the test with those of the start policy (needs
            a reference, ``kl_coef`` above 0).
        loss_aggregation: ``sequence_mean`` [summary]: long texts are not over-weighted.
        **kwargs: Of ``GRPO``.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self,
        *,
        relative_coef: float = 2.0,
        structure_coef: float = 5.0,
        structure_warmup: int = 0,
        length_cap: float = 5.0,
        long_min: int = 1000,
        short_max: int = 150,
        failed_reward: float | None = -12.0,
        normalise: Literal["sum", "each"] = "sum",
        mode_explore: float = 0.0,
        force_mode: Literal["plan", "direct"] | None = None,
        test_against_start: bool = True,
        loss_aggregation: Any = "sequence_mean",
        **kwargs: Any,
    ) -> None:
        super().__init__(loss_aggregation=loss_aggregation, **kwargs)
        check_choice("model.normalise", normalise, ("sum", "each"))
        check_choice("model.force_mode", force_mode or "plan", ("plan", "direct"))
        problems = [
            f"model.{name}={value} must be {bound}"
            for name, value, is_right, bound in (
                ("relative_coef", relative_coef, relative_coef >= 0, "at least 0"),
                ("structure_coef", structure_coef, structure_coef >= 0, "at least 0"),
                ("structure_warmup", structure_warmup, structure_warmup >= 0, "at least 0"),
                ("length_cap", length_cap, length_cap >= 0, "at least 0"),
                ("long_min", long_min, long_min >= 1, "at least 1"),
                ("short_max", short_max, short_max >= 1, "at least 1"),
                ("mode_explore", mode_explore, 0 <= mode_explore <= 1, "in [0, 1]"),
            )
            if not is_right
        ]
        if mode_explore > 0 and round(mode_explore * self.samples_per_prompt) == 0:
            problems.append(
                f"model.mode_explore={mode_explore} of model.samples_per_prompt="
                f"{self.samples_per_prompt} is less than one completion: give 0 or more"
            )
        if problems:
            raise ValueError("; ".join(problems))
        self.relative_coef, self.structure_coef = relative_coef, structure_coef
        self.structure_warmup, self.length_cap = structure_warmup, length_cap
        self.long_min, self.short_max = long_min, short_max
        self.failed_reward, self.normalise = failed_reward, normalise
        self.mode_explore, self.force_mode = mode_explore, force_mode
        self.test_against_start = test_against_start

    # ------------------------------------------------------------------ forced modes

    def modes(self) -> list[Mode | None]:
        """What each member of a group is forced to; None for free ones, which come first."""
        size = self.samples_per_prompt
        if self.force_mode is not None:
            return [self.force_mode] * size
        forced = round(self.mode_explore * size)
        turns: list[Mode] = ["direct", "plan"]  # a thinking model lacks direct texts most
        return [None] * (size - forced) + [turns[n % 2] for n in range(forced)]

    def rollout(self, prompts: Sequence[Prompt], engine: Engine) -> Rollouts:
        """Samples of every prompt, some with a forced beginning.

        ``info`` keeps ``forced``: tokens at the end of a row's prompt that are such a beginning.
        """
        sampling = Sampling(temperature=self.temperature, max_new_tokens=self.max_new_tokens)
        return self._sampled(prompts, self.modes(), sampling, engine)

    def evaluation_rollouts(
        self, prompts: Sequence[Prompt], sampling: Sampling, engine: Engine
    ) -> Rollouts:
        """As sampled by the evaluation; with ``force_mode`` all texts begin like that."""
        modes: list[Mode | None] = [self.force_mode] * sampling.samples
        return self._sampled(prompts, modes, sampling, engine)

    def _sampled(
        self,
        prompts: Sequence[Prompt],
        modes: Sequence[Mode | None],
        sampling: Sampling,
        engine: Engine,
    ) -> Rollouts:
        rows: list[list[tuple[Prompt, Completion, int]]] = [[] for _ in prompts]
        for mode in dict.fromkeys(modes):
            begun = [begin(prompt, mode) for prompt in prompts]
            found = engine.generate(
                [prompt for prompt, _ in begun], replace(sampling, samples=modes.count(mode))
            )
            for own, (prompt, size), group in zip(rows, begun, found, strict=True):
                own += [(prompt, completion, size) for completion in group]
        return Rollouts(
            prompts=[prompt for own in rows for prompt, _, _ in own],
            completions=[completion for own in rows for _, completion, _ in own],
            groups=torch.arange(len(prompts)).repeat_interleave(len(modes)),
            info={"forced": [size for own in rows for _, _, size in own]},
        )

    # ------------------------------------------------------------------ rewards

    def score(self, rollouts: Rollouts, reward: RewardFunction) -> dict[str, Tensor]:
        """The three rewards, their sum, and what the texts look like, each ``(N,)``."""
        whole = whole_texts(rollouts)
        texts = self.read(whole)
        is_failed = torch.tensor([text.error is not None for text in texts])
        relative, judged = self.relative_reward(whole, reward)
        values = {
            "relative": relative,
            "structure": self.structure_reward(whole, texts),
            "length": self.length_reward(whole, texts),
        }
        if self.failed_reward is not None:  # a third in each, so that their sum is the gate's
            values = {
                name: gated(value, is_failed, self.failed_reward / len(values))
                for name, value in values.items()
            }
        return (
            {"reward": torch.stack(list(values.values())).sum(0)}
            | {f"reward_{name}": value for name, value in values.items()}
            | self.describe(whole, texts)
            | judged
        )

    def read(self, rollouts: Rollouts) -> list[PlannedText]:
        """Every completion taken apart by its task.

        Raises:
            ValueError: A task without plans.
        """
        texts = []
        for prompt, completion in zip(rollouts.prompts, rollouts.completions, strict=True):
            if not isinstance(prompt.task, PlannedTask):
                raise ValueError(
                    f"model=acpo needs a task of long and short texts, which "
                    f"'{prompt.task.name}' is not: use data=mini_writing or data=writing_file"
                )
            texts.append(prompt.task.read_plan(prompt, completion))
        return texts

    def relative_reward(
        self, rollouts: Rollouts, reward: RewardFunction
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``relative_coef`` times the outcome of a text's comparisons ``(N,)``, and their parts."""
        if self.relative_coef == 0:
            return torch.zeros(len(rollouts)), {}
        parts = reward(rollouts)
        return self.relative_coef * parts.pop("reward"), parts

    def structure_reward(self, rollouts: Rollouts, texts: Sequence[PlannedText]) -> Tensor:
        """``(N,)``, see ``functional.writing_rewards``; rises over ``structure_warmup`` steps."""
        step = self.global_step if self._trainer is not None else 0
        share = min(1.0, step / self.structure_warmup) if self.structure_warmup else 1.0
        has_plan = torch.tensor([text.has_plan for text in texts])
        return structure_reward(are_long(rollouts), has_plan, share * self.structure_coef)

    def length_reward(self, rollouts: Rollouts, texts: Sequence[PlannedText]) -> Tensor:
        """``(N,)``, see ``functional.writing_rewards``."""
        return length_reward(
            are_long(rollouts),
            torch.tensor([text.content_tokens for text in texts]),
            long_min=self.long_min,
            short_max=self.short_max,
            cap=self.length_cap,
        )

    def describe(self, rollouts: Rollouts, texts: Sequence[PlannedText]) -> dict[str, Tensor]:
        """What is logged of texts by type: modes, lengths, failures, each ``(N,)``."""
        has_plan = torch.tensor([text.has_plan for text in texts])
        is_failed = torch.tensor([text.error is not None for text in texts])
        return {
            "mode": ((has_plan == are_long(rollouts)) & ~is_failed).float(),
            "plan": has_plan.float(),
            "plan_tokens": torch.tensor([float(text.plan_tokens) for text in texts]),
            "content_tokens": torch.tensor([float(text.content_tokens) for text in texts]),
            "failed": is_failed.float(),
            "penalised_length": (self.length_reward(rollouts, texts) < 0).float(),
        }

    def advantages(self, rollouts: Rollouts) -> tuple[Tensor, Metrics]:
        """Advantages ``(N,)``; how much of their variance each reward makes is logged."""
        values, metrics = super().advantages(rollouts)
        each = {
            name: group_advantages(
                rollouts.parts[f"reward_{name}"], rollouts.groups, normalize_std=False
            ).advantages
            for name in REWARDS
        }
        total = sum(float(value.square().sum()) for value in each.values())
        for name, value in each.items():
            metrics[f"rollout/share_{name}"] = (float(value.square().sum()), total)
        plan = rollouts.parts["plan"].view(-1, self.samples_per_prompt)
        metrics["rollout/mixed_modes"] = masked_sum_count(plan.amax(1) != plan.amin(1))
        if self.normalise == "each":
            values = torch.stack(
                [
                    group_advantages(
                        rollouts.parts[f"reward_{name}"],
                        rollouts.groups,
                        normalize_std=self.normalize_std,
                        baseline=self.baseline,
                    ).advantages
                    for name in REWARDS
                ]
            ).sum(0)
        return values, metrics

    # ------------------------------------------------------------------ evaluation

    def score_evaluation(self, rollouts: Rollouts, reward: RewardFunction) -> dict[str, Tensor]:
        """What the task's verifier and the form of the texts say; no judge is asked."""
        whole = whole_texts(rollouts)
        texts = self.read(whole)
        return VerifierReward(truncated=None).verified(whole) | self.describe(whole, texts)

    def evaluate(self, batch: Rows, split: str) -> dict[str, dict[str, Any]]:
        """Greedy texts, and in the test how often they beat those of the start policy."""
        found = super().evaluate(batch, split)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        reward = data.reward
        is_asked = split == "test" and self.test_against_start and self.reference is not None
        if not is_asked or not isinstance(reward, ComparisonReward):
            return found
        prompts = [data.task.prompt(record) for record in batch.items]
        sampling = Sampling(temperature=0.0, max_new_tokens=self.max_new_tokens)
        texts = []
        for policy in (self.reference, self.policy):
            data.engine.sync(policy, self.global_step)
            rollouts = whole_texts(self.evaluation_rollouts(prompts, sampling, data.engine))
            pairs = zip(rollouts.prompts, rollouts.completions, strict=True)
            texts.append([reward.read(prompt, completion) for prompt, completion in pairs])
        met = [(pair_of_texts(new, old), False) for old, new in zip(*texts, strict=True)]
        outcomes = reward.compare(met, [prompt.task for prompt in prompts], both_orders=True)
        wins = torch.tensor([(outcome.outcome + 1) / 2 for outcome in outcomes])
        found[""] = dict(found[""])
        found[""]["win_rate_vs_start"] = masked_sum_count(wins, torch.tensor(batch.counted))
        return found


def are_long(rollouts: Rollouts) -> Tensor:
    """``(N,)`` bool: whether the query wants a long text."""
    tasks = [cast(PlannedTask, prompt.task) for prompt in rollouts.prompts]
    kinds = [task.kind(prompt) for task, prompt in zip(tasks, rollouts.prompts, strict=True)]
    return torch.tensor([kind == "long" for kind in kinds])


def begin(prompt: Prompt, mode: Mode | None) -> tuple[Prompt, int]:
    """The prompt with a forced beginning of its completion, and how many tokens that has."""
    if mode is None:
        return prompt, 0
    prefix = cast(PlannedTask, prompt.task).plan_prefix(mode)
    bound = prompt.max_new_tokens
    return (
        replace(
            prompt,
            uid=f"{prompt.uid}/{mode}",
            token_ids=(*prompt.token_ids, *prefix),
            max_new_tokens=None if bound is None else max(1, bound - len(prefix)),
        ),
        len(prefix),
    )


def whole_texts(rollouts: Rollouts) -> Rollouts:
    """The same rows with forced beginnings where a reader expects them: in the completions."""
    prompts, completions = [], []
    for prompt, completion, size in zip(
        rollouts.prompts, rollouts.completions, rollouts.info["forced"], strict=True
    ):
        if size:
            head, prefix = prompt.token_ids[:-size], prompt.token_ids[-size:]
            prompt = replace(prompt, token_ids=head, uid=prompt.uid.rpartition("/")[0])
            completion = replace(
                completion,
                token_ids=(*prefix, *completion.token_ids),
                logprobs=(*[0.0] * size, *completion.logprobs),
            )
        prompts.append(prompt)
        completions.append(completion)
    return replace(rollouts, prompts=prompts, completions=completions)

"""AC-GenRM: a judge that first writes what a text for this query must meet.

Paper: "UniCreative", arXiv 2604.05517 (adaptive criteria, generative reward model). Its body was
not readable: the two steps and the swapped pairs are from summaries [summary]; how it is trained is
in no source we could read, so all of that is [our choice].

    c ~ p(c | query)          criteria, from the query alone
    z, v ~ p(z, v | query, c, A, B)   analysis and verdict under them

Training: GRPO over both generations as one trajectory of two turns. For every pair G criteria are
drawn, and one judgement under each. A judgement earns +1 if its verdict is right, else -1 (so does
one that does not parse); its criteria earn the same, and 0.2 if they parse, so that they are learnt
through the verdicts alone. Both kinds have a baseline of their own (a group of each a pair).

``criteria_mode``: ``shared`` (pairs of one query in a batch share its G criteria), ``per_pair``
(fresh ones a pair), ``static`` (one list for all), ``shuffled`` (those of another query), ``none``.
Criteria never see the texts, in any mode: a judge that does would write them to fit its verdict.

Swap augmentation is the data's: ``data.pair_order=random`` swaps each drawn pair with probability
0.5 [summary].

Hooks overridden: ``rollout`` (two turns), ``score`` (both earn), ``judging_prompts`` (criteria
first), ``outcome`` (soft verdicts).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from datamodules.engines.base import Engine, Sampling
from datamodules.experience import Completion, Prompt, Rollouts
from datamodules.rewards import RewardFunction
from datamodules.tasks.base import JudgeTask, Pair, Verdict
from datamodules.tasks.criteria import CRITERIA, Criteria, CriteriaJudgeTask
from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.comparisons import soft_outcome
from lightning_modules.functional.sums import Metrics, masked_sum_count
from lightning_modules.grm.base import GenerativeRewardModule
from lightning_modules.grm.candidates import Candidates, Comparison

MODES = ("shared", "per_pair", "static", "shuffled", "none")
WRITTEN = ("shared", "per_pair", "shuffled")  # modes in which the model writes criteria
MARGIN_CANDIDATES = 20  # tokens among which a soft verdict looks for both slots


class ACGenRM(GenerativeRewardModule):
    """Criteria from the query, then a verdict under them.

    Args:
        criteria_mode: See above.
        criteria_bonus: Reward of criteria that parse.
        train_criteria: Train the criteria, too; without they are drawn from the policy, but only
            judgements learn.
        verdicts: ``hard`` (+-1), or ``soft`` (``tanh`` of half the log-odds of the two slots where
            the verdict was written), for rewards made of them.
        verdict_reward: As in ``GenerativeRewardModule``; 1, -1, -1 here.
        inference: See ``GenerativeRewardModule``; criteria are always greedy at inference.
        **kwargs: Of ``GenerativeRewardModule``.

    Raises:
        ValueError: A value is unknown.
    """

    def __init__(
        self,
        *,
        criteria_mode: str = "shared",
        criteria_bonus: float = 0.2,
        train_criteria: bool = True,
        verdicts: Literal["hard", "soft"] = "hard",
        verdict_reward: Mapping[str, float] | None = None,
        inference: str = "greedy",
        **kwargs: Any,
    ) -> None:
        table = {"invalid": -1.0} | dict(verdict_reward or {})
        super().__init__(verdict_reward=table, inference=inference, **kwargs)
        check_choice("model.criteria_mode", criteria_mode, MODES)
        check_choice("model.verdicts", verdicts, ("hard", "soft"))
        self.criteria_mode, self.criteria_bonus = criteria_mode, criteria_bonus
        self.train_criteria, self.verdicts = train_criteria, verdicts
        self.verdict_candidates = MARGIN_CANDIDATES if verdicts == "soft" else 0
        self._criteria: dict[str, Criteria] = {}
        self._criteria_of: tuple[str, int] = ("", -1)  # whose: engine's key, policy version
        self._criteria_tokens: dict[str, int] = {}  # not yet counted by a comparison

    def judge_options(self) -> dict[str, Any]:
        """Those of the family, and how criteria come about."""
        return super().judge_options() | {
            "criteria_mode": self.criteria_mode,
            "verdicts": self.verdicts,
        }

    @property
    def criteria_task(self) -> CriteriaJudgeTask:
        """The task, which must know criteria.

        Raises:
            ValueError: It does not.
        """
        return _criteria_task(self._task)

    # ------------------------------------------------------------------ training

    def rollout(self, prompts: Sequence[Prompt], engine: Engine) -> Rollouts:
        """G criteria a pair and a judgement under each.

        Rows: for each pair G judgements, then G criteria (where they are trained). ``info`` keeps
        ``criteria`` (text), ``criteria_error`` and ``turn`` (0 criteria, 1 judgement).
        """
        size = self.samples_per_prompt
        task = _criteria_task(prompts[0].task) if prompts else None
        pairs: list[Pair] = [prompt.record for prompt in prompts]
        sampling = Sampling(temperature=self.temperature, max_new_tokens=self.max_new_tokens)
        asked, written = [], []
        read: list[list[Criteria]] = [[Criteria()] * size for _ in pairs]
        if task is not None and self.criteria_mode == "static":
            read = [[task.static_criteria] * size for _ in pairs]
        if self.criteria_mode in WRITTEN:
            asked = [self._asked(pair, number, task) for number, pair in enumerate(pairs)]
            unique = {prompt.uid: prompt for prompt in asked}
            found = engine.generate(list(unique.values()), replace(sampling, samples=size))
            by_uid = dict(zip(unique, found, strict=True))
            written = [by_uid[prompt.uid] for prompt in asked]
            read = [
                [_criteria_task(prompt.task).parse_criteria(prompt, one) for one in group]
                for prompt, group in zip(asked, written, strict=True)
            ]
            if self.criteria_mode == "shuffled":
                read = read[1:] + read[:1]
        judged = [
            replace(
                _criteria_task(prompt.task).judgement_prompt(pair, criteria),
                uid=f"{prompt.uid}/criteria/{index}",
            )
            for prompt, pair, own in zip(prompts, pairs, read, strict=True)
            for index, criteria in enumerate(own)
        ]
        verdicts = [group[0] for group in engine.generate(judged, sampling)]
        return self._both_turns(judged, verdicts, asked, written, read)

    def _asked(self, pair: Pair, number: int, task: CriteriaJudgeTask | None) -> Prompt:
        prompt = cast(CriteriaJudgeTask, task).criteria_prompt(pair.question)
        is_own = self.criteria_mode == "per_pair"
        return replace(prompt, uid=f"{prompt.uid}/{pair.uid}/{number}") if is_own else prompt

    def _both_turns(
        self,
        judged: Sequence[Prompt],
        verdicts: Sequence[Completion],
        asked: Sequence[Prompt],
        written: Sequence[Sequence[Completion]],
        read: Sequence[Sequence[Criteria]],
    ) -> Rollouts:
        """Rows of both turns; each turn of a pair is a group of its own."""
        size = self.samples_per_prompt
        prompts, completions = list(judged), list(verdicts)
        groups = [row // size for row in range(len(judged))]
        if self.train_criteria and self.criteria_mode in ("shared", "per_pair"):
            offset = len(judged) // size
            for number, (prompt, own) in enumerate(zip(asked, written, strict=True)):
                prompts += [prompt] * size
                completions += own
                groups += [offset + number] * size
        flat = [criteria for own in read for criteria in own]
        flat = (flat * 2)[: len(prompts)]
        return Rollouts(
            prompts=prompts,
            completions=completions,
            groups=torch.tensor(groups, dtype=torch.long),
            info={
                "criteria": [criteria.text for criteria in flat],
                "criteria_error": [criteria.error for criteria in flat],
                "turn": [int(prompt.domain != CRITERIA) for prompt in prompts],
            },
        )

    def parse_verdict(self, prompt: Prompt, completion: Completion) -> Verdict:
        """The verdict of a judgement; criteria have none."""
        if prompt.domain == CRITERIA:
            return Verdict(None, error="criteria have no verdict")
        return super().parse_verdict(prompt, completion)

    def score(self, rollouts: Rollouts, reward: RewardFunction) -> dict[str, Tensor]:
        """Verdicts earn; criteria earn what the judgement under them did, and the bonus."""
        parts = super().score(rollouts, reward)
        is_judgement = torch.tensor(rollouts.info["turn"], dtype=torch.bool)
        parsed = torch.tensor([error is None for error in rollouts.info["criteria_error"]])
        count = int(is_judgement.sum())
        total = parts["reward"].clone()
        if count < len(total):
            total[count:] = total[:count] + self.criteria_bonus * parsed[count:].float()
            for name in ("accuracy", "invalid"):
                parts[name][count:] = parts[name][:count]
        return parts | {"reward": total, "criteria_parsed": parsed.float()}

    def rollout_metrics(self, rollouts: Rollouts) -> dict[str, Any]:
        """Those of the family; how many different criteria there are."""
        metrics = super().rollout_metrics(rollouts)
        texts = [text for text in rollouts.info["criteria"] if text]
        if texts:
            metrics["criteria/distinct"] = (float(len(set(texts))), float(len(texts)))
        return metrics

    # ------------------------------------------------------------------ inference

    def judging_prompts(self, pairs: Sequence[Pair], engine: Engine) -> list[Prompt]:
        """Judgement prompts under greedy criteria, which all pairs of a query share."""
        task = self.criteria_task
        criteria = self.write_criteria([pair.question for pair in pairs], engine)
        return [task.judgement_prompt(pair, own) for pair, own in zip(pairs, criteria, strict=True)]

    def write_criteria(self, questions: Sequence[str], engine: Engine) -> list[Criteria]:
        """Criteria of each query by ``criteria_mode``; written once a query and policy version."""
        task = self.criteria_task
        if self.criteria_mode == "none":
            return [Criteria()] * len(questions)
        if self.criteria_mode == "static":
            return [task.static_criteria] * len(questions)
        if self._criteria_of != (engine.key, engine.policy_version):
            self._criteria_of = (engine.key, engine.policy_version)
            self._criteria = {}
        unknown = [text for text in dict.fromkeys(questions) if text not in self._criteria]
        prompts = [task.criteria_prompt(text) for text in unknown]
        sampling = Sampling(temperature=0.0, max_new_tokens=self.max_new_tokens)
        for text, prompt, group in zip(
            unknown, prompts, engine.generate(prompts, sampling), strict=True
        ):
            self._criteria[text] = task.parse_criteria(prompt, group[0])
            self._criteria_tokens[text] = len(group[0].token_ids)
        found = [self._criteria[text] for text in questions]
        if self.criteria_mode == "shuffled":
            others = list(dict.fromkeys(questions))
            place = {text: number for number, text in enumerate(others)}
            found = [self._criteria[others[(place[text] + 1) % len(others)]] for text in questions]
        return found

    def compare(
        self, pairs: Sequence[Pair], *, engine: Engine | None = None, task: JudgeTask | None = None
    ) -> list[Comparison]:
        """As in the family; the tokens of new criteria count in the first pair of their query.

        Raises:
            ValueError: ``criteria_mode=shuffled``: a verdict would depend on the other pairs.
        """
        if self.criteria_mode == "shuffled":
            raise ValueError(
                "criteria_mode=shuffled is for ablations of the judge itself: as a reward, use "
                "shared, static or none"
            )
        found = super().compare(pairs, engine=engine, task=task)
        return [
            replace(one, tokens=one.tokens + self._criteria_tokens.pop(pair.question, 0))
            for pair, one in zip(pairs, found, strict=True)
        ]

    def outcome(self, candidates: Candidates, verdict: int | None) -> float:
        """Hard, or the mean soft outcome of the judgements that have one."""
        if self.verdicts == "hard" or verdict is None:
            return super().outcome(candidates, verdict)
        task = self.criteria_task
        written = candidates.samples or ([candidates.greedy] if candidates.greedy else [])
        margins = [task.verdict_margin(candidates.prompt, one.completion) for one in written]
        known = [soft_outcome(margin) for margin in margins if margin is not None]
        return sum(known) / len(known) if known else super().outcome(candidates, verdict)

    def extra_metrics(
        self, candidates: Sequence[Candidates], engine: Engine, counted: Sequence[bool]
    ) -> Metrics:
        """Those of the family; criteria that parse, and how many a list has."""
        metrics = super().extra_metrics(candidates, engine, counted)
        pairs = [c.pair for number, c in enumerate(candidates) if counted[number // 2]]
        questions = sorted({pair.question for pair in pairs})
        if self.criteria_mode in WRITTEN:
            written = self.write_criteria(questions, engine)
            metrics["criteria/parsed"] = masked_sum_count(
                torch.tensor([criteria.error is None for criteria in written])
            )
            metrics["criteria/count"] = masked_sum_count(
                torch.tensor([float(len(criteria.names)) for criteria in written])
            )
        return metrics


def _criteria_task(task: Any) -> CriteriaJudgeTask:
    if not isinstance(task, CriteriaJudgeTask):
        raise ValueError(
            f"model=ac_genrm needs a task with criteria, which '{task.name}' has not: use "
            f"data=mini_writing_pairs or data=criteria_file"
        )
    return task

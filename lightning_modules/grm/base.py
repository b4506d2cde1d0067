"""GenerativeRewardModule: GRPO on verdicts, and judging in both orders.

A judge reads a pair (or two analyses of one pair), writes an analysis and a verdict, and is
rewarded for the verdict. Hooks of this family, besides those of ``PolicyModule``:

    parse_verdict    completion -> Verdict (the task's grammar)
    target_labels    the right answer of each completion's prompt; its label here
    critique_reward  a reward for the analysis itself, zero here
    select_verdict   samples of one prompt -> the verdict that counts (majority here)

Every test pair is judged in both orders with independent samples [paper: ReflectRM, section 2.5].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.engines.base import Engine, Sampling
from datamodules.experience import Completion, Prompt, Rollouts
from datamodules.loader import Rows
from datamodules.rewards import RewardFunction
from datamodules.tasks.base import JudgeTask, Pair, Verdict
from lightning_modules.functional.benchmarks import (
    BENCHMARKS,
    benchmark_metrics,
    composites,
    find_benchmark,
    unknown_values,
)
from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.judging import choose_anchor, tail_confidence
from lightning_modules.functional.positions import confidence_auc, position_metrics
from lightning_modules.functional.sums import Metrics, masked_sum_count
from lightning_modules.functional.votes import majority
from lightning_modules.grm.candidates import Candidates, Comparison, Judgement
from lightning_modules.policy_rl.grpo import GRPO


class GenerativeRewardModule(GRPO):
    """The family of generative reward models.

    Args:
        verdict_reward: ``correct``, ``wrong``, ``invalid`` -> reward [sibling code of ReflectRM:
            1, -1, -3]; ``undecided`` where there is no right answer [our choice: 0].
        num_votes: Samples N of one judgement; the vote over 2N - 1 is reported beside it.
        conf_fraction: Share of lowest token log-probs that make the confidence.
        inference: Which verdict ``judge`` and prediction report.
        val_inference: Whether validation runs every inference arm or greedy decoding only.
        benchmark: Whose breakdown the verdicts of ``greedy`` and ``inference`` get: ``auto`` tells
            it from the columns of the pairs, ``none``, or one of ``benchmarks.BENCHMARKS``.
        **kwargs: Of ``GRPO``.

    Raises:
        ValueError: A value is out of range.
    """

    #: Inference arms, by name, that ``judge`` can report.
    inferences: tuple[str, ...] = ("greedy", "majority", "best_confidence")

    def __init__(
        self,
        *,
        verdict_reward: Mapping[str, float] | None = None,
        num_votes: int = 8,
        conf_fraction: float = 0.1,
        inference: str = "majority",
        val_inference: Literal["greedy", "all"] = "greedy",
        benchmark: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("model.inference", inference, self.inferences)
        check_choice("model.val_inference", val_inference, ("greedy", "all"))
        check_choice("model.benchmark", benchmark, ("auto", "none", *BENCHMARKS))
        if num_votes < 1:
            raise ValueError(f"model.num_votes={num_votes} must be at least 1")
        if not 0 < conf_fraction <= 1:
            raise ValueError(f"model.conf_fraction={conf_fraction} must be in (0, 1]")
        rewards = {"correct": 1.0, "wrong": -1.0, "invalid": -3.0, "undecided": 0.0}
        for name in verdict_reward or {}:
            check_choice("a key of model.verdict_reward", name, list(rewards))
        self.verdict_reward = rewards | dict(verdict_reward or {})
        self.num_votes, self.conf_fraction = num_votes, conf_fraction
        self.inference, self.val_inference = inference, val_inference
        self.benchmark = benchmark
        self.verdict_candidates = 0  # most probable tokens kept, for methods that look at margins
        self._benchmarks: dict[str, str | None] = {}
        self.judge_task: JudgeTask | None = None  # for judge() without a trainer
        self._given_task: JudgeTask | None = None  # inside judge(): wins over the trainer's

    # ------------------------------------------------------------------ hooks

    def parse_verdict(self, prompt: Prompt, completion: Completion) -> Verdict:
        """Read a completion by the grammar of its task; never raises."""
        task = prompt.task
        assert isinstance(task, JudgeTask)
        return task.parse(prompt, completion)

    def target_labels(
        self, rollouts: Rollouts, verdicts: Sequence[Verdict]
    ) -> Sequence[int | None]:
        """Slot of the better response for each completion; None where nobody knows."""
        return [prompt.label for prompt in rollouts.prompts]

    def critique_reward(self, rollouts: Rollouts, verdicts: Sequence[Verdict]) -> Tensor | None:
        """A reward ``(N,)`` for the analyses, added to that of the verdicts; None for none."""
        return None

    def select_verdict(self, candidates: Candidates) -> int | None:
        """Majority of the first ``num_votes`` samples, ties by a coin."""
        return majority(candidates.verdicts[: self.num_votes], tie=candidates.coin)

    def score(self, rollouts: Rollouts, reward: RewardFunction) -> dict[str, Tensor]:
        """Reward of each verdict; the parts say how many were right and how many parsed.

        ``info`` keeps ``winner`` and ``target`` of every completion.
        """
        table = self.verdict_reward
        pairs = zip(rollouts.prompts, rollouts.completions, strict=True)
        verdicts = [self.parse_verdict(prompt, completion) for prompt, completion in pairs]
        winners = [verdict.winner for verdict in verdicts]
        targets = list(self.target_labels(rollouts, verdicts))
        rollouts.info |= {"winner": winners, "target": targets}
        values, right, invalid = [], [], []
        for winner, target in zip(winners, targets, strict=True):
            known = "undecided" if target is None else "correct" if winner == target else "wrong"
            values.append(table["invalid" if winner is None else known])
            right.append(float(winner is not None and winner == target))
            invalid.append(float(winner is None))
        total = torch.tensor(values)
        parts = {"accuracy": torch.tensor(right), "invalid": torch.tensor(invalid)}
        critique = self.critique_reward(rollouts, verdicts)
        if critique is not None:
            parts |= {"verdict_reward": total, "critique_reward": critique}
            total = total + critique
        return {"reward": total} | parts

    def rollout_metrics(self, rollouts: Rollouts) -> dict[str, Any]:
        """Those of every policy, and how often the parsed verdicts name slot 1."""
        winners = rollouts.info.get("winner", [])
        first = torch.tensor([float(winner == 1) for winner in winners if winner is not None])
        metrics = super().rollout_metrics(rollouts)
        return metrics | {"rollout/first_slot_rate": masked_sum_count(first)}

    # ------------------------------------------------------------------ judging

    def judgement(self, prompt: Prompt, completion: Completion) -> Judgement:
        """A completion with its verdict and confidence."""
        values = torch.tensor(completion.logprobs)
        confidence = float(
            tail_confidence(values, torch.ones_like(values, dtype=torch.bool), self.conf_fraction)
        )
        return Judgement(self.parse_verdict(prompt, completion), confidence, completion)

    def judging_prompts(self, pairs: Sequence[Pair], engine: Engine) -> list[Prompt]:
        """What the judge is asked for each pair as it stands."""
        return [self._task.preference_prompt(pair) for pair in pairs]

    def sample(
        self, pairs: Sequence[Pair], engine: Engine, *, greedy: bool, samples: int
    ) -> list[Candidates]:
        """Candidates of every pair as it stands: a greedy completion and ``samples`` at T = 1."""
        prompts = self.judging_prompts(pairs, engine)
        bound, kept = self.max_new_tokens, self.verdict_candidates
        first: list[list[Completion]] = [[] for _ in prompts]
        drawn: list[list[Completion]] = [[] for _ in prompts]
        if greedy:
            first = engine.generate(
                prompts, Sampling(temperature=0.0, max_new_tokens=bound, candidates=kept)
            )
        if samples:
            drawn = engine.generate(
                prompts,
                Sampling(temperature=1.0, samples=samples, max_new_tokens=bound, candidates=kept),
            )
        return [
            Candidates(
                pair=pair,
                prompt=prompt,
                key=engine.key,
                greedy=self.judgement(prompt, one[0]) if one else None,
                samples=[self.judgement(prompt, completion) for completion in many],
            )
            for pair, prompt, one, many in zip(pairs, prompts, first, drawn, strict=True)
        ]

    @property
    def _task(self) -> JudgeTask:
        if self._given_task is not None:
            return self._given_task
        if self._trainer is None and self.judge_task is not None:
            return self.judge_task
        task = self.trainer.datamodule.task  # type: ignore[attr-defined]
        if not isinstance(task, JudgeTask):
            raise ValueError(
                f"data: task '{task.name}' has no pairs to judge; use data=prefix_audit "
                f"or data=preference_file"
            )
        return task

    def verdicts_by_arm(
        self, candidates: Sequence[Candidates], engine: Engine
    ) -> dict[str, list[int | None]]:
        """Verdict of every inference arm on every candidate set."""
        votes, size = self.num_votes, self.num_votes
        arms: dict[str, list[int | None]] = {
            "greedy": [c.greedy.winner if c.greedy else None for c in candidates],
            f"maj{votes}": [majority(c.verdicts[:size], tie=c.coin) for c in candidates],
        }
        if 2 * votes - 1 > votes:
            arms[f"maj{2 * votes - 1}"] = [majority(c.verdicts, tie=c.coin) for c in candidates]
        if type(self).select_verdict is not GenerativeRewardModule.select_verdict:
            arms["select_verdict"] = [self.select_verdict(c) for c in candidates]
        best = [choose_anchor(c.confidences[:size], c.verdicts[:size]) for c in candidates]
        arms["best_confidence"] = [
            None if index is None else c.samples[index].winner
            for c, index in zip(candidates, best, strict=True)
        ]
        arms["oracle"] = [
            c.pair.label if c.pair.label in c.verdicts[:size] else _first(c.verdicts[:size])
            for c in candidates
        ]
        return arms

    def evaluate(self, batch: Rows, split: str) -> dict[str, Metrics]:
        """Judge a batch of pairs in both orders; metrics of every arm and of the samples."""
        engine = self.trainer.datamodule.engine  # type: ignore[attr-defined]
        engine.sync(self.policy, self.global_step)
        pairs = [order for pair in batch.items for order in (pair, pair.swap())]
        everything = split == "test" or self.val_inference == "all"
        with torch.no_grad(), engine.keyed(f"{split}/{self.trainer.datamodule.seed}"):  # type: ignore[attr-defined]
            candidates = self.sample(
                pairs, engine, greedy=True, samples=2 * self.num_votes - 1 if everything else 0
            )
            if everything:
                arms = self.verdicts_by_arm(candidates, engine)
            else:
                arms = {"greedy": [c.greedy.winner if c.greedy else None for c in candidates]}
            extra = self.extra_metrics(candidates, engine, batch.counted) if everything else {}
        labels = torch.tensor([pair.label or 0 for pair in batch.items])
        counted = torch.tensor(batch.counted) & (labels > 0)
        result: dict[str, Metrics] = {"": extra}
        benchmark = self.benchmark_of(split)
        extras = [p.extra for p, counts in zip(batch.items, counted, strict=True) if counts]
        for arm, verdicts in arms.items():
            values = torch.tensor([verdict or 0 for verdict in verdicts]).view(-1, 2)[counted]
            judged = values[:, 0], values[:, 1], labels[counted]
            result[arm] = position_metrics(*judged)
            if benchmark is not None and arm in ("greedy", self.inference_arm):
                result[arm] |= benchmark_metrics(benchmark, extras, *judged)
        # the state itself is known by its greedy verdicts, as in the paper's tables
        result[""] = result["greedy"] | extra
        return result

    @property
    def inference_arm(self) -> str:
        """The arm of ``verdicts_by_arm`` that ``judge`` reports."""
        return f"maj{self.num_votes}" if self.inference == "majority" else self.inference

    def benchmark_of(self, split: str) -> str | None:
        """Benchmark that the pairs of a split come from; warns once of pairs that it lacks."""
        if split not in self._benchmarks:
            extras = [pair.extra for pair in self._task.records(split)]  # type: ignore[arg-type]
            found = self._benchmarks[split] = find_benchmark(extras, self.benchmark)
            if found is not None and (warning := unknown_values(found, extras)):
                rank_zero_warn(warning)
        return self._benchmarks[split]

    def composites(self, merged: Metrics) -> dict[str, float]:
        """The benchmarks' own numbers."""
        return composites(merged)

    def extra_metrics(
        self, candidates: Sequence[Candidates], engine: Engine, counted: Sequence[bool]
    ) -> Metrics:
        """Quality of the sampled analyses, and whether confidence knows right from wrong."""
        metrics: Metrics = {}
        sums: dict[str, list[float]] = {}
        confidences, right = [], []
        # two orders of every row; rows that only fill up the last batch do not count
        for c in (c for number, c in enumerate(candidates) if counted[number // 2]):
            task = c.prompt.task
            assert isinstance(task, JudgeTask)
            for one in c.samples[: self.num_votes]:
                for name, value in task.analysis_metrics(c.pair, one.verdict).items():
                    sums.setdefault(f"analysis/{name}", []).append(value)
                if one.winner is not None and c.pair.label is not None:
                    confidences.append(one.confidence)
                    right.append(one.winner == c.pair.label)
        for name, values in sums.items():
            metrics[name] = masked_sum_count(torch.tensor(values))
        auc, weight = confidence_auc(torch.tensor(confidences), torch.tensor(right))
        if weight:
            metrics["conf_auc"] = (auc * weight, float(weight))
        return metrics

    # ------------------------------------------------------------------ a judge to use

    def judge(
        self, pairs: Sequence[Pair], *, engine: Engine | None = None, task: JudgeTask | None = None
    ) -> list[dict[str, Any]]:
        """Judge pairs in both orders.

        Args:
            pairs: What to compare; labels are not needed.
            engine: Writes the completions; None uses the trainer's or embedded one.
            task: Renders prompts and reads verdicts; None uses the trainer's.

        Returns:
            One record a pair: ``uid``, ``verdict`` (1, 2 or None, in the pair's own order; None
            also where the orders disagree), ``verdicts`` of both orders, ``orders_agree``,
            ``analysis`` of the winning sample, ``confidence`` of it, ``votes`` for slot 1 and 2.

        Raises:
            ValueError: There is neither a trainer nor a task.
        """
        from lightning_modules.grm.judge import judge_pairs

        return judge_pairs(self, pairs, engine=engine, task=task)

    def compare(
        self, pairs: Sequence[Pair], *, engine: Engine | None = None, task: JudgeTask | None = None
    ) -> list[Comparison]:
        """Judge pairs in the order they have, as a reward does; arguments as in ``judge``."""
        from lightning_modules.grm.judge import compare_pairs

        return compare_pairs(self, pairs, engine=engine, task=task)

    def outcome(self, candidates: Candidates, verdict: int | None) -> float:
        """What a verdict is worth to response 1, in [-1, 1]; 0 where there is none."""
        return {1: 1.0, 2: -1.0}.get(verdict or 0, 0.0)

    def judge_options(self) -> dict[str, Any]:
        """Arguments that make this judge's inference again, for its exported folder."""
        return {
            "num_votes": self.num_votes,
            "conf_fraction": self.conf_fraction,
            "inference": self.inference,
            "max_new_tokens": self.max_new_tokens,
        }

    def export_info(self) -> dict[str, Any]:
        """What a reward needs to use the exported folder as a judge (``grm/exported.py``)."""
        module = f"{type(self).__module__}.{type(self).__qualname__}"
        judge = {"module": module, "options": self.judge_options(), "task": self.task_settings}
        return super().export_info() | {"judge": judge}

    def decide(self, candidates: Sequence[Candidates], engine: Engine) -> list[int | None]:
        """Verdicts of ``self.inference`` on candidate sets."""
        if self.inference == "greedy":
            return [c.greedy.winner if c.greedy else None for c in candidates]
        if self.inference == "best_confidence":
            best = [choose_anchor(c.confidences, c.verdicts) for c in candidates]
            return [
                None if i is None else c.samples[i].winner
                for c, i in zip(candidates, best, strict=True)
            ]
        return [self.select_verdict(c) for c in candidates]

    def predict_step(self, batch: Rows, batch_idx: int) -> list[dict[str, Any]]:
        """Judge one batch of pairs; see ``judge``."""
        pairs = [pair for pair, counts in zip(batch.items, batch.counted, strict=True) if counts]
        return self.judge(pairs)


def _first(verdicts: Sequence[int]) -> int | None:
    return next((verdict for verdict in verdicts if verdict), None)

"""ReflectRM: a judge that also judges its own analyses.

Paper: "ReflectRM" (arXiv 2604.07506v1, ACL 2026). [paper] marks what it states, [sibling code] what
an overlapping author group released for ConsistRM, [our choice] what we decided.

"Which of two analyses of this comparison is better" is one more pairwise task of the same model
(domain ``refl`` beside ``pref``). Both are trained together with GRPO [paper]; the data of both are
built once from the untrained backbone (``datamodules/judging.py``). At inference the model picks
its own most reliable analyses (two stages):

    Conf(o)  = mean of the lowest 10 % of token log-probs           (eq. 5)
    anchor   = argmax_i Conf(o_i) over N samples                    (eq. 6)
    W        = { o_i : the model prefers a_i over a_anchor }        (eqs. 7, 8), greedy reflections
    verdict  = majority over W; W empty or tied: anchor joins       (eq. 9)

Hooks overridden: ``select_verdict`` is replaced by the batched ``verdicts_by_arm`` and ``decide``,
since stage 2 asks the model again. Training is the family's GRPO, unchanged.

Where we differ from the paper, or it is silent [our choice]: the order of (a_i, anchor) is random a
comparison; an unparsable sample is never the anchor and never in W; an unparsable reflection does
not beat the anchor; all N unparsable is a wrong answer. ``exclude_copies`` keeps analyses that are
word for word the anchor's out of W (off: the paper's rule); in free text there are none, in a small
task half of them are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.engines.base import Engine, Sampling
from datamodules.experience import Prompt
from datamodules.tasks.base import JudgeTask
from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.judging import (
    TwoStage,
    choose_anchor,
    select_winners,
    two_stage_verdict,
)
from lightning_modules.functional.sums import Metrics, masked_sum_count
from lightning_modules.grm.base import GenerativeRewardModule
from lightning_modules.grm.candidates import Candidates, uniform_of


class ReflectRM(GenerativeRewardModule):
    """Unified judging and reflecting, with two-stage inference.

    Args:
        anchor: Rule for the anchor: ``confidence`` [paper], ``first``, ``random``.
        winners: Rule for W: ``reflection`` [paper], ``random`` (as many), ``all``, ``oracle``.
        exclude_copies: Keep copies of the anchor's analysis out of W.
        reflect_temperature: Of stage 2; 0 is greedy [paper].
        controls: Also report the controls of two-stage in the test: random anchor, random winners,
            step truth. The random anchor costs N - 1 more reflections a judgement.
        **kwargs: Of ``GenerativeRewardModule``.
    """

    inferences = (*GenerativeRewardModule.inferences, "two_stage")

    def __init__(
        self,
        *,
        anchor: Literal["confidence", "first", "random"] = "confidence",
        winners: Literal["reflection", "random", "all", "oracle"] = "reflection",
        exclude_copies: bool = False,
        reflect_temperature: float = 0.0,
        controls: bool = True,
        inference: str = "two_stage",
        **kwargs: Any,
    ) -> None:
        super().__init__(inference=inference, **kwargs)
        check_choice("model.anchor", anchor, ("confidence", "first", "random"))
        check_choice("model.winners", winners, ("reflection", "random", "all", "oracle"))
        self.anchor: Literal["confidence", "first", "random"] = anchor
        self.winners: Literal["reflection", "random", "all", "oracle"] = winners
        self.exclude_copies = exclude_copies
        self.reflect_temperature = reflect_temperature
        self.controls = controls

    def judge_options(self) -> dict[str, Any]:
        """Those of the family and of the two stages."""
        return super().judge_options() | {
            "anchor": self.anchor,
            "winners": self.winners,
            "exclude_copies": self.exclude_copies,
            "reflect_temperature": self.reflect_temperature,
        }

    # ------------------------------------------------------------------ two-stage inference

    def anchors(self, candidates: Sequence[Candidates], rule: Any = None) -> list[int | None]:
        """Index of each prompt's anchor among its first N samples (eq. 6)."""
        size, rule = self.num_votes, rule or self.anchor
        return [
            choose_anchor(c.confidences[:size], c.verdicts[:size], rule, c.uniform("anchor"))
            for c in candidates
        ]

    def reflect(
        self, candidates: Sequence[Candidates], anchors: Sequence[int | None], engine: Engine
    ) -> list[torch.Tensor]:
        """Whether each sample's analysis is preferred over the anchor's (eqs. 7, 8).

        Returns:
            For every prompt ``(N,)`` bool; False for the anchor itself and for unparsable samples.
        """
        prompts: list[Prompt] = []
        places: list[tuple[int, int, int]] = []  # prompt, sample, slot of the sample's analysis
        for number, (c, anchor) in enumerate(zip(candidates, anchors, strict=True)):
            if anchor is None:
                continue
            best = c.samples[anchor].verdict.analysis
            for index, one in enumerate(c.samples[: self.num_votes]):
                if index == anchor or one.winner is None:
                    continue
                slot = 1 if c.uniform(f"order/{anchor}/{index}") < 0.5 else 2
                analyses = (one.verdict.analysis, best)
                uid = f"{c.prompt.uid}/reflect/{index}/{anchor}"
                prompts.append(
                    self._task.reflection_prompt(
                        c.pair, analyses if slot == 1 else analyses[::-1], uid=uid
                    )
                )
                places.append((number, index, slot))
        beats = [
            torch.zeros(len(c.samples[: self.num_votes]), dtype=torch.bool) for c in candidates
        ]
        for (number, index, slot), winner in zip(
            places, self._reflection_winners(prompts, engine), strict=True
        ):
            beats[number][index] = winner == slot
        return beats

    def _reflection_winners(self, prompts: Sequence[Prompt], engine: Engine) -> list[int | None]:
        sampling = Sampling(
            temperature=self.reflect_temperature, max_new_tokens=self.max_new_tokens
        )
        groups = engine.generate(prompts, sampling)
        return [
            self.parse_verdict(prompt, group[0]).winner
            for prompt, group in zip(prompts, groups, strict=True)
        ]

    def conclude(
        self,
        candidates: Sequence[Candidates],
        anchors: Sequence[int | None],
        beats: Sequence[torch.Tensor],
        rule: Any = None,
        exclude_copies: bool | None = None,
    ) -> list[TwoStage]:
        """Choose W and let it vote (eq. 9)."""
        rule = rule or self.winners
        exclude = self.exclude_copies if exclude_copies is None else exclude_copies
        outcomes = []
        for c, anchor, better in zip(candidates, anchors, beats, strict=True):
            size = len(better)
            analyses = [one.verdict.analysis for one in c.samples[:size]]
            copies = torch.tensor(
                [anchor is not None and text == analyses[anchor] for text in analyses]
            )
            draws = torch.tensor([c.uniform(f"winner/{i}") for i in range(size)])
            chosen = select_winners(
                better,
                c.verdicts[:size],
                anchor,
                rule=rule,
                copies=copies,
                exclude_copies=exclude,
                label=c.pair.label,
                uniforms=draws,
            )
            outcomes.append(two_stage_verdict(chosen, c.verdicts[:size], anchor))
        return outcomes

    def decide(self, candidates: Sequence[Candidates], engine: Engine) -> list[int | None]:
        """Two-stage verdicts, or those of a simpler inference."""
        if self.inference != "two_stage":
            return super().decide(candidates, engine)
        anchors = self.anchors(candidates)
        beats = self.reflect(candidates, anchors, engine)
        return [outcome.verdict for outcome in self.conclude(candidates, anchors, beats)]

    # ------------------------------------------------------------------ evaluation

    def verdicts_by_arm(
        self, candidates: Sequence[Candidates], engine: Engine
    ) -> dict[str, list[int | None]]:
        """The family's arms, two-stage as configured, its twin on copies, and its controls."""
        arms = super().verdicts_by_arm(candidates, engine)
        anchors = self.anchors(candidates)
        beats = self.reflect(candidates, anchors, engine)
        outcomes = self.conclude(candidates, anchors, beats)
        self._outcomes = outcomes
        arms["two_stage"] = [outcome.verdict for outcome in outcomes]

        def verdicts(**change: Any) -> list[int | None]:
            return [o.verdict for o in self.conclude(candidates, anchors, beats, **change)]

        other = "two_stage_with_copies" if self.exclude_copies else "two_stage_no_copies"
        arms[other] = verdicts(exclude_copies=not self.exclude_copies)
        if not self.controls:
            return arms
        arms["random_winners"] = verdicts(rule="random")
        random_anchors = self.anchors(candidates, "random")
        random_beats = self.reflect(candidates, random_anchors, engine)
        arms["random_anchor"] = [
            o.verdict for o in self.conclude(candidates, random_anchors, random_beats)
        ]
        truth = self._truth(candidates, anchors)
        if truth is not None:
            arms["step_truth"] = [o.verdict for o in self.conclude(candidates, anchors, truth)]
        return arms

    def _truth(
        self, candidates: Sequence[Candidates], anchors: Sequence[int | None]
    ) -> list[torch.Tensor] | None:
        """W by the task's own step truth, an upper bound on reflecting; None if it has none."""
        known = False
        beats = []
        for c, anchor in zip(candidates, anchors, strict=True):
            row = torch.zeros(len(c.samples[: self.num_votes]), dtype=torch.bool)
            for index in range(len(row)):
                if anchor is None or index == anchor or c.samples[index].winner is None:
                    continue
                analyses = (c.samples[index].verdict.analysis, c.samples[anchor].verdict.analysis)
                better = self._task.better_analysis(c.pair, analyses)
                known = known or better is not None
                row[index] = better == 1
            beats.append(row)
        return beats if known else None

    def extra_metrics(
        self, candidates: Sequence[Candidates], engine: Engine, counted: Sequence[bool]
    ) -> Metrics:
        """How two-stage came to its verdicts, and how well the model reflects on its own texts."""
        metrics = super().extra_metrics(candidates, engine, counted)
        outcomes = self._outcomes
        mask = torch.tensor(counted).repeat_interleave(2)
        fallback = torch.tensor([o.fallback for o in outcomes])
        metrics["infer/winner_set_size"] = masked_sum_count(
            torch.tensor([float(o.size) for o in outcomes]), mask
        )
        metrics["infer/anchor_fallback"] = masked_sum_count(fallback, mask)
        metrics["infer/tie"] = masked_sum_count(torch.tensor([o.tie for o in outcomes]), mask)
        parsed = [sum(map(bool, c.verdicts[: self.num_votes])) for c in candidates]
        generations = [self.num_votes + max(0, count - 1) for count in parsed]
        metrics["infer/generations"] = masked_sum_count(torch.tensor(generations), mask)
        return metrics | self._reflection_accuracy(candidates, engine, mask.tolist())

    def _reflection_accuracy(
        self, candidates: Sequence[Candidates], engine: Engine, counted: Sequence[bool]
    ) -> Metrics:
        """Free-running reflection on one right and one wrong analysis of the model's own.

        ``reflection_accuracy`` is by step truth where the task knows it, else by outcome.
        """
        prompts: list[Prompt] = []
        facts: list[tuple[int, int | None]] = []  # slot of the right outcome, slot of step truth
        for c, counts in zip(candidates, counted, strict=True):
            verdicts = c.verdicts[: self.num_votes]
            wrong = 3 - (c.pair.label or 0)
            if not counts or c.pair.label not in verdicts or wrong not in verdicts:
                continue
            good = c.samples[verdicts.index(c.pair.label)].verdict.analysis
            bad = c.samples[verdicts.index(wrong)].verdict.analysis
            if good == bad:
                continue
            slot = 1 if uniform_of(c.key, c.prompt.uid, "reflection_accuracy") < 0.5 else 2
            analyses = (good, bad) if slot == 1 else (bad, good)
            task = c.prompt.task
            assert isinstance(task, JudgeTask)
            uid = f"{c.prompt.uid}/accuracy"
            prompts.append(task.reflection_prompt(c.pair, analyses, uid=uid))
            facts.append((slot, task.better_analysis(c.pair, analyses)))
        winners = self._reflection_winners(prompts, engine)
        if not prompts:
            return {}
        outcome = [winner == slot for winner, (slot, _) in zip(winners, facts, strict=True)]
        truth = [w == t for w, (_, t) in zip(winners, facts, strict=True) if t is not None]
        first = [float(winner == 1) for winner in winners if winner is not None]
        metrics: Metrics = {
            "reflection_accuracy": masked_sum_count(torch.tensor(truth or outcome)),
            "reflection_accuracy_outcome": masked_sum_count(torch.tensor(outcome)),
        }
        if first:
            metrics["refl/first_slot_rate"] = masked_sum_count(torch.tensor(first))
        return metrics

    def on_test_epoch_end(self) -> None:
        """Log the test, and warn where two-stage inference rests on nothing."""
        values = self._log_evaluation("test")
        accuracy = values.get("test/reflection_accuracy")
        if accuracy is not None and accuracy < 0.8:
            rank_zero_warn(
                f"reflection accuracy is {accuracy:.2f}, below 0.8: two-stage inference drops good "
                f"votes when the model cannot tell a right analysis from a wrong one"
            )
        two_stage = values.get("test/two_stage/accuracy")
        vote = values.get(f"test/maj{self.num_votes}/accuracy")
        if two_stage is not None and vote is not None and two_stage < vote:
            rank_zero_warn(
                f"two-stage accuracy {two_stage:.3f} is below the plain vote's {vote:.3f}"
            )

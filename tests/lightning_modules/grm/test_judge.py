"""``module.judge``: records, inferences, tasks with and without a trainer; hooks of the family."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from datamodules.experience import Completion, FinishReason, Rollouts
from datamodules.loader import Rows
from datamodules.rewards import VerifierReward
from datamodules.tasks.base import Pair, Verdict
from datamodules.tasks.prefix_audit import PrefixAudit
from lightning_modules.grm.base import GenerativeRewardModule
from lightning_modules.grm.reflectrm import ReflectRM

KEYS = {"uid", "verdict", "verdicts", "orders_agree", "analysis", "confidence", "votes", "label",
        "extra"}  # fmt: skip


def unlabelled(task: PrefixAudit) -> list[Pair]:
    return [replace(pair, label=None) for pair in task.records("test")]


def for_response(targets: list[int | None], greedy: int, logprobs: list[float]) -> Any:
    """Samples that mean the same responses in both orders; sample i writes analysis i."""

    def judge(pair: Pair, i: int | None) -> tuple[int | None, int, float]:
        target, number, logprob = (greedy, 9, -3.0) if i is None else (targets[i], i, logprobs[i])
        if target is None:
            return None, number, logprob
        return (3 - target if pair.swapped else target), number, logprob

    return judge


# What the samples say: 2 by the vote of all, 1 by the most confident one.
TARGETS, LOGPROBS = [2, 1, 2, None, 2], [-2.0, -0.25, -1.5, -0.125, -4.0]
#: inference, reflections beat the anchor, verdict, analysis, confidence, votes, what was written
CASES = [
    ("greedy", False, 1, 9, -3.0, [2, 0], {"greedy": 2}),
    ("majority", False, 2, 2, -1.5, [2, 6], {"pref": 10}),
    ("best_confidence", False, 1, 1, -0.25, [2, 6], {"pref": 10}),
    ("two_stage", False, 1, 1, -0.25, [2, 6], {"pref": 10, "refl": 6}),
    ("two_stage", True, 2, 2, -1.5, [2, 6], {"pref": 10, "refl": 6}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_record_of_every_inference(task, analysis, make_module, make_engine, number_of, case):
    inference, beats, verdict, number, confidence, votes, written = case

    def reflect(pair, texts):
        numbers = [number_of(pair, text) for text in texts]
        slot = numbers.index(1) + 1  # the anchor is sample 1
        return 3 - slot if beats else slot

    engine = make_engine(for_response(TARGETS, 1, LOGPROBS), reflect)
    module = make_module(inference=inference, num_votes=5)
    pairs = unlabelled(task)
    records = module.judge(pairs, engine=engine, task=task)
    assert len(records) == len(pairs) == 5
    for pair, record in zip(pairs, records, strict=True):
        assert record == {
            "uid": pair.uid, "verdict": verdict, "verdicts": [verdict, verdict],
            "orders_agree": True, "analysis": analysis(pair, number), "confidence": confidence,
            "votes": votes, "label": None, "extra": pair.extra,
        }  # fmt: skip
    assert engine.written == {kind: 5 * count for kind, count in written.items()}


def test_orders_that_disagree_leave_no_verdict(task, make_module, make_engine):
    engine = make_engine(lambda pair, i: (1, i))
    records = make_module().judge(task.records("test"), engine=engine, task=task)
    for pair, record in zip(task.records("test"), records, strict=True):
        assert (record["verdict"], record["orders_agree"]) == (None, False)
        assert record["verdicts"] == [1, 2]  # both in the slots of the pair as it was given
        assert record["votes"] == [8, 8]
        assert record["label"] == pair.label


def test_one_unparsable_order_leaves_no_verdict(task, make_module, make_engine):
    engine = make_engine(lambda pair, i: (None if pair.swapped else 2, i))
    for record in make_module().judge(task.records("test"), engine=engine, task=task):
        assert (record["verdict"], record["verdicts"]) == (None, [2, None])
        assert not record["orders_agree"]
        assert record["votes"] == [0, 8]


@pytest.mark.parametrize("inference", ReflectRM.inferences)
def test_nothing_parses(task, make_module, make_engine, inference):
    engine = make_engine(lambda pair, i: (None,))
    module = make_module(inference=inference)
    records = module.judge(unlabelled(task), engine=engine, task=task)
    assert len(records) == 5
    for record in records:
        assert record.keys() == KEYS
        assert not record["orders_agree"]
        assert [record[key] for key in ("verdict", "analysis", "confidence")] == [None] * 3
        assert (record["verdicts"], record["votes"]) == ([None, None], [0, 0])


def test_real_model_judges_without_a_trainer(task, make_module):
    module = make_module(num_votes=2)
    module.judge_task = None
    pairs = unlabelled(task)
    first, second = module.judge(pairs, task=task), module.judge(pairs, task=task)
    assert [record["uid"] for record in first] == [pair.uid for pair in pairs]
    assert all(record.keys() == KEYS for record in first)
    assert json.loads(json.dumps(first, allow_nan=False)) == second
    assert module.judge([], task=task) == []


def test_without_a_task_the_message_says_what_to_give(tiny_folder, task):
    module = ReflectRM(backbone=str(tiny_folder))
    with pytest.raises(ValueError, match="task=..."):
        module.judge(task.records("test"))


class Contrary(PrefixAudit):
    """Reads every verdict the other way round."""

    def parse(self, prompt: Any, completion: Completion) -> Verdict:
        verdict = super().parse(prompt, completion)
        return verdict if verdict.winner is None else replace(verdict, winner=3 - verdict.winner)


def test_a_given_task_wins_over_the_trainers(task, make_module, make_engine, run_test):
    engine = make_engine(for_response([1] * 15, 1, [-1.0] * 15))
    module = make_module(inference="majority")
    before = run_test(module, engine)
    other = Contrary()
    other.bind(task.tokenizer)
    pairs = task.records("test")
    assert {r["verdict"] for r in module.judge(pairs)} == {1}  # the trainer's task and engine
    assert {r["verdict"] for r in module.judge(pairs, task=other)} == {2}
    assert run_test(module, engine) == before  # forgotten after the call
    assert {r["verdict"] for r in module.judge(pairs)} == {1}


def test_predict_step_leaves_out_rows_that_fill_up(task, make_module, make_engine, run_test):
    module = make_module()
    run_test(module, make_engine(for_response([1] * 15, 1, [-1.0] * 15)))
    pairs = unlabelled(task)[:3]
    records = module.predict_step(Rows(pairs, [True, False, True]), 0)
    assert [record["uid"] for record in records] == [pairs[0].uid, pairs[2].uid]
    assert module.predict_step(Rows(pairs, [False] * 3), 0) == []


# --- hooks --------------------------------------------------------------------------------------


def two_rollouts(task: PrefixAudit, analysis: Any) -> Rollouts:
    """A right and a wrong verdict on one pair."""
    pair = task.records("test")[0]
    group = []
    for winner in (pair.label, 3 - pair.label):
        text = f"{analysis(pair, 0)} response{winner}_wins"
        ids = tuple(task.tokenizer.convert_tokens_to_ids(text.split()))
        group.append(Completion(ids, (0.0,) * len(ids), FinishReason.STOP))
    return Rollouts.from_groups([task.preference_prompt(pair)], [group])


class SecondIsRight(GenerativeRewardModule):
    """Reads the grammar in another way: whatever parses says 2."""

    def parse_verdict(self, prompt: Any, completion: Completion) -> Verdict:
        verdict = super().parse_verdict(prompt, completion)
        return verdict if verdict.winner is None else replace(verdict, winner=2)


class SecondReflects(SecondIsRight, ReflectRM):
    """The same reading of reflections."""


def test_parse_verdict_is_a_hook(task, analysis, make_module, make_engine):
    rollouts = two_rollouts(task, analysis)
    parts = make_module(SecondIsRight).score(rollouts, VerifierReward())
    reward = 1.0 if rollouts.prompts[0].label == 2 else -1.0
    assert parts["reward"].tolist() == [reward] * 2
    engine = make_engine(lambda pair, i: (1, i), lambda pair, texts: 1)
    record = make_module(SecondIsRight).judge(task.records("test")[:1], engine=engine)[0]
    assert (record["verdicts"], record["votes"]) == ([2, 1], [8, 8])
    rows = []
    for cls in (ReflectRM, SecondReflects):
        module = make_module(cls)
        candidates = module.sample(task.records("test"), engine, greedy=False, samples=8)
        rows.append(torch.stack(module.reflect(candidates, [0] * 5, engine))[:, 1:])
    assert torch.equal(rows[0], ~rows[1])  # reflections are read by the hook as well


class Paid(GenerativeRewardModule):
    """Pays for the place in the group."""

    seen: list[Verdict]

    def critique_reward(self, rollouts: Rollouts, verdicts: Any) -> torch.Tensor:
        self.seen = list(verdicts)
        return torch.tensor([0.5, 0.25])


def test_critique_reward_is_a_hook(task, analysis, make_module):
    rollouts, module = two_rollouts(task, analysis), make_module(Paid)
    parts = module.score(rollouts, VerifierReward())
    assert parts["reward"].tolist() == [1.5, -0.75]
    assert parts["verdict_reward"].tolist() == [1.0, -1.0]
    assert parts["critique_reward"].tolist() == [0.5, 0.25]
    assert [verdict.analysis for verdict in module.seen] == [
        analysis(task.records("test")[0], 0)
    ] * 2
    plain = make_module(GenerativeRewardModule).score(rollouts, VerifierReward())
    assert "critique_reward" not in plain


class LastVote(GenerativeRewardModule):
    """The last sample decides."""

    def select_verdict(self, candidates: Any) -> int | None:
        return candidates.samples[-1].winner


def test_select_verdict_is_a_hook(task, make_module, make_engine):
    engine = make_engine(for_response([1] * 7 + [2], 1, [-1.0] * 8))
    pairs = task.records("test")
    for cls, verdict in [(GenerativeRewardModule, 1), (LastVote, 2)]:
        records = make_module(cls).judge(pairs, engine=engine, task=task)
        assert [record["verdict"] for record in records] == [verdict] * 5
    record = make_module(LastVote, inference="greedy").judge(pairs, engine=engine)[0]
    assert record["verdict"] == 1  # only the vote asks the hook

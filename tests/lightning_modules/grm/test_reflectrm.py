"""ReflectRM: rewards, and two-stage inference with the module itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from datamodules.experience import Completion, FinishReason, Rollouts
from datamodules.rewards import VerifierReward
from datamodules.tasks.base import Verdict
from lightning_modules.functional.judging import TwoStage
from lightning_modules.grm.candidates import Candidates


def says(task, text: str, reason: FinishReason = FinishReason.STOP) -> Completion:
    ids = tuple(task.tokenizer.convert_tokens_to_ids(text.split()))
    return Completion(ids, (-0.5,) * len(ids), reason)


# --- rewards ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("domain", "ending", "reason", "kind"),
    [
        ("pref", "response{right}_wins <eos>", "stop", "correct"),
        ("pref", "response{right}_wins", "stop", "correct"),
        ("pref", "response{wrong}_wins <eos>", "stop", "wrong"),
        ("pref", "critique{right}_wins <eos>", "stop", "invalid"),
        ("pref", "<eos>", "stop", "invalid"),
        ("pref", "response{right}_wins <eos>", "length", "invalid"),
        ("pref", "response{right}_wins <eos>", "error", "invalid"),
        ("pref", "response{right}_wins response{right}_wins <eos>", "stop", "invalid"),
        ("refl", "critique{right}_wins <eos>", "stop", "correct"),
        ("refl", "critique{wrong}_wins <eos>", "stop", "wrong"),
        ("refl", "response{right}_wins <eos>", "stop", "invalid"),
    ],
)
def test_score_table(task, analysis, make_module, domain, ending, reason, kind):
    pair = task.records("test")[0]
    if domain == "pref":
        prompt, body = task.preference_prompt(pair), analysis(pair, 3)
    else:
        prompt = task.reflection_prompt(pair, (analysis(pair, 0), analysis(pair, 1)), 2)
        body = "#0 a.x0"
    text = f"{body} {ending}".format(right=prompt.label, wrong=3 - prompt.label)
    rollouts = Rollouts.from_groups([prompt], [[says(task, text, FinishReason(reason))]])
    parts = make_module(verdict_reward={"invalid": -7.0}).score(rollouts, VerifierReward())
    assert parts["reward"].tolist() == [{"correct": 1.0, "wrong": -1.0, "invalid": -7.0}[kind]]
    assert parts["accuracy"].tolist() == [float(kind == "correct")]
    assert parts["invalid"].tolist() == [float(kind == "invalid")]


def rollouts_of(task, analysis, malformed: bool) -> Rollouts:
    groups, prompts = [], []
    for number, pair in enumerate(task.records("test")):
        prompts.append(task.preference_prompt(pair))
        ends = [f"response{1 + (number * k // 2) % 2}_wins" for k in range(6)]
        if malformed:
            ends[number] = "<eos>"
        groups.append([says(task, f"{analysis(pair, 0)} {end}") for end in ends])
    return Rollouts.from_groups(prompts, groups)


def advantages_of(module, rollouts: Rollouts) -> torch.Tensor:
    rollouts.reward = module.score(rollouts, VerifierReward())["reward"]
    return module.advantages(rollouts)[0]


@pytest.mark.parametrize(("right", "wrong"), [(1.0, 0.0), (1.1, -0.9), (40.0, 10.0)])
def test_affine_rewards_change_advantages_only_through_malformed_outputs(
    task, analysis, make_module, right, wrong
):
    modules = [make_module(), make_module(verdict_reward={"correct": right, "wrong": wrong})]
    plain = rollouts_of(task, analysis, malformed=False)
    first, second = (advantages_of(module, plain) for module in modules)
    assert first.abs().max() > 0.5
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)
    broken = rollouts_of(task, analysis, malformed=True)
    first, second = (advantages_of(module, broken) for module in modules)
    assert (first - second).abs().max() > 0.01


# --- stage 2 ------------------------------------------------------------------------------------

TABLE = {  # verdicts, log-probs, who beats the anchor -> anchor, outcome
    "W empty": ([1, 2, 2, 2], [-1, -2, -3, -4], set(), 0, TwoStage(1, True, False, 0)),
    "tie": ([1, 2, 1, 2], [-1, -2, -3, -4], {1, 2}, 0, TwoStage(1, True, True, 2)),
    "tie, other anchor": ([1, 1, 2, 2], [-4, -3, -1, -2], {1, 3}, 2, TwoStage(2, True, True, 2)),
    "all beat": ([1, 2, 2, 1], [-1, -2, -3, -4], {1, 2, 3}, 0, TwoStage(2, False, False, 3)),
    "minority": ([1, 1, 1, 2], [-1, -2, -3, -4], {3}, 0, TwoStage(2, False, False, 1)),
    "anchor alone": ([None, 2, None, None], [-1, -9, -1, -1], {0, 2}, 1,
                     TwoStage(2, True, False, 0)),
    "unparsed is best": ([None, 1, 2, 2], [-1, -2, -3, -4], {0, 2}, 1,
                         TwoStage(2, False, False, 1)),
    "none parses": ([None] * 4, [-1, -2, -3, -4], {0, 1}, None, TwoStage(None, False, False, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_truth_table_of_stage_two(task, number_of, make_module, make_engine, name):
    verdicts, logprobs, beating, anchor, expected = TABLE[name]

    def reflect(pair, texts):
        numbers = [number_of(pair, text) for text in texts]
        assert anchor in numbers
        other = next(number for number in numbers if number != anchor)
        return numbers.index(other if other in beating else anchor) + 1

    engine = make_engine(
        lambda pair, i: (verdicts[i or 0], i or 0, float(logprobs[i or 0])), reflect
    )
    module = make_module(num_votes=4)
    candidates = module.sample(task.records("test"), engine, greedy=True, samples=4)
    anchors = module.anchors(candidates)
    assert anchors == [anchor] * len(candidates)
    beats = module.reflect(candidates, anchors, engine)
    parsed = {i for i, verdict in enumerate(verdicts) if verdict and i != anchor}
    for row in beats:
        assert {i for i, flag in enumerate(row.tolist()) if flag} == beating & parsed
    assert module.conclude(candidates, anchors, beats) == [expected] * len(candidates)
    assert engine.written["refl"] == len(parsed) * len(candidates)
    assert module.decide(candidates, engine) == [expected.verdict] * len(candidates)


def test_order_of_the_critiques_does_not_change_w(task, number_of, make_module, make_engine):
    """The judge prefers an analysis by its content; slots are exchanged in every prompt."""

    def reflect(pair, texts):
        numbers = [number_of(pair, text) for text in texts]
        return numbers.index(max(numbers)) + 1

    class Fixed(Candidates):
        draw = 0.0

        def uniform(self, purpose: str) -> float:
            return self.draw

    class Other(Fixed):
        draw = 0.9

    engine = make_engine(lambda pair, i: (1 + i % 2, (5 * i + 3) % 8, -1.0 - (i - 4) ** 2), reflect)
    module = make_module()
    drawn = module.sample(task.records("test"), engine, greedy=False, samples=8)
    anchors = module.anchors(drawn)
    assert anchors == [4] * 5  # its analysis is number 7: nobody beats it
    anchors = [2] * 5  # number 5: only 6 and 7 beat it
    rows, seen = [], []
    for kind in (Fixed, Other, Candidates):
        engine.prompts.clear()
        candidates = [kind(**vars(c)) for c in drawn]
        rows.append([row.tolist() for row in module.reflect(candidates, anchors, engine)])
        seen.append([prompt.record[1] for prompt in engine.prompts])
    expected = [(5 * i + 3) % 8 > 5 for i in range(8)]
    assert rows == [[expected] * 5] * 3
    assert seen[0] == [texts[::-1] for texts in seen[1]]
    assert 0 < sum(a == b for a, b in zip(seen[0], seen[2], strict=True)) < len(seen[0])


def test_random_order_of_the_critiques_hides_a_slot_habit(make_task, make_module, make_engine):
    task = make_task(num_test=60)
    engine = make_engine(lambda pair, i: (1, i), lambda pair, texts: 1)
    module = make_module()
    candidates = module.sample(task.records("test"), engine, greedy=False, samples=8)
    beats = torch.stack(module.reflect(candidates, [0] * 60, engine)).sum().item()
    assert abs(beats - 210) < 4 * (420 / 4) ** 0.5


def test_unparsable_reflection_does_not_beat(task, make_module, make_engine):
    engine = make_engine(lambda pair, i: (1 if i == 0 else 2, i), lambda pair, texts: None)
    module = make_module()
    candidates = module.sample(task.records("test"), engine, greedy=False, samples=8)
    beats = module.reflect(candidates, [0] * 5, engine)
    assert engine.written["refl"] == 35
    assert not torch.stack(beats).any()
    assert module.decide(candidates, engine) == [1] * 5


def test_exclude_copies_bars_analyses_equal_to_the_anchors(task, make_module, make_engine):
    said = [(1, 0), (1, 0), (1, 0), (1, 0), (2, 1), (2, 2), (None, 3), (None, 4)]
    engine = make_engine(lambda pair, i: said[i])
    module, strict = make_module(), make_module(exclude_copies=True)
    candidates = module.sample(task.records("test"), engine, greedy=False, samples=8)
    beats = [torch.tensor([False] + [True] * 5 + [False] * 2)] * 5
    with_copies, without = TwoStage(1, False, False, 5), TwoStage(2, False, False, 2)
    for one, change, expected in [
        (module, None, with_copies), (module, True, without), (strict, None, without),
        (strict, False, with_copies),
    ]:  # fmt: skip
        outcomes = one.conclude(candidates, [0] * 5, beats, exclude_copies=change)
        assert outcomes == [expected] * 5
    everybody = module.conclude(candidates, [0] * 5, beats, rule="all", exclude_copies=True)
    assert everybody == [without] * 5


@pytest.mark.parametrize("exclude", [False, True])
def test_arms_name_what_happens_to_copies(make_module, noisy, weak, exclude):
    module = make_module(exclude_copies=exclude)
    arms = module.verdicts_by_arm(weak, noisy)
    twin = "two_stage_with_copies" if exclude else "two_stage_no_copies"
    for arm, flag in (("two_stage", exclude), (twin, not exclude)):
        assert arms[arm] == make_module(exclude_copies=flag).decide(weak, noisy), arm
    assert arms["two_stage"] != arms[twin]
    random_winners = make_module(exclude_copies=exclude, winners="random")
    assert arms["random_winners"] == random_winners.decide(weak, noisy) != arms["two_stage"]
    random_anchor = make_module(exclude_copies=exclude, anchor="random")
    assert arms["random_anchor"] == random_anchor.decide(weak, noisy) != arms["two_stage"]


@pytest.fixture
def weak(make_task, make_module, noisy) -> list[Candidates]:
    """Judgements of 60 pairs in both orders by the weak judge, 15 samples each."""
    pairs = [
        order for pair in make_task(num_test=60).records("test") for order in (pair, pair.swap())
    ]
    candidates = make_module().sample(pairs, noisy, greedy=True, samples=15)
    for c in candidates[:4]:
        c.samples[:8] = [replace(one, verdict=Verdict(None)) for one in c.samples[:8]]
    return candidates


@pytest.mark.parametrize("rule", ["confidence", "first", "random"])
def test_anchor_is_never_unparsable(make_module, weak, rule):
    anchors = make_module(anchor=rule).anchors(weak)
    for c, anchor in zip(weak, anchors, strict=True):
        parsed = [i for i, verdict in enumerate(c.verdicts[:8]) if verdict]
        assert anchor in parsed if parsed else anchor is None
        if rule == "first" and parsed:
            assert anchor == parsed[0]
        if rule == "confidence" and parsed:
            assert c.confidences[anchor] == max(c.confidences[i] for i in parsed)
    assert anchors[:4] == [None] * 4
    best = [max(range(8), key=lambda i, c=c: c.confidences[i]) for c in weak]
    assert sum(not c.verdicts[i] for c, i in zip(weak, best, strict=True)) > 10


@pytest.mark.parametrize("votes", [2, 5, 8])
def test_all_winners_is_the_vote_of_the_others_with_the_anchor_breaking_ties(
    make_module, noisy, weak, votes
):
    module = make_module(winners="all", num_votes=votes)
    anchors = module.anchors(weak)
    ties = 0
    for c, anchor, verdict in zip(weak, anchors, module.decide(weak, noisy), strict=True):
        if anchor is None:
            assert verdict is None
            continue
        count = Counter(v for i, v in enumerate(c.verdicts[:votes]) if v and i != anchor)
        ties += count[1] == count[2]
        expected = c.verdicts[anchor] if count[1] == count[2] else max(count, key=count.get)
        assert verdict == expected
    assert ties > 5


def test_random_winners_are_as_many_as_the_reflections(make_module, noisy, weak):
    module = make_module(winners="random")
    anchors = module.anchors(weak)
    beats = module.reflect(weak, anchors, noisy)
    outcomes = module.conclude(weak, anchors, beats)
    assert [o.size for o in outcomes] == [int(row.sum()) for row in beats]
    chosen = module.conclude(weak, anchors, beats, rule="reflection")
    assert [o.verdict for o in outcomes] != [o.verdict for o in chosen]


def test_oracle_bounds_every_arm_of_the_same_samples(make_module, noisy, weak):
    module = make_module(winners="oracle")
    arms = module.verdicts_by_arm(weak, noisy)
    oracle = [verdict == c.pair.label for verdict, c in zip(arms["oracle"], weak, strict=True)]
    assert oracle == [c.pair.label in c.verdicts[:8] for c in weak]
    assert [v == c.pair.label for v, c in zip(arms["two_stage"], weak, strict=True)] == oracle
    others = set(arms) - {"greedy", "maj15"}  # those draw from other samples
    assert {"maj8", "best_confidence", "random_winners", "random_anchor", "step_truth"} < others
    for arm in others:
        right = [verdict == c.pair.label for verdict, c in zip(arms[arm], weak, strict=True)]
        assert all(bound or not one for one, bound in zip(right, oracle, strict=True)), arm
    assert 0 < sum(v is None for v in arms["oracle"]) < len(weak)

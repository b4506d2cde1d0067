"""Trajectories of the scripted agent, and which are left out."""

from __future__ import annotations

from collections import Counter

from datamodules.engines.base import Sampling
from datamodules.labelling.trajectories import closed_searches, run_trajectories
from tests.datamodules.labelling.small_world import Bench, Saying

GREEDY = Sampling(temperature=0.0, max_new_tokens=4096)


def test_every_question_has_its_trajectory():
    bench = Bench()
    questions = bench.task.records("train")
    found, counts = run_trajectories(questions, bench.engine, GREEDY, 0)
    assert [one.question for one in found] == list(questions)
    assert any(one.is_right for one in found) and not all(one.is_right for one in found)
    for one in found:
        assert one.is_right == (one.answer in one.question.answers)
        expected = Counter(trajectories=1, right=int(one.is_right), searches=len(one.turns))
        assert counts[one.question.uid] == expected


def test_turns_end_behind_their_search():
    bench = Bench()
    found, _ = run_trajectories(bench.task.records("train"), bench.engine, GREEDY, 0)
    for one in found:
        for turn in one.turns:
            head = bench.task.render(one.completion.token_ids[: turn.end])
            assert head.endswith(f"<search> {turn.query} </search>")


def test_more_closed_searches_than_logged_ones_are_left_out():
    bench = Bench(max_searches=2)
    eager = Saying(bench.task, "<search> where was nobody born </search>")
    questions = bench.task.records("train")[:3]
    found, counts = run_trajectories(questions, bench.engine_of(eager), GREEDY, 0)
    assert not found
    assert [count["mismatched"] for count in counts.values()] == [1, 1, 1]
    empty = Saying(bench.task, "<search> </search>")
    assert not run_trajectories(questions, bench.engine_of(empty), GREEDY, 0)[0]


def test_tags_inside_passages_do_not_count():
    bench = Bench()
    found, _ = run_trajectories(bench.task.records("train"), bench.engine, GREEDY, 0)
    longest = max(found, key=lambda one: len(one.turns))
    closing = bench.task.tokenizer.encode("</search>", add_special_tokens=False)[0]
    observed = longest.completion.observed
    assert observed is not None
    ids = list(longest.completion.token_ids)
    before = closed_searches(longest, bench.task)
    ids[observed.index(True)] = closing
    object.__setattr__(longest.completion, "token_ids", tuple(ids))
    assert closed_searches(longest, bench.task) == before == len(longest.turns)


def test_samples_have_uids_of_their_own():
    bench = Bench(guess=0.5)
    sampling = Sampling(temperature=1.0, samples=2, max_new_tokens=4096)
    question = bench.task.records("train")[0]
    found, counts = run_trajectories([question], bench.engine, sampling, 0)
    assert [one.uid for one in found] == [question.uid, f"{question.uid}#1"]
    assert counts[question.uid]["trajectories"] == 2

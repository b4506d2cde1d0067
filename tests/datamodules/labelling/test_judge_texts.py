"""Reading a judge's answers: never a score too many, too few, or at another's place."""

from __future__ import annotations

import random

import pytest

from datamodules.labelling.judge_texts import (
    passage_text,
    read_facts,
    read_scores,
    relevance_text,
    sub_answer_text,
)
from datamodules.labelling.local import local_labels, requests_of
from datamodules.labelling.records import Judge, JudgeRequest, OpenTurn, Trajectory
from datamodules.passages import Passage
from tests.datamodules.labelling.small_world import Bench


@pytest.mark.parametrize(
    ("text", "count", "scores"),
    [
        ("90 80 5", 3, [90, 80, 5]),
        (" 90,80\n 5 ", 3, [90, 80, 5]),
        ("130 -4 +7", 3, [100, 0, 7]),
        ("0" * 5000 + "9", 1, [9]),
        ("9" * 5000, 1, [100]),
        ("<think>10 20</think>\n30", 1, [30]),
        ("<think>10 20", 2, None),
        ("90 80", 3, None),
        ("90 80 5 1", 3, None),
        ("90 80 five", 3, None),
        ("1: 90", 2, None),
        ("90.5", 1, None),
        ("90.5", 2, None),
        ("85/100", 2, None),
        ("81-100", 1, None),
        ("10-20", 2, None),
        ("", 1, None),
        ("", 0, None),
        ("scores: 90", 1, None),
    ],
)
def test_scores(text, count, scores):
    assert read_scores(text, count) == scores


@pytest.mark.parametrize(
    ("text", "count", "facts"),
    [
        ("<fact>Oslo</fact>\n<fact> Norway  is it </fact>", 2, ["Oslo", "Norway is it"]),
        ("<fact>Not Sure</fact> <fact>not sure.</fact><fact></fact>", 3, ["", "", ""]),
        ("<fact>Oslo</fact>", 2, None),
        ("<fact>a</fact><fact>b</fact>", 1, None),
        ("<fact>a<fact>b</fact>", 1, None),
        ("<fact>a<fact>b</fact></fact>", 2, None),
        ("<fact>a", 1, None),
        ("Oslo", 1, None),
        ("<think><fact>x</fact></think><fact>a</fact>", 1, ["a"]),
    ],
)
def test_facts(text, count, facts):
    assert read_facts(text, count) == facts


class Mixed(Judge):
    """Answers rightly (the number in a passage's id) or with a fault, by a draw."""

    fingerprint = "mixed"

    def __init__(self, seed: int) -> None:
        self.chance, self.broken = random.Random(f"faults/{seed}"), set()

    def sub_answers(self, trajectories):
        return [None for _ in trajectories]

    def scores(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request: JudgeRequest):
        numbers = [passage.uid for passage in request.passages]
        right = " ".join(numbers)
        faults = [right] * 20 + [right + " 7", " ".join(numbers[1:]), "none of them", f"{right}."]
        text = self.chance.choice(faults)
        if text != right:
            self.broken.add(request.query)
        return read_scores(text, len(numbers))


@pytest.mark.parametrize("seed", range(20))
def test_scores_never_move_between_chunks_and_turns(seed):
    chance = random.Random(f"turns/{seed}")
    asked = []
    for number in range(30):
        passages = [Passage(str(chance.randint(0, 100)), "", "x") for _ in range(20)]
        asked.append(
            [JudgeRequest(f"q{number}", tuple(passages[i : i + 7])) for i in range(0, 20, 7)]
        )
    judge = Mixed(seed)
    found = local_labels(judge, asked)
    assert 0 < len(judge.broken) < 30
    for chunks, (scores, unread) in zip(asked, found, strict=True):
        own = tuple(int(p.uid) for chunk in chunks for p in chunk.passages)
        is_broken = chunks[0].query in judge.broken
        assert scores == (None if is_broken else own)
        assert (unread > 0) == is_broken


class Short(Mixed):
    """Gives a score too few, as if it had been read."""

    def answer(self, request):
        return [1] * (len(request.passages) - 1)


def test_a_judge_of_the_wrong_length_is_not_believed():
    request = JudgeRequest("q", (Passage("1", "", "x"), Passage("2", "", "x")))
    assert local_labels(Short(0), [[request], []]) == [(None, 1), ((), 0)]


class Silent(Mixed):
    """Forgets an answer."""

    def scores(self, requests):
        return []


def test_a_judge_that_forgets_answers_is_refused():
    request = JudgeRequest("q", (Passage("1", "", "x"),))
    with pytest.raises(ValueError, match="0 answers to 1 requests"):
        local_labels(Silent(0), [[request]])


def trajectory_of(bench: Bench) -> Trajectory:
    question = next(q for q in bench.task.records("train") if q.group == "multi")
    prompt = bench.task.prompt(question)
    ((completion,),) = bench.engine.generate([prompt], bench.search.sampling())
    trace = completion.trace
    return Trajectory(question, prompt, completion, trace.turns, trace.answer, False)


def test_requests_hold_chunks_in_order_and_the_turns_own_query():
    bench = Bench()
    one = OpenTurn(trajectory_of(bench), 1, tuple(range(20, 45)))
    asked = requests_of(one, bench.task.corpus, "oslo", 10)
    assert [len(request.passages) for request in asked] == [10, 10, 5]
    assert [p.uid for r in asked for p in r.passages] == [
        bench.task.corpus[place].uid for place in one.places
    ]
    assert {request.query for request in asked} == {one.trajectory.turns[1].query}
    assert {request.sub_answer for request in asked} == {"oslo"}


def test_the_judge_sees_query_and_passages_but_not_the_question():
    bench = Bench()
    trajectory = trajectory_of(bench)
    passage = bench.task.corpus[0]
    request = JudgeRequest(trajectory.turns[0].query, (passage,), "oslo")
    text = relevance_text(request, [passage_text(passage)])
    assert request.query in text and passage.text in text and "oslo" in text
    assert trajectory.question.text not in text
    assert "that it is after" not in relevance_text(JudgeRequest("q", (passage,)), ["x"])


def test_the_analyst_sees_question_answers_and_every_query():
    trajectory = trajectory_of(Bench())
    text = sub_answer_text(trajectory, "TRANSCRIPT")
    for part in (trajectory.question.text, *trajectory.question.answers, *trajectory.queries):
        assert part in text
    assert "TRANSCRIPT" in text and f"exactly {len(trajectory.turns)} lines" in text

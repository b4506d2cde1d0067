"""Continued rollouts: which passage lets the agent finish right, and on how many searches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from datamodules.engines.base import Sampling
from datamodules.engines.search import EpisodeStart, SearchEngine
from datamodules.experience import Completion
from datamodules.labelling.continued import continued_labels, searches_left
from datamodules.labelling.records import OpenTurn, Trajectory
from datamodules.labelling.trajectories import run_trajectories
from datamodules.passages import Corpus
from datamodules.retrieval import Retriever
from tests.datamodules.labelling.small_world import Bench, Counting, Saying

GREEDY = Sampling(temperature=0.0, max_new_tokens=4096)


class Keeping(SearchEngine):
    """Keeps what it ran."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.runs: list[tuple[list[EpisodeStart], list[Completion]]] = []

    def run(self, starts: Sequence[EpisodeStart], sampling: Sampling) -> list[Completion]:
        found = super().run(starts, sampling)
        self.runs.append((list(starts), found))
        return found


def keeping(bench: Bench, agent: Any = None) -> Keeping:
    return Keeping(
        agent or bench.agent, task=bench.task, retriever=bench.retriever,
        max_searches=bench.search.max_searches,
    )  # fmt: skip


def multi_hop(bench: Bench) -> list[Trajectory]:
    questions = [q for q in bench.task.records("train") if q.group == "multi"]
    return run_trajectories(questions, bench.engine, GREEDY, 0)[0]


def labels(turns: Sequence[OpenTurn], engine: SearchEngine, **options: Any) -> Any:
    return continued_labels(turns, engine, GREEDY, **{"batch_size": 64, "seed": 0, **options})


def test_the_gold_passage_is_right_and_the_poisoned_one_wrong():
    bench = Bench()
    corpus, checked = bench.task.corpus, 0
    for one in multi_hop(bench):
        asked = one.question.extra
        (mine,) = bench.task.gold(one.question, one.turns[0].query)
        namesake = next(p for p in bench.task.facts.people[asked.name] if p.biography_uid != mine)
        if bench.task.facts.countries[namesake.city] == asked.answer:
            continue
        places = (corpus.places[mine], corpus.places[namesake.biography_uid])
        assert labels([OpenTurn(one, 0, places)], bench.engine) == ([(1, 0)], [2])
        checked += 1
    assert checked >= 3


def test_the_prefix_shows_that_one_passage_alone():
    bench = Bench()
    one = multi_hop(bench)[0]
    engine = keeping(bench)
    place = bench.task.corpus.places[one.question.supporting[1]]
    labels([OpenTurn(one, 1, (place,))], engine)
    ((start,), _) = engine.runs[0]
    text = bench.task.render(start.prefix)
    assert text.count("<information>") == 2  # that of the first turn, as it was, and this one
    last = text.rpartition("<information>")[2]
    assert bench.task.corpus[place].text in last and "Doc 2" not in last
    assert start.queries == one.queries[:2]
    assert start.uid == f"{one.question.uid}/1/{bench.task.corpus[place].uid}"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_turn_i_leaves_the_rest_of_the_budget(number):
    bench = Bench(max_searches=4)
    eager = Saying(bench.task, "<search> where was nobody born </search>")
    engine = keeping(bench, eager)
    question = bench.task.records("train")[0]
    prompt = bench.task.prompt(question)
    ((whole,),) = engine.generate([prompt], GREEDY)
    assert len(whole.trace.turns) == 4
    one = Trajectory(question, prompt, whole, whole.trace.turns, None, False)
    turn = OpenTurn(one, number, (0,))
    engine.runs.clear()
    assert labels([turn], engine)[0] == [(0,)]
    ((_, (rest,)),) = engine.runs
    assert len(rest.trace.turns) == searches_left(turn, engine) == 4 - (number + 1)
    assert rest.trace.is_cut


def test_equal_states_run_once_and_batches_change_nothing():
    bench = Bench()
    found = multi_hop(bench)
    turns = [OpenTurn(one, i, (0, 5, 9)) for one in found for i in range(len(one.turns) - 1)]
    engine = keeping(bench)
    once, added = labels(turns, engine)
    assert added == [3] * len(turns) and len(engine.runs) == 1
    assert labels(turns, engine, batch_size=1)[0] == once
    assert [len(starts) for starts, _ in engine.runs[1:]] == [1] * sum(added)
    twice, more = labels([turns[0], *turns, turns[0]], keeping(bench))
    assert twice == [once[0], *once, once[0]]
    assert more == [3, 0, *added[1:], 0]


class Useless(Retriever):
    """Finds what nobody looked for: the agent is left to guess."""

    fingerprint = "useless"

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def search(self, texts: Sequence[str], k: int) -> list[list[int]]:
        place = next(i for i, one in enumerate(self.corpus) if "born" not in one.text)
        return [[place] * k for _ in texts]


def test_labels_hang_on_seed_question_and_passage_alone():
    bench = Bench(guess=0.5)
    lost = [OpenTurn(one, 0, tuple(range(20))) for one in multi_hop(bench)[:2]]
    engine = SearchEngine(bench.agent, task=bench.task, retriever=Useless(bench.task.corpus))
    both, _ = labels(lost, engine)
    assert all(0 < sum(one) < 20 for one in both) and both[0] != both[1]
    assert labels(lost[1:], engine)[0] == both[1:]
    last = [OpenTurn(lost[1].trajectory, 0, (7,))]
    assert labels(last, engine)[0] == [both[1][7:8]]
    assert labels(lost, engine, seed=1)[0] != both


def test_nothing_is_asked_for_no_turns():
    bench = Bench()
    engine = keeping(bench, Counting(bench.agent))
    assert labels([], engine) == ([], [])
    assert not engine.runs


def test_a_passage_that_does_not_fit_is_cut():
    bench = Bench()
    one = multi_hop(bench)[0]
    engine = keeping(bench)
    head = one.turns[0].end
    tight = replace(GREEDY, max_new_tokens=head + 6)
    continued_labels([OpenTurn(one, 0, (0,))], engine, tight, batch_size=1, seed=0)
    continued_labels(
        [OpenTurn(replace(one, prompt=replace(one.prompt, max_new_tokens=head + 6)), 0, (0,))],
        engine, GREEDY, batch_size=1, seed=0,
    )  # fmt: skip
    for (start,), (rest,) in engine.runs:
        assert len(start.prefix) == head + 6
        assert bench.task.render(start.prefix).endswith("</information>")
        assert rest.trace.is_cut and not rest.token_ids

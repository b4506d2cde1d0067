"""From questions to rows: what each form of labels runs, and how a killed run goes on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from datamodules.labelling.judges import TaskJudge
from datamodules.labelling.store import NAME
from tests.datamodules.labelling.small_world import Bench, Failing

FEW = {"candidates": 6, "num_negatives": 3, "chunk_questions": 5}


class Watched(TaskJudge):
    """Counts what it is asked; ``fails`` on queries that hold a word."""

    def __init__(self, task, fails: str = "\n") -> None:
        super().__init__(task)
        self.requests, self.trajectories, self.fails = [], 0, fails

    def sub_answers(self, trajectories):
        self.trajectories += len(trajectories)
        return super().sub_answers(trajectories)

    def scores(self, requests):
        self.requests += requests
        found = super().scores(requests)
        pairs = zip(found, requests, strict=True)
        return [None if self.fails in one.query else scores for scores, one in pairs]


def test_labels_agree_with_their_parts(tmp_path):
    bench = Bench()
    found = bench.label(tmp_path, **FEW)
    assert found.rows and found.turns
    corpus, questions = bench.task.corpus, {q.uid: q for q in bench.task.records("train")}
    for turn in found.turns:
        question = questions[turn.question_uid]
        assert turn.question == question.text and len(turn.history) == turn.turn
        places = bench.retriever.search([turn.query], 6)[0]
        assert turn.candidates == tuple(corpus[place].uid for place in places)
        gold = bench.task.gold(question, turn.query)
        assert turn.gold == tuple(int(uid in gold) for uid in turn.candidates)
        assert turn.local and turn.right
    for row in found.rows:
        turn = next(t for t in found.turns if row.uid.startswith(f"{t.question_uid}/{t.turn}/"))
        place = turn.candidates.index(row.positive)
        assert turn.right[place] == 1 and turn.local[place] == row.scores[0] >= 60
    metrics = found.metrics
    assert metrics["labels/rows"] == len(found.rows)
    assert metrics["labels/turns"] == len(found.turns)
    assert metrics["labels/trajectories"] == 12
    assert set(found.histograms) == {"labels/lr_gac0", "labels/lr_gac1"}
    assert f"{len(found.turns)} turns labelled" in found.why_none()


@pytest.mark.parametrize(
    ("label", "judged", "continued"),
    [("both", True, True), ("local", True, False), ("global", False, True), ("gold_ids", 0, 0)],
)
def test_each_form_runs_what_it_needs(tmp_path, label, judged, continued):
    bench = Bench()
    judge = Watched(bench.task)
    whole = bench.label(tmp_path / "whole", **FEW)
    bench.agent.asked = 0
    found = bench.label(tmp_path / label, judge=judge, label=label, **FEW)
    assert bool(judge.requests) == bool(judge.trajectories) == bool(judged)
    searched = sum(len(t.history) == 0 for t in found.turns)  # trajectories with a search
    assert (bench.agent.asked > 6 * searched) == bool(continued)
    assert found.rows
    for turn, other in zip(found.turns, whole.turns, strict=True):  # the same turns
        local, right = other.local if judged else None, other.right if continued else None
        assert turn == replace(other, local=local, right=right)


def test_a_killed_run_goes_on_to_the_same_file(tmp_path):
    whole = Bench().label(tmp_path / "whole", **FEW)
    data = (tmp_path / "whole" / NAME).read_bytes()
    lines = data.splitlines(keepends=True)
    assert len(lines) == 13
    for kept in (0, 8):
        folder = tmp_path / f"kept{kept}"
        folder.mkdir()
        (folder / NAME).write_bytes(b"".join(lines[: kept + 1]) + lines[kept + 1][:50])
        bench = Bench()
        again = bench.label(folder, **FEW)
        assert (folder / NAME).read_bytes() == data
        assert again.turns == whole.turns and again.rows == whole.rows
        assert again.metrics == whole.metrics
    done = Bench()
    assert done.label(tmp_path / "whole", **FEW).rows == whole.rows
    assert done.agent.asked == 0


def test_chunks_and_batches_change_nothing(tmp_path):
    whole = Bench(guess=0.5).label(tmp_path / "a", **FEW)
    small = {**FEW, "chunk_questions": 1, "batch_size": 3}
    assert Bench(guess=0.5).label(tmp_path / "b", **small).turns == whole.turns
    assert (tmp_path / "a" / NAME).read_bytes() == (tmp_path / "b" / NAME).read_bytes()


def test_selecting_anew_asks_nobody(tmp_path):
    bench = Bench()
    first = bench.label(tmp_path, **FEW)
    bench.agent.asked = 0
    strict = bench.label(tmp_path, **{**FEW, "num_negatives": 5, "negatives": "top"})
    assert bench.agent.asked == 0 and strict.turns == first.turns
    assert len(strict.rows[0].negatives) == 5


@pytest.mark.parametrize(
    ("options", "field"),
    [({"agent": "another"}, "agent"), ({"judge_chunk": 5}, "judge_chunk"), ({"seed": 1}, "seed"),
     ({"label": "local"}, "rollouts")],
)  # fmt: skip
def test_stale_labels_are_refused(tmp_path, options, field):
    bench = Bench()
    bench.label(tmp_path, **FEW)
    with pytest.raises(ValueError, match=f"made by others .*{field}="):
        bench.label(tmp_path, **{**FEW, **options})


def test_labels_of_another_retriever_or_question_are_refused(tmp_path):
    bench = Bench()
    bench.label(tmp_path, **FEW)
    other = Bench()
    other.retriever.fingerprint = "newer"
    with pytest.raises(ValueError, match="retriever="):
        other.label(tmp_path, **FEW)
    with pytest.raises(ValueError, match="questions="):
        Bench(seed=1).label(tmp_path, **FEW)


def test_turns_without_a_search_left_are_counted_and_skipped(tmp_path):
    bench = Bench(max_searches=2)
    found = bench.label(tmp_path, **FEW)
    assert {turn.turn for turn in found.turns} == {0}
    assert found.metrics["labels/skipped_no_budget"] > 0
    assert "turns without a search left" in found.why_none()


def test_unread_turns_are_dropped_and_counted(tmp_path):
    bench = Bench()
    whole = bench.label(tmp_path / "whole", **FEW)
    judge = Watched(bench.task, fails="country")
    found = bench.label(tmp_path / "part", judge=judge, **FEW, judge_chunk=2)
    lost = [turn for turn in found.turns if "country" in turn.query]
    assert lost and len(lost) < len(found.turns)
    assert all(turn.local is None and turn.right is None for turn in lost)
    others = [turn for turn in found.turns if "country" not in turn.query]
    assert others == [turn for turn in whole.turns if "country" not in turn.query]
    assert found.drops["unreadable"] == len(lost)
    requests = 3 * len(found.turns)
    assert found.metrics["labels/judge_parse_fail"] == pytest.approx(3 * len(lost) / requests)


def test_sub_answers_reach_the_judge_or_not(tmp_path):
    bench = Bench()
    told, untold = Watched(bench.task), Watched(bench.task)
    found = bench.label(tmp_path / "a", judge=told, **FEW)
    bench.label(tmp_path / "b", judge=untold, use_subanswers=False, **FEW)
    assert any(one.sub_answer for one in told.requests)
    assert not any(one.sub_answer for one in untold.requests) and not untold.trajectories
    shares = [bool(one.sub_answer) for one in told.requests]
    assert found.metrics["labels/subanswer_coverage"] == pytest.approx(sum(shares) / len(shares))


def test_samples_get_labels_of_their_own(tmp_path):
    found = Bench(guess=0.5).label(tmp_path, samples=2, temperature=1.0, **FEW)
    uids = {turn.question_uid for turn in found.turns}
    assert {uid for uid in uids if uid.endswith("#1")}
    assert len({row.uid for row in found.rows}) == len(found.rows)
    lines = (tmp_path / NAME).read_text().splitlines()[1:]
    assert [json.loads(line)["counts"]["trajectories"] for line in lines] == [2] * 12


def test_what_cannot_work_is_refused_at_once(tmp_path):
    bench = Bench()
    bench.judge = None
    with pytest.raises(ValueError, match=r"needs a judge.*; data.labels.candidates=5000 must be"):
        bench.label(tmp_path, candidates=5000)
    assert not list(tmp_path.iterdir())


def test_what_the_engine_loses_is_counted_and_never_called_wrong(tmp_path):
    bench = Bench()
    whole = bench.label(tmp_path / "whole", **FEW)
    turn = next(one for one in whole.turns if one.turn == 0)
    lost = f"{turn.question_uid}/0/{turn.candidates[2]}#"
    bench.engine = bench.engine_of(Failing(bench.agent, lost))
    found = bench.label(tmp_path / "turn", **FEW)
    changed = [one for one, old in zip(found.turns, whole.turns, strict=True) if one != old]
    assert changed == [replace(turn, right=None)]
    assert found.metrics["labels/failed_turns"] == found.drops["unreadable"] == 1
    bench.engine = bench.engine_of(Failing(bench.agent, f"{turn.question_uid}/0#"))
    less = bench.label(tmp_path / "trajectory", **FEW)
    assert less.turns == [one for one in whole.turns if one.question_uid != turn.question_uid]
    assert less.metrics["labels/failed_trajectories"] == 1
    assert "1 lost by the engine" in less.why_none()

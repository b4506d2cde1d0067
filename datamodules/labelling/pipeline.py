"""Labelling from questions to rows: trajectories, candidates, judge, continued rollouts, selection.

    questions -> trajectories -> candidates of every turn -> sub-answers -> local -> global -> store

in chunks of questions, each saved when it is done. Every random stream is named by its question,
so labels depend neither on the chunks nor on where a killed run went on. Turns without a search
left are skipped for every form of labels, so that ablations compare labels of equal turns.

Counts of a question: those of ``run_trajectories``, ``no_budget`` and ``few_candidates`` (turns
skipped), ``queries`` and ``sub_answers`` (those known), ``requests`` of the judge and those
``unread``, ``rollouts``, and ``failed_turns`` (the engine failed at a rollout).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from datamodules.engines.search import SearchEngine
from datamodules.labelling.continued import continued_labels, searches_left
from datamodules.labelling.label_metrics import histograms, label_metrics
from datamodules.labelling.local import local_labels, requests_of
from datamodules.labelling.options import LabelOptions
from datamodules.labelling.records import (
    Judge,
    LabelledTurn,
    OpenTurn,
    Trajectory,
    UtilityRow,
)
from datamodules.labelling.selection import select
from datamodules.labelling.store import Finished, LabelStore
from datamodules.labelling.trajectories import run_trajectories
from datamodules.prepared import digest
from datamodules.progress import track
from datamodules.retrieval import Retriever
from datamodules.search_options import SearchOptions
from datamodules.tasks.searching import Question, SearchTask


@dataclass(frozen=True)
class Labelled:
    """Labels of all questions, and the rows made of them.

    Args:
        turns: In the order of the questions.
        rows: Training rows.
        drops: Turns without rows, by reason, see ``select``.
        metrics: ``labels/*``, see ``label_metrics``.
        histograms: See ``label_metrics.histograms``.
    """

    turns: list[LabelledTurn]
    rows: list[UtilityRow]
    drops: Counter[str]
    metrics: dict[str, float]
    histograms: dict[str, Tensor] = field(default_factory=dict)

    def why_none(self) -> str:
        """Where trajectories and turns went, in one line."""
        parts = [f"{self.metrics['labels/trajectories']:.0f} trajectories kept"]
        parts += [
            f"{self.metrics[f'labels/{name}']:.0f} {text}"
            for name, text in (
                ("mismatched", "left out for searches that were not logged"),
                ("failed_trajectories", "lost by the engine"),
                ("skipped_no_budget", "turns without a search left"),
                ("skipped_few_candidates", "turns with too few candidates"),
            )
            if self.metrics[f"labels/{name}"]
        ]
        parts.append(f"{len(self.turns)} turns labelled")
        return ", ".join([*parts, *(f"{count} {reason}" for reason, count in self.drops.items())])


def label_turns(
    *,
    task: SearchTask,
    engine: SearchEngine,
    retriever: Retriever,
    judge: Judge | None,
    options: LabelOptions,
    search: SearchOptions,
    agent: str,
    folder: str | Path,
    questions: Sequence[Question] | None = None,
) -> Labelled:
    """Label the turns of the agent's own trajectories; goes on where a killed run stopped.

    Args:
        task: Questions and corpus.
        engine: The agent with the retriever.
        retriever: Gives the candidates and fingerprints the labels; that of ``engine``.
        judge: Scores passages; None where local labels are not wanted.
        options: How to label and select.
        search: Bounds of an episode.
        agent: Fingerprint of the agent.
        folder: Where finished labels are kept.
        questions: Some of the training split; None takes all.

    Raises:
        ValueError: No judge where one is needed, fewer passages than candidates, uids that are
            there twice, or a folder whose labels others made.
    """
    asked = list(task.records("train") if questions is None else questions)
    _check(asked, retriever, judge, options)
    labeller = _Labeller(engine, retriever, judge, options, search)
    store = LabelStore(folder, labeller.made_by(agent, asked))
    size = options.chunk_questions
    chunks = [asked[start : start + size] for start in range(0, len(asked), size)]
    for chunk in track(chunks, "labelling", len(chunks)):
        missing = [question for question in chunk if question.uid not in store.finished]
        if missing:
            store.append(labeller.label(missing))
    return collect([store.finished[question.uid] for question in asked], options)


def collect(finished: Sequence[Finished], options: LabelOptions) -> Labelled:
    """Select rows from finished labels.

    Args:
        finished: Of all questions.
        options: How to select.
    """
    turns = [turn for one in finished for turn in one.turns]
    counts = sum((one.counts for one in finished), Counter[str]())
    rows, drops = select(
        turns,
        label=options.label,
        pos_threshold=options.pos_threshold,
        max_positives=options.max_positives,
        num_negatives=options.num_negatives,
        negatives=options.negatives,
        seed=options.seed,
    )
    metrics = label_metrics(turns, rows, drops, counts)
    return Labelled(turns, rows, drops, metrics, histograms(turns))


def _check(
    questions: Sequence[Question],
    retriever: Retriever,
    judge: Judge | None,
    options: LabelOptions,
) -> None:
    problems = []
    if options.needs_judge and judge is None:
        problems.append(f"data.labels.label={options.label!r} needs a judge: give data.judge")
    if options.candidates > len(retriever.corpus):
        problems.append(
            f"data.labels.candidates={options.candidates} must be at most the "
            f"{len(retriever.corpus)} passages of the corpus"
        )
    twice = [uid for uid, count in Counter(one.uid for one in questions).items() if count > 1]
    if twice:
        problems.append(f"{len(twice)} questions have a uid that another has, such as {twice[0]!r}")
    if problems:
        raise ValueError("; ".join(problems))


class _Labeller:
    """Labels chunks of questions."""

    def __init__(
        self,
        engine: SearchEngine,
        retriever: Retriever,
        judge: Judge | None,
        options: LabelOptions,
        search: SearchOptions,
    ) -> None:
        self.engine, self.retriever, self.judge = engine, retriever, judge
        self.options, self.search = options, search

    def made_by(self, agent: str, questions: Sequence[Question]) -> dict[str, Any]:
        """What decides the labels."""
        engine = self.engine
        texts = [[one.uid, one.text, one.answers, one.supporting] for one in questions]
        bounds = ("input", "top_k", "max_searches", "turn_tokens", "observation_tokens")
        return {
            "agent": agent,
            "retriever": self.retriever.fingerprint,
            "judge": self.judge.fingerprint if self.judge and self.options.needs_judge else None,
            "questions": digest({"questions": texts}),
            "max_new_tokens": self.search.max_new_tokens,
            **{name: getattr(engine, name) for name in bounds},
            **self.options.material(),
        }

    def label(self, questions: Sequence[Question]) -> list[Finished]:
        """All labels of some questions, in their order."""
        options = self.options
        sampling = self.search.sampling(options.temperature, options.samples)
        trajectories, counts = run_trajectories(questions, self.engine, sampling, options.seed)
        turns = self._open_turns(trajectories, counts)
        local = self._local(trajectories, turns, counts)
        right = self._global(turns, local, counts)
        found: dict[str, list[LabelledTurn]] = {question.uid: [] for question in questions}
        for turn, scores, hits in zip(turns, local, right, strict=True):
            found[turn.trajectory.question.uid].append(self._labelled(turn, scores, hits))
        return [Finished(uid, tuple(own), counts[uid]) for uid, own in found.items()]

    def _open_turns(
        self, trajectories: Sequence[Trajectory], counts: dict[str, Counter[str]]
    ) -> list[OpenTurn]:
        """Turns with a search left and enough candidates."""
        turns: list[OpenTurn] = []
        for trajectory in trajectories:
            own = [OpenTurn(trajectory, number, ()) for number in range(len(trajectory.turns))]
            left = [turn for turn in own if searches_left(turn, self.engine) > 0]
            counts[trajectory.question.uid]["no_budget"] += len(own) - len(left)
            turns += left
        texts = [
            self.engine.fit(self.engine.input, turn.trajectory.question.text, turn.queries)
            for turn in turns
        ]
        places = self.retriever.search(texts, self.options.candidates)
        kept = []
        for turn, found in zip(turns, places, strict=True):
            if len(found) < self.options.candidates:
                counts[turn.trajectory.question.uid]["few_candidates"] += 1
            else:
                kept.append(OpenTurn(turn.trajectory, turn.number, tuple(found)))
        return kept

    def _local(
        self,
        trajectories: Sequence[Trajectory],
        turns: Sequence[OpenTurn],
        counts: dict[str, Counter[str]],
    ) -> list[tuple[int, ...] | None]:
        """Scores of the judge a turn."""
        if self.judge is None or not self.options.needs_judge:
            return [None] * len(turns)
        facts = self._sub_answers(self.judge, trajectories, counts)
        requests = [
            requests_of(
                turn,
                self.retriever.corpus,
                facts.get((turn.trajectory.uid, turn.number), ""),
                self.options.judge_chunk,
            )
            for turn in turns
        ]
        found = []
        labels = local_labels(self.judge, requests)
        for turn, asked, (scores, unread) in zip(turns, requests, labels, strict=True):
            counts[turn.trajectory.question.uid].update(requests=len(asked), unread=unread)
            found.append(scores)
        return found

    def _sub_answers(
        self, judge: Judge, trajectories: Sequence[Trajectory], counts: dict[str, Counter[str]]
    ) -> dict[tuple[str, int], str]:
        """The fact behind each turn, where it is known."""
        if not self.options.use_subanswers:
            return {}
        facts: dict[tuple[str, int], str] = {}
        answers = judge.sub_answers(trajectories)
        for trajectory, found in zip(trajectories, answers, strict=True):
            own = found if found is not None and len(found) == len(trajectory.turns) else []
            known = {(trajectory.uid, number): fact for number, fact in enumerate(own) if fact}
            counts[trajectory.question.uid].update(
                queries=len(trajectory.turns), sub_answers=len(known)
            )
            facts |= known
        return facts

    def _global(
        self,
        turns: Sequence[OpenTurn],
        local: Sequence[tuple[int, ...] | None],
        counts: dict[str, Counter[str]],
    ) -> list[tuple[int, ...] | None]:
        """Right or wrong a candidate; turns that the judge lost are left out, they are dropped."""
        right: list[tuple[int, ...] | None] = [None] * len(turns)
        if not self.options.needs_rollouts:
            return right
        wanted = [
            place
            for place, scores in enumerate(local)
            if scores is not None or not self.options.needs_judge
        ]
        found, added = continued_labels(
            [turns[place] for place in wanted],
            self.engine,
            self.search.sampling(self.options.temperature),
            batch_size=self.options.batch_size,
            seed=self.options.seed,
        )
        for place, labels, rollouts in zip(wanted, found, added, strict=True):
            right[place] = labels
            counts[turns[place].trajectory.question.uid].update(
                rollouts=rollouts, failed_turns=int(labels is None)
            )
        return right

    def _labelled(
        self, turn: OpenTurn, local: tuple[int, ...] | None, right: tuple[int, ...] | None
    ) -> LabelledTurn:
        question = turn.trajectory.question
        candidates = tuple(self.retriever.corpus[place].uid for place in turn.places)
        gold = set(self.engine.task.gold(question, turn.query))
        return LabelledTurn(
            question_uid=turn.trajectory.uid,
            turn=turn.number,
            question=question.text,
            history=turn.queries[:-1],
            query=turn.query,
            candidates=candidates,
            local=local,
            right=right,
            gold=tuple(int(uid in gold) for uid in candidates),
        )

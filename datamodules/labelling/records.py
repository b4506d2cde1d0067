"""Records of labelling: trajectories, what a judge is asked, labelled turns, selected rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.engines.search import Turn
from datamodules.experience import Completion, Prompt
from datamodules.passages import Passage
from datamodules.tasks.searching import Question


@dataclass(frozen=True)
class Trajectory:
    """One finished episode of a training question.

    Args:
        question: What was asked.
        prompt: As the agent read it.
        completion: Of the whole episode.
        turns: Its searches.
        answer: Final answer; None for none.
        is_right: Exact match.
        sample: Which of the question's samples it is, from 0.
    """

    question: Question
    prompt: Prompt
    completion: Completion
    turns: tuple[Turn, ...]
    answer: str | None
    is_right: bool
    sample: int = 0

    @property
    def uid(self) -> str:
        """The question's; samples behind the first add their number."""
        return f"{self.question.uid}#{self.sample}" if self.sample else self.question.uid

    @property
    def queries(self) -> tuple[str, ...]:
        """Of all its searches, in order."""
        return tuple(turn.query for turn in self.turns)


@dataclass(frozen=True)
class OpenTurn:
    """A turn of a trajectory with its candidates, before it has labels.

    Args:
        trajectory: Where it is from.
        number: Of the turn, from 0.
        places: Of its candidates in the corpus, the retriever's best first.
    """

    trajectory: Trajectory
    number: int
    places: tuple[int, ...]

    @property
    def query(self) -> str:
        """Of the turn."""
        return self.trajectory.turns[self.number].query

    @property
    def queries(self) -> tuple[str, ...]:
        """Those before it and its own."""
        return self.trajectory.queries[: self.number + 1]


@dataclass(frozen=True)
class JudgeRequest:
    """Passages to be scored together for one query.

    Args:
        query: Of the turn.
        passages: A chunk of its candidates.
        sub_answer: The fact that the query is after; "" where it is not known.
    """

    query: str
    passages: tuple[Passage, ...]
    sub_answer: str = ""


class Judge(ABC):
    """Scores local relevance and infers sub-answers. ``fingerprint`` names all it depends on."""

    fingerprint: str

    @abstractmethod
    def sub_answers(self, trajectories: Sequence[Trajectory]) -> list[list[str] | None]:
        """For each trajectory one fact a query, "" for *not sure*; None where it cannot be read."""

    @abstractmethod
    def scores(self, requests: Sequence[JudgeRequest]) -> list[list[int] | None]:
        """For each request one integer in 0..100 a passage; None where they cannot be read."""


@dataclass(frozen=True)
class LabelledTurn:
    """A turn with its candidates and their two labels.

    Args:
        question_uid: Which question; samples behind the first add ``#<sample>``.
        turn: Number of the turn in its trajectory, from 0.
        question: Its text.
        history: Queries before this one.
        query: Of the turn.
        candidates: Ids of the passages, in the retriever's order.
        local: Judge's scores 0 to 100; None where a chunk could not be read or no judge was asked.
        right: Whether the continued rollout with this passage alone was right, 0 or 1; None where
            there were no rollouts (not asked for, the judge could not be read, or one failed).
        gold: Whether the passage answers the query, 0 or 1, as ``SearchTask.gold`` knows.
    """

    question_uid: str
    turn: int
    question: str
    history: tuple[str, ...]
    query: str
    candidates: tuple[str, ...]
    local: tuple[int, ...] | None
    right: tuple[int, ...] | None
    gold: tuple[int, ...]


@dataclass(frozen=True)
class UtilityRow:
    """One training row of the retriever: a positive and its negatives.

    Args:
        uid: ``<question>/<turn>/<number>``.
        question: Text.
        history: Queries before.
        query: Of the turn.
        positive: Id of a passage.
        negatives: Ids of passages.
        scores: Local scores (0 to 100) of the positive and the negatives, in that order; -1 each
            where there are none.
        siblings: Ids of all positives of the turn, this one included.
    """

    uid: str
    question: str
    history: tuple[str, ...]
    query: str
    positive: str
    negatives: tuple[str, ...]
    scores: tuple[int, ...]
    siblings: tuple[str, ...]

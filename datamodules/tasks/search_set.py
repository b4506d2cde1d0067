"""Questions on which a retriever is measured by what an agent makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from datamodules.experience import Completion
from datamodules.passages import Corpus
from datamodules.retrieval import Retriever
from datamodules.search_texts import retriever_input
from datamodules.tasks.searching import Question

DEEPEST = 20  # places that metrics of a ranking see


class SearchAgent(Protocol):
    """Who searches; it wraps a ``SearchEngine``."""

    def run(self, questions: Sequence[Question], retriever: Retriever) -> list[Completion]:
        """One episode a question, in their order; ``Completion.trace`` is a ``Trace``.

        The same on every rank: the retriever's answers come from all of them.

        Args:
            questions: What is asked.
            retriever: What is searched with.
        """


@dataclass(frozen=True)
class SearchSet:
    """Questions, a corpus and an agent.

    Args:
        name: In metrics: ``val/<name>/em``.
        questions: At least one.
        corpus: What is searched.
        agent: Who searches.
        group: Sets of one group are also averaged: ``val/<group>/em``; "" for no group.
        input: Form of the retriever's input, as the agent uses it (``search_texts``).
        fit: Writes that input within a bound, see ``search_texts.fit_input``.
        k: Places of a first search that are ranked, at least 20.
        gold: From a question and a sub-query to the ids of the passages that answer it; None for
            the question's supporting ones.

    Raises:
        ValueError: No questions, or too few places.
    """

    name: str
    questions: Sequence[Question]
    corpus: Corpus
    agent: SearchAgent = field(repr=False)
    group: str = ""
    input: str = "question_query"
    fit: Callable[[str, str, Sequence[str]], str] = field(default=retriever_input, repr=False)
    k: int = DEEPEST
    gold: Callable[[Question, str], Sequence[str]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        problems = [] if self.questions else ["there are no questions"]
        if self.k < DEEPEST:
            problems.append(f"k={self.k} must be at least {DEEPEST}")
        if problems:
            raise ValueError(f"search set {self.name!r}: {'; '.join(problems)}")

    def run(self, retriever: Retriever) -> list[Completion]:
        """Episodes of all questions, in their order.

        Args:
            retriever: Of the corpus.

        Raises:
            ValueError: The agent gave another number of episodes, or some without a trace.
        """
        found = self.agent.run(self.questions, retriever)
        if len(found) != len(self.questions) or any(one.trace is None for one in found):
            raise ValueError(
                f"search set {self.name!r}: the agent must give a completion with a trace for each "
                f"of {len(self.questions)} questions, and gave {len(found)} completions, "
                f"{sum(one.trace is None for one in found)} of them without a trace"
            )
        return found

    def places(self, question: Question, ids: Sequence[str]) -> list[int]:
        """Places of passages in the corpus.

        Args:
            question: Whose they are, for messages.
            ids: Of the passages.

        Raises:
            ValueError: The corpus has no such passage.
        """
        if unknown := [uid for uid in ids if uid not in self.corpus.places]:
            raise ValueError(
                f"{question.where or question.uid}: the passage {unknown[0]!r} is not in "
                f"{self.corpus.name}"
            )
        return [self.corpus.places[uid] for uid in ids]

"""What a search task is: questions, a corpus, a prompt, and exact match of the final answer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datamodules.passages import Corpus, Passage
from datamodules.tasks.base import Split, Task


@dataclass(frozen=True)
class Question:
    """A question with its answers.

    Args:
        uid: Stable identity.
        text: The question.
        answers: Gold answers; never empty.
        supporting: Ids of the passages that hold the facts; () where unknown.
        group: ``single`` or ``multi`` (hops), or another name of its set.
        extra: What the task's own agent and judge need.
        where: ``file:line``, for messages.
    """

    uid: str
    text: str
    answers: tuple[str, ...]
    supporting: tuple[str, ...] = ()
    group: str = "multi"
    extra: Any = field(default=None, compare=False, repr=False)
    where: str = ""


class SearchTask(Task):
    """Questions whose answers are in a corpus. Engines and trainers know no task by name."""

    @property
    @abstractmethod
    def corpus(self) -> Corpus:
        """The passages, always the same object."""

    @abstractmethod
    def records(self, split: Split) -> Sequence[Question]:
        """Questions of a split, in a fixed order."""

    @property
    def spaced(self) -> bool:
        """Whether texts are words parted by single spaces (word-level tokenizers)."""
        return self.vocabulary() is not None

    # ------------------------------------------------------------------ offline parts, optional

    def act(self, question: Question, transcript: str, coin: int) -> str:
        """What the task's scripted agent writes next, up to a closing tag.

        Args:
            question: Which question.
            transcript: All text after the prompt so far, observations included.
            coin: A random 64-bit number, a pure function of (key, prompt, sample).

        Raises:
            NotImplementedError: The task has no scripted agent.
        """
        raise NotImplementedError(f"task '{self.name}' has no scripted agent: give agent=folder")

    def sub_answers(self, question: Question, queries: Sequence[str], solved: bool) -> list[str]:
        """The short fact that each query was after, "" for *not sure*; see the card, 2.4 (a).

        Args:
            question: Which question.
            queries: Of one trajectory, in order.
            solved: Whether its answer was right.
        """
        return [""] * len(queries)

    def relevance(self, query: str, passages: Sequence[Passage], sub_answer: str) -> list[int]:
        """Scores 0 to 100 of the task's procedural judge, one a passage.

        Args:
            query: Of the turn.
            passages: Candidates.
            sub_answer: As ``sub_answers`` gave it.

        Raises:
            NotImplementedError: The task has no procedural judge.
        """
        raise NotImplementedError(f"task '{self.name}' has no judge of its own: give data.judge")

"""What a search episode is: tags, turns, and where an episode may begin.

    agent text ... <search> query </search> <information> Doc 1(Title: t) body ... </information>
    agent text ... <answer> answer </answer>

Shape of a completion: everything behind the prompt, observations included; ``Completion.observed``
says which tokens the environment wrote, ``Completion.trace`` is a ``Trace``.
"""

from __future__ import annotations

from dataclasses import dataclass

from datamodules.experience import Prompt


@dataclass(frozen=True)
class Turn:
    """One search.

    Args:
        query: As the agent wrote it, stripped.
        places: Passages that were shown, the best first.
        end: Tokens behind the prompt up to and including this turn's ``</search>``.
    """

    query: str
    places: tuple[int, ...]
    end: int


@dataclass(frozen=True)
class Trace:
    """What happened in an episode.

    Args:
        turns: Searches, in order.
        answer: Text in the last ``<answer>``; None where there is none.
        num_invalid: Pieces that were no search and no answer (an unclosed tag, an empty query).
        num_unclosed: Of these, pieces whose search tag was never closed.
        num_empty: Of these, pieces with an empty query.
        is_cut: The budget of searches or tokens ran out before an answer.
    """

    turns: tuple[Turn, ...] = ()
    answer: str | None = None
    num_invalid: int = 0
    num_unclosed: int = 0
    num_empty: int = 0
    is_cut: bool = False


@dataclass(frozen=True)
class EpisodeStart:
    """Where an episode begins: at its prompt, or in the middle of an earlier one.

    Args:
        prompt: ``prompt.record`` is the ``Question``.
        prefix: Tokens behind the prompt that are already there, with observations.
        queries: Searches that these tokens hold; they count against the budget.
        uid: Of the random stream; "" for the prompt's own.
    """

    prompt: Prompt
    prefix: tuple[int, ...] = ()
    queries: tuple[str, ...] = ()
    uid: str = ""

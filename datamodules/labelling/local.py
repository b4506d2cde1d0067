"""Local relevance: the judge scores candidates chunk by chunk (card, 2.4 b)."""

from __future__ import annotations

from collections.abc import Sequence

from datamodules.labelling.records import Judge, JudgeRequest, OpenTurn
from datamodules.passages import Corpus


def requests_of(turn: OpenTurn, corpus: Corpus, sub_answer: str, chunk: int) -> list[JudgeRequest]:
    """What the judge is asked about a turn: its candidates in order, ``chunk`` at a time.

    Args:
        turn: With candidates.
        corpus: Of the retriever.
        sub_answer: The fact that the query is after; "" where it is not known.
        chunk: Most passages a request.
    """
    passages = [corpus[place] for place in turn.places]
    return [
        JudgeRequest(turn.query, tuple(passages[start : start + chunk]), sub_answer)
        for start in range(0, len(passages), chunk)
    ]


def local_labels(
    judge: Judge, requests: Sequence[Sequence[JudgeRequest]]
) -> list[tuple[tuple[int, ...] | None, int]]:
    """Scores of all candidates of each turn, and how many of its requests could not be read.

    One call of the judge for all turns. A turn with an unread request has no scores at all
    [code]: scores never move from one chunk or turn to another.

    Args:
        judge: Scores.
        requests: For each turn its chunks.

    Raises:
        ValueError: The judge gives more or fewer answers than it had requests.
    """
    flat = [request for chunks in requests for request in chunks]
    answers = judge.scores(flat)
    if len(answers) != len(flat):
        raise ValueError(f"the judge gave {len(answers)} answers to {len(flat)} requests")
    read = [
        answer if answer is not None and len(answer) == len(request.passages) else None
        for request, answer in zip(flat, answers, strict=True)
    ]
    found: list[tuple[tuple[int, ...] | None, int]] = []
    start = 0
    for chunks in requests:
        found.append(_joined(read[start : start + len(chunks)]))
        start += len(chunks)
    return found


def _joined(answers: Sequence[list[int] | None]) -> tuple[tuple[int, ...] | None, int]:
    scores = [answer for answer in answers if answer is not None]
    unread = len(answers) - len(scores)
    return (None if unread else tuple(score for one in scores for score in one)), unread

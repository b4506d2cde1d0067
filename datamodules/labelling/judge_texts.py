"""What a language model is asked as a judge, and how its answers are read (card, 2.4 and 4).

The prompts are our own words for what the card describes: an analyst who writes the fact that each
search was after, and a rater who compares passages and writes one number each. Reading is strict:
an answer that does not hold exactly what was asked for is no answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from datamodules.labelling.records import JudgeRequest, Trajectory
from datamodules.passages import Passage

FACT = "fact"
NOT_SURE = "Not Sure"
_FACT = re.compile(rf"<{FACT}>(.*?)</{FACT}>", re.DOTALL)
_NUMBERS = re.compile(r"[+-]?\d+(?:(?:\s*,\s*|\s+)[+-]?\d+)*")


def sub_answer_text(trajectory: Trajectory, transcript: str) -> str:
    """Asks for the fact behind each search of a trajectory.

    Args:
        trajectory: With at least one search.
        transcript: Its text, which may have been cut.
    """
    count = len(trajectory.turns)
    queries = "\n".join(f"{i}. {query}" for i, query in enumerate(trajectory.queries, start=1))
    return (
        "You analyse how an agent searched. The agent thinks, writes a query in <search> tags, "
        "reads the passages that come back in <information> tags, and at last writes its answer "
        "in <answer> tags.\n"
        "For every query, in order, write the one short fact that the query was after. The facts "
        f"must agree with a right answer to the question. Where that cannot be told, write "
        f"{NOT_SURE}; this is often so where the agent's answer is wrong.\n"
        f"Write exactly {count} lines of the form <{FACT}>the fact</{FACT}> and nothing else.\n\n"
        f"Question: {trajectory.question.text}\n"
        f"Right answers: {' | '.join(trajectory.question.answers)}\n\n"
        f"What the agent did:\n{transcript}\n\nQueries:\n{queries}\n"
    )


def relevance_text(request: JudgeRequest, passages: Sequence[str]) -> str:
    """Asks for one number a passage.

    Args:
        request: Query and, where known, its fact.
        passages: Texts as of ``passage_text``, which may have been cut.
    """
    count = len(passages)
    known = f"The fact that it is after: {request.sub_answer}\n" if request.sub_answer else ""
    listed = "\n".join(f"[{i}] {text}" for i, text in enumerate(passages, start=1))
    return (
        "You rate how well passages answer a search query. Compare the passages with each other "
        "first, then give each one a whole number from 0 to 100:\n"
        "81 to 100: it answers the query fully.\n"
        "61 to 80: it holds most of the answer.\n"
        "41 to 60: it holds a part of the answer.\n"
        "21 to 40: it shares words with the query, but does not answer it.\n"
        "0 to 20: it is off the subject or misleads.\n"
        f"Write exactly {count} numbers in the order of the passages, with spaces between, and "
        "nothing else.\n\n"
        f"Query: {request.query}\n{known}\nPassages:\n{listed}\n"
    )


def passage_text(passage: Passage) -> str:
    """A passage as the judge reads it.

    Args:
        passage: With or without a title.
    """
    return f"{passage.title}: {passage.text}" if passage.title else passage.text


def read_scores(text: str, count: int) -> list[int] | None:
    """``count`` whole numbers, clamped to 0 to 100; None for anything else.

    Args:
        text: What the judge wrote; a thinking part ahead is left out.
        count: Passages that it was shown.

    Example:
        >>> read_scores("90 130, -5", 3), read_scores("90 80", 3), read_scores("[1] 90", 1)
        ([90, 100, 0], None, None)
    """
    body = _behind_thinking(text)
    if body is None or not _NUMBERS.fullmatch(body):
        return None
    numbers = re.findall(r"[+-]?\d+", body)
    return [_clamped(number) for number in numbers] if len(numbers) == count else None


def _clamped(number: str) -> int:
    """Also of numbers with more digits than ``int`` reads."""
    sign, digits = number[0] == "-", number.lstrip("+-").lstrip("0") or "0"
    return 0 if sign else min(100, int(digits[:4]))


def read_facts(text: str, count: int) -> list[str] | None:
    """``count`` facts, "" for *not sure*; None where there are more, fewer, or broken tags.

    Args:
        text: What the judge wrote; a thinking part ahead is left out.
        count: Queries of the trajectory.

    Example:
        >>> read_facts("<fact>Oslo</fact> <fact>not sure.</fact>", 2)
        ['Oslo', '']
    """
    body = _behind_thinking(text)
    if body is None or not body.count(f"<{FACT}>") == body.count(f"</{FACT}>") == count:
        return None
    facts = [" ".join(fact.split()) for fact in _FACT.findall(body)]
    if len(facts) != count:
        return None
    return ["" if fact.strip(" .!").lower() == NOT_SURE.lower() else fact for fact in facts]


def _behind_thinking(text: str) -> str | None:
    """What follows a closed thinking part; None where it was never closed."""
    head, closed, rest = text.rpartition("</think>")
    if not closed and "<think>" in text:
        return None
    return rest.strip()

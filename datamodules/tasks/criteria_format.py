"""How a judge under criteria is asked, in text, and how its answers are written and read.

    criteria call    query -> JSON list of {"name", "meaning", "weight"}
    judgement call   query, criteria or none, texts A and B -> lines ``1. ... A=7 B=5``, and last
                     ``VERDICT: A`` or ``VERDICT: B``

What the two calls hold follows sections 2 and 4 of our UniCreative card [our choice: no source that
we could read gives the paper's prompts]; all words are ours. Thinking in front of an answer, up to
the last ``</think>``, is not read. Answers are data: nothing is evaluated, nothing raises, and both
size and depth of what is parsed are bounded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datamodules.sources import clean
from datamodules.tasks.base import Verdict
from datamodules.tasks.criteria import Criteria

SLOTS = ("A", "B")
MAX_ITEMS = 8  # criteria in a list, whatever the options say
MAX_CHARS = 40_000  # of an answer; some 10 thousand tokens
MAX_DEPTH = 4  # of the JSON list; a plain one has 2
MAX_TRIES = 64  # opening brackets that are looked at
NAME_CHARS, MEANING_CHARS = 60, 160  # kept of each: criteria share the prompt with the texts
_THOUGHT = "</think>"
_LAST = "Last line: `VERDICT: A` or `VERDICT: B`.\n\n"
# The letter ends its line: "VERDICT: A or B" and "VERDICT: A tie" are none.
_VERDICT = re.compile(r"\b(?i:verdict):[ \t*`]*([AB])[ \t\r.*`]*$", re.MULTILINE)
_NUMBER = re.compile(r"[ \t>*#-]{0,8}(\d{1,2})[.):]")
_SCORE = r"[ *]{0,3}[=:][ *]{0,3}(\d{1,2}(?:\.\d{1,2})?)"
_SCORES = re.compile(rf"\bA{_SCORE}(?:[ ]?/[ ]?10)?\W{{1,5}}(?:Text )?B{_SCORE}(?!\d)")
_MARKS = re.compile(r'\\.|["\[\]{}]', re.DOTALL)
# For demonstrations: they fit any query and show the grammar, no judging.
GENERIC_CRITERIA = (
    ("fit", "answers it"),
    ("tone", "suits the day"),
    ("clarity", "is easy to read"),
    ("order", "parts connect"),
    ("detail", "is concrete"),
    ("freshness", "is not worn"),
    ("feeling", "moves readers"),
    ("ending", "closes well"),
)
GENERIC_COMPARISONS = ("{0} fits better.", "{0} is stronger.", "{0} has fewer faults.")


@dataclass(frozen=True)
class WeightedCriteria(Criteria):
    """Criteria with what each counts.

    Args:
        weights: One a name, 0 or more, sum 1; () where nothing parses.
    """

    weights: tuple[float, ...] = ()


# ---- Criteria ------------------------------------------------------------------------------------


def ask_criteria(query: str, least: int, most: int) -> str:
    """The criteria call, as one text.

    Args:
        query: What texts are written for.
        least: Fewest criteria.
        most: Most criteria.
    """
    size = f"{least} to {most}" if least < most else f"{least}"
    shape = '[{"name": "...", "meaning": "one line", "weight": 0.5}, ...]'
    return (
        f"Texts will be written for the query below. Name {size} criteria by which to compare "
        f"them. Answer with a JSON list: {shape}. The weights sum to 1.\n\nQuery:\n{query}\n\n"
    )


def write_criteria(items: Sequence[tuple[str, str, float]]) -> str:
    """A legal answer to the criteria call, the inverse of ``parse_criteria``.

    Args:
        items: Name, meaning and weight of each.
    """
    rows = [{"name": name, "meaning": meaning, "weight": w} for name, meaning, w in items]
    return json.dumps(rows, ensure_ascii=False)


def list_criteria(items: Sequence[tuple[str, str, float]]) -> WeightedCriteria:
    """Criteria in their canonical form, a line each: ``1. name (0.3): meaning``.

    Args:
        items: Name, meaning and weight of each; a meaning may be "".

    Example:
        >>> list_criteria([("tone", "warm", 0.75), ("pace", "", 0.25)]).text
        '1. tone (0.75): warm\\n2. pace (0.25)'
    """
    lines = [
        f"{number}. {name} ({round(weight, 2):g})" + (f": {meaning}" if meaning else "")
        for number, (name, meaning, weight) in enumerate(items, start=1)
    ]
    names, weights = tuple(item[0] for item in items), tuple(item[2] for item in items)
    return WeightedCriteria("\n".join(lines), names, weights=weights)


def parse_criteria(text: str, least: int = 3, most: int = 6) -> WeightedCriteria:
    """Read an answer to the criteria call whose end token is already gone. Never raises.

    Rules [our choice]: the last JSON list of objects counts, in a code fence, in an object or
    between words. Names are needed, differ, and are cut to ``NAME_CHARS``; a meaning may be
    missing and is cut to ``MEANING_CHARS``. Weights are scaled to sum 1; where one of them is no
    number from 0 on, all are equal, as a good list should not be lost for its arithmetic.

    Args:
        text: What the model wrote.
        least: Fewest criteria.
        most: Most criteria.
    """
    body = text[_answer_start(text) :]
    if len(body) > MAX_CHARS:
        return WeightedCriteria(error=f"{len(body)} characters, more than {MAX_CHARS}")
    rows = _last_list(body)
    if rows is None:
        return WeightedCriteria(error="no JSON list of objects")
    if not least <= len(rows) <= most:
        return WeightedCriteria(error=f"{len(rows)} criteria, not {least} to {most}")
    names = [_line(row.get("name"), NAME_CHARS) for row in rows]
    if not all(names):
        return WeightedCriteria(error=f"criterion {names.index('') + 1} has no name")
    if len({name.casefold() for name in names}) < len(names):
        return WeightedCriteria(error="two criteria have one name")
    meanings = [_line(row.get("meaning"), MEANING_CHARS) for row in rows]
    return list_criteria(list(zip(names, meanings, _weights(rows), strict=True)))


def _answer_start(text: str) -> int:
    """Where an answer begins: behind the thinking, if there is some that ends."""
    place = text.rfind(_THOUGHT)
    return 0 if place < 0 else place + len(_THOUGHT)


def _last_list(text: str) -> list[Mapping[str, Any]] | None:
    """The last JSON list of objects in a text of bounded size; None where there is none."""
    found = None
    start = text.find("[")
    for _ in range(MAX_TRIES):
        if start < 0:
            break
        end = _end_of_list(text, start)
        try:
            value = json.loads(text[start:end]) if end else None
        except (ValueError, RecursionError):
            value = None
        is_list = isinstance(value, list) and value and all(isinstance(v, dict) for v in value)
        found = value if is_list else found
        start = text.find("[", end if is_list and end else start + 1)
    return found


def _end_of_list(text: str, start: int) -> int | None:
    """The place behind the bracket that closes the one at ``start``; None for none, or too deep."""
    depth, in_string = 0, False
    for mark in _MARKS.finditer(text, start):
        sign = mark.group()
        if sign == '"':
            in_string = not in_string
        elif len(sign) == 1 and not in_string:
            depth += 1 if sign in "[{" else -1
            if depth > MAX_DEPTH:
                return None
            if depth == 0:
                return mark.end()
    return None


def _line(value: Any, bound: int) -> str:
    """A text as one line of so many characters; "" for what is no text."""
    return " ".join(clean(value).split())[:bound].strip() if isinstance(value, str) else ""


def _weights(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    equal = [1 / len(rows)] * len(rows)
    values = [row.get("weight") for row in rows]
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in values):
        return equal
    try:
        numbers = [float(value) for value in values]  # type: ignore[arg-type]
    except OverflowError:
        return equal
    total = sum(numbers)
    is_usable = math.isfinite(total) and total > 0 and min(numbers) >= 0
    return [number / total for number in numbers] if is_usable else equal


# ---- Judgements ----------------------------------------------------------------------------------


def ask_judgement(query: str, texts: Sequence[str], criteria: str | None) -> str:
    """The judgement call, as one text.

    Args:
        query: What both texts were written for.
        texts: Text A and text B.
        criteria: As in ``Criteria.text``; None asks without.
    """
    how = (
        "Which text is better? Compare them in one line with scores from 1 to 10"
        if criteria is None
        else "Which text is better by the criteria? For each write a line with its number, a short "
        "comparison and scores from 1 to 10"
    )
    listed = "" if criteria is None else f"Criteria:\n{criteria}\n\n"
    return (
        f"{how}: `1. comparison A=x B=y`. {_LAST}Query:\n{query}\n\n{listed}"
        f"Text A:\n{texts[0]}\n\nText B:\n{texts[1]}\n\n"
    )


def write_judgement(lines: Sequence[tuple[str, int, int]], winner: int) -> str:
    """A legal answer to the judgement call, the inverse of ``parse_judgement``.

    Args:
        lines: Comparison, score of A and score of B, one a criterion.
        winner: 1 for A or 2 for B.
    """
    rows = [f"{n}. {why} A={a} B={b}" for n, (why, a, b) in enumerate(lines, start=1)]
    return "\n".join([*rows, f"VERDICT: {SLOTS[winner - 1]}"])


def find_verdict(text: str) -> re.Match[str] | None:
    """The last verdict of an answer, its letter as group 1; None where none is written.

    Args:
        text: What the model wrote.
    """
    found = list(_VERDICT.finditer(text, _answer_start(text)))
    return found[-1] if found else None


def parse_judgement(text: str, weights: Sequence[float] = ()) -> Verdict:
    """Read an answer to the judgement call whose end token is already gone. Never raises.

    The last verdict counts. Where there is none, the weighted difference of the scores decides
    [our choice, card section 4], if it is not 0 and every criterion has scores [our choice: half a
    list would decide by what was left out]. The analysis is what stands before the verdict.

    Args:
        text: What the model wrote.
        weights: Of the criteria in their order; () weighs all lines that have scores alike.

    Example:
        >>> parse_judgement("1. A is warmer. A=8 B=5\\nVERDICT: A").winner
        1
    """
    start = _answer_start(text)
    if len(text) - start > MAX_CHARS:
        return Verdict(None, error=f"{len(text) - start} characters, more than {MAX_CHARS}")
    found = find_verdict(text)
    if found is not None:
        return Verdict(SLOTS.index(found.group(1)) + 1, text[start : found.start()].strip())
    body = text[start:].strip()
    scores = read_scores(body)
    used = dict(enumerate(weights, start=1)) or dict.fromkeys(scores, 1.0)
    if not used or not set(used) <= set(scores):
        return Verdict(None, error="no line 'VERDICT: A' or 'VERDICT: B', nor all the scores")
    gap = sum(weight * (scores[n][0] - scores[n][1]) for n, weight in used.items())
    if abs(gap) < 1e-9:
        return Verdict(None, error="no verdict, and the scores are even")
    return Verdict(1 if gap > 0 else 2, body)


def read_scores(text: str) -> dict[int, tuple[float, float]]:
    """Scores of A and B by the number of their criterion; of two lines the later one counts.

    Args:
        text: Lines such as ``2. A is clearer. A=8 B=6``; ``A: 8/10, B: 6/10`` reads alike.
    """
    found = {}
    for line in text.splitlines():
        number = _NUMBER.match(line)
        pairs = _SCORES.findall(line) if number else []
        if number and pairs:
            first, second = (float(score) for score in pairs[-1])
            if min(first, second) >= 1 and max(first, second) <= 10:
                found[int(number.group(1))] = (first, second)
    return found

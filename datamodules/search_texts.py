"""Texts of the search protocol: tags, observations, and what a retriever is asked.

    agent      ... <search> query </search>
    observed   <information> Doc 1(Title: t) body ... </information>
    agent      ... <answer> answer </answer>

Word-level tokenizers (``SearchTask.spaced``) see the same with spaces around the punctuation of
the protocol; titles and bodies of such tasks are single words already. Pure functions; the
protocol is that of the released code [code: reasoning_pipeline.py], the words are ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from datamodules.passages import Passage

SEARCH, END_SEARCH = "<search>", "</search>"
ANSWER, END_ANSWER = "<answer>", "</answer>"
INFORMATION, END_INFORMATION = "<information>", "</information>"
THINK, END_THINK = "<think>", "</think>"

#: Words of the note that follows an invalid action, for word-level tokenizers.
INVALID_WORDS = ("invalid", "try", "again")
INVALID = "\nThat was neither a search nor an answer: close one of these tags and try again.\n"

#: Between the question and queries of one retriever input; BERT tokenizers read a special token.
SEPARATOR = " [SEP] "

Form = Literal["query", "question_query", "question_history_query", "history_query"]
FORMS: tuple[str, ...] = get_args(Form)

_CLOSED = re.compile(f"{END_SEARCH}|{END_ANSWER}")


@dataclass(frozen=True)
class Piece:
    """What an agent has written since the last observation, read.

    Args:
        kind: ``search``, ``answer``, or ``invalid``.
        content: Query or answer, stripped; "" where invalid.
        is_unclosed: Invalid: a search tag was opened and never closed.
        is_empty: Invalid: a search tag was closed and holds no query (or was never opened).
    """

    kind: Literal["search", "answer", "invalid"]
    content: str = ""
    is_unclosed: bool = False
    is_empty: bool = False


def is_closed(text: str) -> bool:
    """Whether the text holds a closing tag of a search or an answer.

    Example:
        >>> is_closed("<think> a > b </think>"), is_closed("<search> q </search>")
        (False, True)
    """
    return _CLOSED.search(text) is not None


def read_piece(text: str) -> Piece:
    """Read one piece: the first closing tag decides, and the last opening tag before it.

    An empty answer is an answer; an empty query is invalid [our choice].

    Args:
        text: What the agent wrote since the last observation.

    Example:
        >>> read_piece("hm <search> where was ann born </search>").content
        'where was ann born'
        >>> read_piece("<search> where was").is_unclosed
        True
    """
    closed = _CLOSED.search(text)
    if closed is None:
        return Piece("invalid", is_unclosed=SEARCH in text)
    before, is_search = text[: closed.start()], closed.group() == END_SEARCH
    _, opened, content = before.rpartition(SEARCH if is_search else ANSWER)
    content = content.strip()
    if opened and (content or not is_search):
        return Piece("search" if is_search else "answer", content)
    return Piece("invalid", is_unclosed=not is_search and SEARCH in before, is_empty=is_search)


def last_answer(text: str) -> str | None:
    """What the last closed ``<answer>`` holds, stripped; None where there is none.

    Args:
        text: Of the agent alone: a passage may hold anything.

    Example:
        >>> last_answer("<answer> no </answer> or <answer> peru </answer>")
        'peru'
    """
    before, closed, _ = text.rpartition(END_ANSWER)
    _, opened, content = before.rpartition(ANSWER)
    return content.strip() if closed and opened else None


def render_passages(passages: Sequence[Passage], spaced: bool) -> str:
    """Passages as the agent reads them, numbered from 1 [code: reasoning_pipeline.py].

    Args:
        passages: The best first. One without a title is shown without one [our choice].
        spaced: Single words on one line, else one line a passage.

    Example:
        >>> render_passages([Passage("a", "ann", "was born in rome")], spaced=False)
        'Doc 1(Title: ann) was born in rome'
        >>> render_passages([Passage("a", "ann", "was born in rome")], spaced=True)
        'Doc 1 ( Title : ann ) was born in rome'
    """
    lines = []
    for number, passage in enumerate(passages, start=1):
        head = f"Doc {number}"
        if passage.title:
            title = f" ( Title : {passage.title} )" if spaced else f"(Title: {passage.title})"
            head += title
        line = f"{head} {passage.text}"
        lines.append(" ".join(line.split()) if spaced else line.strip())
    return (" " if spaced else "\n").join(lines)


def information(passages: Sequence[Passage], spaced: bool) -> str:
    """The observation behind a search.

    Args:
        passages: What was found, the best first.
        spaced: As in ``render_passages``.

    Example:
        >>> information([Passage("a", "", "rome")], spaced=True)
        '<information> Doc 1 rome </information>'
    """
    body = render_passages(passages, spaced)
    if spaced:
        return " ".join(part for part in (INFORMATION, body, END_INFORMATION) if part)
    return f"\n{INFORMATION}\n{body}\n{END_INFORMATION}\n"


def invalid_note(spaced: bool) -> str:
    """The observation behind an invalid action."""
    return " ".join(INVALID_WORDS) if spaced else INVALID


def words_of_protocol(max_docs: int) -> list[str]:
    """Words that a word-level vocabulary needs for the protocol itself.

    Args:
        max_docs: Passages that are shown at most.

    Example:
        >>> words_of_protocol(2)[8:15]
        ['Doc', 'Title', '(', ':', ')', '1', '2']
    """
    tags = [SEARCH, END_SEARCH, ANSWER, END_ANSWER, INFORMATION, END_INFORMATION, THINK, END_THINK]
    numbers = [str(number) for number in range(1, max_docs + 1)]
    return [*tags, "Doc", "Title", "(", ":", ")", *numbers, *INVALID_WORDS]


def retriever_input(
    form: str, question: str, queries: Sequence[str], separator: str = SEPARATOR
) -> str:
    """What the retriever is asked.

    Args:
        form: ``query`` or ``question_query`` [code], ``question_history_query`` or
            ``history_query`` [card, section 6].
        question: The whole question.
        queries: All so far; the last one is the current one.
        separator: Between parts [code: " [SEP] "].

    Raises:
        ValueError: Unknown form or no query.

    Example:
        >>> retriever_input("question_query", "who?", ["a", "b"])
        'who? [SEP] b'
    """
    return separator.join(_parts(form, question, queries))


def fit_input(
    form: str,
    question: str,
    queries: Sequence[str],
    count_tokens: Callable[[str], int],
    max_tokens: int,
    separator: str = SEPARATOR,
) -> str:
    """``retriever_input`` within a bound of tokens: the current query survives [card, 8.5].

    Words are dropped from the end of the question first, then of earlier queries, the oldest
    first; a query that is too long alone stays whole [our choice].

    Args:
        form: As in ``retriever_input``.
        question: The whole question.
        queries: All so far; the last one is the current one.
        count_tokens: Tokens of a text, special ones included.
        max_tokens: Bound of the whole input.
        separator: Between parts; gone with a part of which nothing is left.

    Raises:
        ValueError: Unknown form, no query or a bound below 1.

    Example:
        >>> fit_input("question_query", "a b c", ["q"], lambda text: len(text.split()), 4)
        'a b [SEP] q'
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    parts = _parts(form, question, queries)

    def joined(index: int, words: list[str]) -> str:
        cut = [" ".join(words)] if words else []
        return separator.join([*cut, *parts[index + 1 :]])

    if count_tokens(separator.join(parts)) <= max_tokens:
        return separator.join(parts)
    for index, part in enumerate(parts[:-1]):
        words = part.split()
        low, high = -1, len(words) - 1  # most words that fit; -1 for a whole part that does not
        while low < high:
            middle = (low + high + 1) // 2
            is_short = count_tokens(joined(index, words[:middle])) <= max_tokens
            low, high = (middle, high) if is_short else (low, middle - 1)
        if low >= 0:
            return joined(index, words[:low])
    return parts[-1]


def _parts(form: str, question: str, queries: Sequence[str]) -> list[str]:
    if form not in FORMS:
        raise ValueError(f"input={form!r} is unknown; use one of {', '.join(FORMS)}")
    if not queries:
        raise ValueError("there is no query to search for")
    history = list(queries[:-1]) if "history" in form else []
    return [*([question] if form.startswith("question") else []), *history, queries[-1]]

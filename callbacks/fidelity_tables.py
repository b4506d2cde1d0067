"""Texts and what came back of them, side by side with changed words marked."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from lightning_modules.functional.fidelity_pictures import Word, changed_first, word_diff
from lightning_modules.functional.outcomes import SetOutcome

#: Colours of marked words, and what each says in Markdown, which knows no colours.
INK = {"same": "#333333", "gone": "#0072b2", "new": "#d55e00", "prior": "#c2338a"}
LEGEND = "blue: gone from the source; orange: new; pink: the prior's value instead of the source's"
_MARKDOWN = {"same": "{}", "gone": "*{}*", "new": "**{}**", "prior": "**{}** (prior)"}
_ENTITIES = {"*": "&#42;", "_": "&#95;", "`": "&#96;", "|": "&#124;", "[": "&#91;", "\\": "&#92;"}

Outcomes = Mapping[str, SetOutcome]


class Row(NamedTuple):
    """A text of the table.

    Args:
        name: Set and place.
        source: Its words, marked.
        decoded: The words that came back, marked.
    """

    name: str
    source: list[Word]
    decoded: list[Word]


def table_rows(outcomes: Outcomes, count: int) -> list[Row]:
    """Source and reconstruction of the first rows of each set, those that changed first.

    Args:
        outcomes: Set -> rows.
        count: Of each set at most.
    """
    return [
        Row(
            f"{name} {place}",
            *word_diff(one.contexts[place], one.decoded[place], one.values[place]),
        )
        for name, one in outcomes.items()
        for place in changed_first(one, count)
    ]


def markdown_table(rows: Sequence[Row]) -> str:
    """The texts as TensorBoard shows them: it drops colours, so marks are bold and italic.

    Args:
        rows: Of ``table_rows``.

    Returns:
        A Markdown table: italic words are gone, bold ones new, those of the prior say so.

    Example:
        >>> row = Row("cf 0", [("white", "gone")], [("red", "prior")])
        >>> markdown_table([row]).splitlines()[-1]
        '| cf 0 | *white* | **red** (prior) |'
    """
    head = ["| set | source (*gone*) | reconstruction (**new**) |", "| --- | --- | --- |"]
    return "\n".join(
        head
        + [
            f"| {_escape(row.name)} | {_joined(row.source, _MARKDOWN, _escape)} "
            f"| {_joined(row.decoded, _MARKDOWN, _escape)} |"
            for row in rows
        ]
    )


def html_table(rows: Sequence[Row]) -> str:
    """A page with the same table in colours.

    Args:
        rows: Of ``table_rows``.
    """
    spans = {mark: f'<span class="{mark}">{{}}</span>' for mark in INK} | {"same": "{}"}
    style = "".join(f".{mark}{{color:{ink};font-weight:bold}}" for mark, ink in INK.items())
    body = "\n".join(
        f"<tr><td>{html.escape(row.name)}</td><td>{_joined(row.source, spans, html.escape)}</td>"
        f"<td>{_joined(row.decoded, spans, html.escape)}</td></tr>"
        for row in rows
    )
    return (
        f'<!doctype html>\n<meta charset="utf-8">\n<title>Texts</title>\n<style>{style}'
        f"td{{vertical-align:top;padding:0.2em 0.8em}}</style>\n<p>{LEGEND}</p>\n<table>\n"
        f"<tr><th>set</th><th>source</th><th>reconstruction</th></tr>\n{body}\n</table>\n"
    )


def _joined(words: Sequence[Word], marks: Mapping[str, str], escape: Callable[[str], str]) -> str:
    return " ".join(marks[mark].format(escape(word)) for word, mark in words)


def _escape(word: str) -> str:
    for mark, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), *_ENTITIES.items()):
        word = word.replace(mark, entity)
    return word

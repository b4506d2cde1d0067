"""Preference pairs from rows: question, two responses and, where there is one, a label.

``read_preference_pairs`` knows the shapes in which people keep comparisons, ``sources`` the files.
Nothing here is executed or evaluated: rows are data. All errors are ``ValueError``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datamodules.prompt_rows import BadRowError, count_skipped, tolerate, unique_uid
from datamodules.sources import (
    BadRowPolicy,
    Row,
    clean,
    find_column,
    nearest,
    raise_problems,
    scan_rows,
    stable_hash,
)
from datamodules.tasks.base import Pair

_PROMPT_NAMES = ("prompt", "question", "query", "instruction", "input", "context")
COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "question": ("question", *(name for name in _PROMPT_NAMES if name != "question")),
    "prompt": _PROMPT_NAMES,
    "response_1": ("response_1", "response_A", "response_a", "response1"),
    "response_2": ("response_2", "response_B", "response_b", "response2"),
    "label": ("label", "overall_preference"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "uid": ("pair_id", "uid", "id", "prompt_id"),
}
_LABELS = {"A>B": 1, "A>>B": 1, "A": 1, "1": 1, "B>A": 2, "B>>A": 2, "B": 2, "2": 2}
_LABELS_HELP = "use A>B / B>A, A / B, or 1 / 2 (the slot of the better response)"
# HelpSteer3's column: -3 (response 1 much better) to 3 (response 2 much better), 0 a tie.
_SIGNED_LABEL = "overall_preference"

_CANDIDATES = ("response_1", "response_2", "chosen", "rejected")
_Messages = list[tuple[str, str]]


def _resolve_columns(
    present: Sequence[str], chosen: Mapping[str, str | None], path: str | Path, labelled: bool
) -> dict[str, str]:
    """Role to column, for the shape that this file has: slots with a label, or chosen/rejected."""
    for role in chosen:
        if role not in COLUMN_NAMES:
            raise ValueError(
                f"data.columns.{role}: no such role{nearest(role, COLUMN_NAMES)} allowed are "
                f"{', '.join(COLUMN_NAMES)}"
            )

    def find(role: str) -> str:
        key, names = f"data.columns.{role}", COLUMN_NAMES[role]
        taken = [name for other in COLUMN_NAMES.values() for name in other]
        return find_column(present, names, key=key, path=path, chosen=chosen.get(role), taken=taken)

    def has(role: str) -> bool:
        return bool(chosen.get(role)) or any(name in present for name in COLUMN_NAMES[role])

    shapes = (("response_1", "response_2"), ("chosen", "rejected"))
    # Configured roles decide first, then whichever shape has more of its columns.
    scores = [[sum(map(bool, map(chosen.get, shape))), sum(map(has, shape))] for shape in shapes]
    if scores[0] == scores[1]:
        what = "no preference pairs" if not scores[0][1] else "two kinds of preference pairs"
        raise ValueError(
            f"{path}: the columns {', '.join(present)} hold {what}; name those to read with "
            "data.columns.question, response_1, response_2, label, or with data.columns.prompt, "
            "chosen, rejected"
        )
    shape = shapes[0] if scores[0] > scores[1] else shapes[1]
    roles = {role: find(role) for role in shape}
    ask = "question" if chosen.get("question") or shape == shapes[0] else "prompt"
    ask = "prompt" if chosen.get("prompt") else ask
    if has(ask) or shape == shapes[0]:
        roles["question"] = find(ask)
    if shape == shapes[0] and (labelled or has("label")):
        roles["label"] = find("label")
    if has("uid"):
        roles["uid"] = find("uid")
    return roles


def _messages(value: Any, column: str) -> _Messages | None:
    """A chat as (role, content) pairs; None where the value is no chat."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return None
    chat = []
    for message in value:
        role, content = (message.get("role"), message.get("content")) if message else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRowError("not_text", column, 'needs messages {"role": ..., "content": text}')
        chat.append((role, content))
    return chat


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _field(row: Row, column: str) -> Any:
    value = row.values.get(column)
    if _absent(value):
        close = nearest(column, [name for name in row.values if name != column])
        has = ", ".join(row.values) or "nothing"
        raise BadRowError("missing_field", column, f"is missing{close or ';'} the row has {has}")
    return value


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        kind = type(value).__name__
        raise BadRowError("not_text", column, f"is a {kind}; text or chat messages are needed")
    if not value.strip():
        raise BadRowError("empty_text", column, "is empty; text is needed")
    if clean(value) != value:
        raise BadRowError("bad_text", column, "holds lone surrogates, which are no valid text")
    return value


def _render_chat(chat: _Messages) -> str:
    return "\n".join(f"{role}: {content}" for role, content in chat)


def _answer(tail: _Messages, column: str) -> str:
    """What a candidate adds to the shared beginning: one answer, or several turns rendered."""
    if tail[-1][0] != "assistant":
        raise BadRowError("not_text", column, "does not end with a message of the assistant")
    return _text(tail[-1][1] if len(tail) == 1 else _render_chat(tail), column)


def _compare(row: Row, roles: Mapping[str, str], first: Any, second: Any) -> tuple[str, str, str]:
    """Question and both candidates as text, whether they came as text or as chats."""
    names = [roles[role] for role in _CANDIDATES if role in roles]
    ask = roles.get("question", "prompt")
    asked = _field(row, ask) if "question" in roles else None
    prompt, one, two = (
        _messages(asked, ask),
        _messages(first, names[0]),
        _messages(second, names[1]),
    )
    if one is not None and two is not None:
        size = 0
        while size < min(len(one), len(two)) - 1 and one[size] == two[size]:
            size += 1
        shared = one[:size]
        if prompt is not None:
            chat = shared if shared[: len(prompt)] == prompt else prompt + shared
            question = _render_chat(chat)
        elif asked is not None and not any(text == asked for _, text in shared):
            question = "\n".join([_text(asked, ask), *([_render_chat(shared)] if shared else [])])
        elif shared:
            question = _render_chat(shared)
        else:
            raise BadRowError("missing_field", ask, "is missing and the chats share no beginning")
        answers = _answer(one[size:], names[0]), _answer(two[size:], names[1])
    elif asked is None:
        raise BadRowError("missing_field", ask, "is missing; set data.columns.prompt=<column>")
    else:
        question = _text(asked, ask) if prompt is None else _render_chat(prompt)
        answers = _text(first, names[0]), _text(second, names[1])
    if answers[0].strip() == answers[1].strip():
        message = f"equals field {names[1]!r}: a comparison needs two different responses"
        raise BadRowError("equal_responses", names[0], message)
    return _text(question, ask), *answers


def _alternatives(row: Row, column: str) -> tuple[list[Any], bool]:
    """Candidates of one field and whether it is a list of texts or of chats; all else is one."""
    value = _field(row, column)
    if isinstance(value, list) and _messages(value, column) is None:
        if not value:
            raise BadRowError("empty_text", column, "is an empty list; responses are needed")
        return value, True
    return [value], False


def _show(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 40 else repr(value)[:36] + " ..."


def _number(value: Any) -> float | None:
    """Labels that are numbers or booleans, in whatever clothes."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+(\.\d+)?\s*", value):
        return float(value)
    if isinstance(value, (bool, int, float)) and not _absent(value):
        return float(min(max(value, -9), 9))
    return None


def _refuse_scales(rows: Sequence[Row], column: str, path: str | Path) -> None:
    """Numbers other than 1 and 2 make all labels of a file ambiguous, so skipping is no way out."""
    for row in rows:
        value = row.values.get(column)
        number = _number(value)
        if number is not None and (isinstance(value, bool) or number not in (1, 2)):
            raise ValueError(
                f"{row.where}: field {column!r} is {_show(value)}: in numeric labels only 1 and 2 "
                f"are unambiguous (0/1 may mean either side); {_LABELS_HELP}"
            )


def _label(value: Any, column: str) -> int | None:
    if _absent(value) or value == "":
        return None
    number = _number(value)
    if column == _SIGNED_LABEL and number is not None and not isinstance(value, bool):
        if number == 0:
            raise BadRowError("tie", column, "is 0, a tie; a verdict for one side is needed")
        return 1 if number < 0 else 2
    text = str(int(number)) if number in (1, 2) else str(value).strip().upper().replace(" ", "")
    if text in ("A=B", "B=A", "TIE"):
        raise BadRowError("tie", column, f"is {_show(value)}, a tie; {_LABELS_HELP}")
    if text not in _LABELS:
        raise BadRowError("bad_label", column, f"is {_show(value)}, neither side; {_LABELS_HELP}")
    return _LABELS[text]


def _row_pairs(row: Row, roles: Mapping[str, str], labelled: bool) -> list[Pair]:
    """All pairs of one row, with the row's own uid or a hash of its content."""
    scalars = {
        key: clean(value) if isinstance(value, str) else value
        for key, value in row.values.items()
        if key not in roles.values() and isinstance(value, (str, int, float)) and not _absent(value)
    }
    uid = row.values.get(roles["uid"]) if "uid" in roles else None
    drafts: list[tuple[str, tuple[str, str, str], int | None, dict[str, int]]] = []
    if "response_1" in roles:
        fields = _field(row, roles["response_1"]), _field(row, roles["response_2"])
        column = roles.get("label", "")
        label = _label(row.values.get(column), column) if column else None
        if labelled and label is None:
            _field(row, column)
            raise BadRowError("bad_label", column, f"is empty; {_LABELS_HELP}")
        drafts.append(("", _compare(row, roles, *fields), label, {}))
    else:
        better, has_better = _alternatives(row, roles["chosen"])
        worse, has_worse = _alternatives(row, roles["rejected"])
        for i, first in enumerate(better):
            for j, second in enumerate(worse):
                several = has_better or has_worse
                suffix = f"/c{i}r{j}" if several else ""
                indexes = {"chosen_index": i, "rejected_index": j} if several else {}
                drafts.append((suffix, _compare(row, roles, first, second), None, indexes))
    if isinstance(uid, (str, int, float)) and not _absent(uid) and str(uid).strip():
        base = clean(str(uid))
    else:
        base = f"{stable_hash(*(text for draft in drafts for text in draft[1])):016x}"
    kept = {**scalars, "row_uid": base, "where": row.where}
    return [
        Pair(base + suffix, texts[0], (texts[1], texts[2]), label, extra={**kept, **indexes})
        for suffix, texts, label, indexes in drafts
    ]


def _finish(pair: Pair, seen: set[str], ranked: bool) -> Pair:
    """Make the uid unique and, where the source ranks instead of labelling, draw the slot."""
    pair = replace(pair, uid=unique_uid(pair.uid, seen))
    if not ranked:
        return pair
    slot = 1 + stable_hash("slot", pair.uid) % 2
    first, second = pair.responses
    return replace(pair, label=slot, responses=(first, second) if slot == 1 else (second, first))


def read_preference_pairs(
    path: str | Path,
    *,
    columns: Mapping[str, str | None] | None = None,
    format: str = "auto",
    split: str | None = None,
    on_bad_row: BadRowPolicy = "error",
    max_bad_share: float = 0.0,
    label_required: bool = True,
) -> tuple[list[Pair], dict[str, int]]:
    """Comparisons of a file, its shape told by its columns, and how many rows went where.

    Shapes: question, two responses and a label (JudgeBench); prompt, chosen and rejected as text
    (RewardBench), as lists (RM-Bench: every chosen against every rejected) or as chat messages.
    Where chosen and rejected are whole conversations, what they share is the question. The slot
    of a chosen response follows from a hash of the uid, so labels are balanced and stable.

    Args:
        path: As in ``scan_rows``.
        columns: Role (a key of ``COLUMN_NAMES``) to column; None finds the usual names.
        format: As in ``scan_rows``.
        split: As in ``scan_rows``.
        on_bad_row: ``error`` names up to five bad rows, ``skip`` counts them by reason.
        max_bad_share: Share of rows that ``error`` leaves out, with a count and a warning.
        label_required: False lets the label be absent, as for prediction.

    Returns:
        The pairs in file order (``extra`` keeps the other scalar columns, ``row_uid`` and
        ``where``) and counts: ``rows``, ``pairs``, ``skipped``, ``skipped/<reason>``.

    Raises:
        ValueError: Missing columns, unusable rows, ambiguous numeric labels, or no usable row.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"data.task.on_bad_row={on_bad_row!r}: allowed are error, skip")
    rows, problems = scan_rows(path, format=format, split=split)
    if not rows:
        raise_problems(path, problems, "there is no usable row")
    read = len(rows) + len(problems)
    present = list(dict.fromkeys(name for row in rows for name in row.values))
    roles = _resolve_columns(present, columns or {}, path, label_required)
    if "label" in roles and roles["label"] != _SIGNED_LABEL:
        _refuse_scales(rows, roles["label"], path)
    pairs: list[Pair] = []
    seen: set[str] = set()
    for row in rows:
        try:
            made = _row_pairs(row, roles, label_required)
        except BadRowError as error:
            problems.append(error.problem(row))
        else:
            pairs += [_finish(pair, seen, "chosen" in roles) for pair in made]
    if not pairs:
        raise_problems(path, problems, "there is no usable row")
    if on_bad_row == "error":
        tolerate(path, problems, read, max_bad_share, stacklevel=3)
    return pairs, {"rows": read, "pairs": len(pairs), **count_skipped(problems)}

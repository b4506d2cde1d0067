"""Prompts from files: one row one prompt, with whatever its verifier needs.

``PromptFile`` reads rows into the records of a task and splits them; ``prompt_writer`` turns texts
into token ids. Preference pairs have shapes of their own (``preference_rows``). Rows are data:
nothing here is executed or evaluated. All errors are ``ValueError``.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from datamodules.row_options import RowOptions
from datamodules.sources import (
    MAX_SHOWN,
    Problem,
    Row,
    clean,
    find_column,
    nearest,
    raise_problems,
    scan_rows,
    stable_hash,
)
from datamodules.tasks.base import Split

Record = TypeVar("Record")


@dataclass(frozen=True)
class Role:
    """What a column is for.

    Args:
        names: Usual column names, best first.
        is_required: Whether every row needs a value.
        is_label: Whether it may be absent where nothing is scored (split ``predict``).
    """

    names: tuple[str, ...]
    is_required: bool = True
    is_label: bool = False


#: Where a row's own identity may stand; ``PromptFile`` knows this role by itself.
UID = Role(("uid", "unique_id", "id", "prompt_id"), is_required=False)


class BadRowError(Exception):
    """One row is unusable. Made by ``Fields.bad``, raised by ``make_record``.

    Args:
        reason: Short name under which such rows are counted.
        column: The field.
        message: What is wrong with it.
    """

    def __init__(self, reason: str, column: str, message: str) -> None:
        super().__init__(reason, column, message)
        self.reason, self.column, self.message = reason, column, message

    def problem(self, row: Row) -> Problem:
        """The same with file and line.

        Args:
            row: The row.
        """
        return Problem(self.reason, f"{row.where}: field {self.column!r} {self.message}")


@dataclass(frozen=True)
class Fields:
    """One row by roles: what ``make_record`` gets.

    Args:
        row: The row.
        columns: Role to column, for the roles that this file has.
        uid: Identity of the record, unique in all files of a task.
        is_scored: Whether labels are needed: False for the split ``predict``.
    """

    row: Row
    columns: Mapping[str, str]
    uid: str = ""
    is_scored: bool = True

    @property
    def where(self) -> str:
        """``file:line``."""
        return self.row.where

    def bad(self, role: str, reason: str, message: str) -> BadRowError:
        """The error to raise for an unusable field.

        Args:
            role: Whose field it is.
            reason: Short name under which such rows are counted, e.g. ``no_answer``.
            message: What was found and what would work; file, line and field come by themselves.
        """
        return BadRowError(reason, self.columns.get(role, role), message)

    def has(self, role: str) -> bool:
        """Whether the row has a value for a role."""
        value = self.row.values.get(self.columns.get(role, ""))
        return not (value is None or (isinstance(value, float) and math.isnan(value)))

    def value(self, role: str) -> Any:
        """The value of a role.

        Raises:
            BadRowError: There is none.
        """
        if not self.has(role):
            has = ", ".join(self.row.values) or "nothing"
            raise self.bad(role, "missing_field", f"is missing; the row has {has}")
        return self.row.values[self.columns[role]]

    def text(self, role: str, *, numbers: bool = False) -> str:
        """The value of a role as text that is not blank.

        Args:
            role: Which.
            numbers: Take numbers too, as they are written.

        Raises:
            BadRowError: There is none, it is no text, or it is blank.
        """
        value = self.value(role)
        if numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise self.bad(role, "not_text", f"is a {type(value).__name__}; text is needed")
        if not value.strip():
            raise self.bad(role, "empty_text", "is empty; text is needed")
        if clean(value) != value:
            raise self.bad(role, "bad_text", "holds lone surrogates, which are no valid text")
        return value


class PromptFile(RowOptions, Generic[Record]):
    """Records of a file or data set, split by a hash or by files of their own.

    Splits go by a key, so rows that ask the same stay on one side, in whatever order and number
    the rows stand [our choice]. The split ``predict`` is the whole main
    file in its order, with or without labels. Nothing is read before a split is asked for.

    ``counts`` says what became of every row: ``<source>/rows|records|skipped[/<reason>]`` with
    source ``main``, ``val``, ``test`` or ``predict``; records a split; ``overlap``, training
    records whose key also stands in a validation or test file of its own.

    Args:
        path: As in ``RowOptions``.
        roles: What to read, the question first.
        make_record: Makes the record of a row; raises ``Fields.bad`` where it cannot.
        key_of: What a record asks, as text; None takes the value of the first role.
        **options: Of ``RowOptions``.

    Raises:
        ValueError: A value is not allowed; all such values are named at once.

    Example:
        >>> roles = {"question": Role(("question",)), "answer": Role(("answer",), is_label=True)}
        >>> file = PromptFile("x.jsonl", roles=roles, make_record=lambda f: f.text("question"))
    """

    def __init__(
        self,
        path: str,
        *,
        roles: Mapping[str, Role],
        make_record: Callable[[Fields], Record],
        key_of: Callable[[Record], str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path=path, **options)
        self.roles, self.make_record = dict(roles) | {"uid": UID}, make_record
        self.key_of = key_of
        self.counts: Counter[str] = Counter()
        self._records: dict[Split, list[Record]] = {}
        self._check()

    def _check(self) -> None:
        problems = [
            f"data.task.columns.{role}: no such role{nearest(role, self.roles)}; allowed are "
            f"{', '.join(self.roles)}"
            for role in self.columns
            if role not in self.roles
        ]
        problems += self.share_problems()
        if self.on_bad_row not in ("error", "skip"):
            problems.append(f"data.task.on_bad_row={self.on_bad_row!r}: allowed are error, skip")
        if not 0 <= self.max_bad_share <= 1:
            problems.append(f"data.task.max_bad_share={self.max_bad_share}: a share from 0 to 1")
        problems += self.path_problems()
        if problems:
            raise ValueError("\n".join(problems))

    def records(self, split: Split) -> list[Record]:
        """All records of a split, in file order; read once.

        Args:
            split: ``train``, ``val``, ``test``, or ``predict`` for the whole main file.

        Raises:
            ValueError: The file cannot be read, or no row is usable.
        """
        if split not in self._records:
            if split == "predict":
                rows = self._read("predict", self.path, self.split, set())
                self._records["predict"] = [record for record, _ in rows]
            else:
                self._read_all()
        return self._records[split]

    def _read_all(self) -> None:
        found: dict[Split, list[Record]] = {"train": [], "val": [], "test": []}
        seen: set[str] = set()
        rows = self._read("main", self.path, self.split, seen)
        trained = set()
        for record, key in rows:
            split = self.split_of(key)
            found[split].append(record)
            trained |= {key} if split == "train" else set()
        for split, (path, part) in self.sources.items():
            rows = self._read(split, path, part, seen)
            found[split] += [record for record, _ in rows]
            overlap = len(trained & {key for _, key in rows})
            self.counts["overlap"] += overlap
            if overlap:
                warnings.warn(f"{path}: {overlap} of its rows are also trained on", stacklevel=4)
        self._records |= found
        self.counts.update({split: len(records) for split, records in found.items()})

    def _read(
        self, source: str, path: str, part: str | None, seen: set[str]
    ) -> list[tuple[Record, str]]:
        """Records of one source, each with the text that decides its split."""
        rows, problems = scan_rows(path, format=self.format, split=part)
        read = len(rows) + len(problems)
        present = list(dict.fromkeys(name for row in rows for name in row.values))
        columns = self._find_columns(present, path, source != "predict") if rows else {}
        question = next(iter(self.roles))
        out: list[tuple[Record, str]] = []
        for row in rows:
            uid = unique_uid(_uid(Fields(row, columns)), seen)
            fields = Fields(row, columns, uid, source != "predict")
            try:
                record = self.make_record(fields)
            except BadRowError as error:
                problems.append(error.problem(row))
                seen.discard(fields.uid)
            else:
                asked = str(row.values.get(columns.get(question, question)))
                out.append((record, self.key_of(record) if self.key_of else asked))
        if not out:
            raise_problems(path, problems, "there is no usable row")
        if self.on_bad_row == "error":
            tolerate(path, problems, read, self.max_bad_share, stacklevel=6)
        counts = {"rows": read, "records": len(out), **count_skipped(problems)}
        self.counts.update({f"{source}/{name}": value for name, value in counts.items()})
        return out

    def _find_columns(
        self, present: Sequence[str], path: str, labels_needed: bool
    ) -> dict[str, str]:
        taken = [name for role in self.roles.values() for name in role.names]
        found = {}
        for name, role in self.roles.items():
            chosen = self.columns.get(name)
            is_needed = role.is_required and (labels_needed or not role.is_label)
            is_optional_choice = chosen is not None and role.is_label and not labels_needed
            is_there = chosen in present or any(usual in present for usual in role.names)
            if is_needed or is_there or (chosen is not None and not is_optional_choice):
                key = f"data.task.columns.{name}"
                found[name] = find_column(
                    present, role.names, key=key, path=path, chosen=chosen, taken=taken
                )
        return found


def _uid(fields: Fields) -> str:
    """The row's own identity, or a hash of what its roles hold."""
    own = fields.row.values.get(fields.columns.get("uid", ""))
    if isinstance(own, (str, int)) and not isinstance(own, bool) and str(own).strip():
        return clean(str(own))
    values = [fields.row.values.get(column) for column in fields.columns.values()]
    return f"{stable_hash(*values):016x}"


def unique_uid(uid: str, seen: set[str]) -> str:
    """The uid, numbered where another row has it already.

    Args:
        uid: The row's own.
        seen: Those that are taken; the result is added.
    """
    free, copy = uid, 1
    while free in seen:
        copy += 1
        free = f"{uid}#{copy}"
    seen.add(free)
    return free


def tolerate(
    path: str | Path, problems: Sequence[Problem], read: int, share: float, *, stacklevel: int
) -> None:
    """Refuse more bad rows than allowed, warn about fewer.

    Args:
        path: Where they stand.
        problems: One a bad row.
        read: How many rows there are.
        share: How many of them may be bad.
        stacklevel: Of the warning.

    Raises:
        ValueError: There are more.
    """
    if len(problems) > share * read:
        hint = "correct them, or leave them out with data.task.on_bad_row=skip"
        raise_problems(path, problems, hint)
    elif problems:
        shown = "; ".join(problem.message for problem in problems[:MAX_SHOWN])
        warnings.warn(f"{len(problems)} of {read} rows left out: {shown}", stacklevel=stacklevel)


def count_skipped(problems: Sequence[Problem]) -> dict[str, int]:
    """``skipped`` and ``skipped/<reason>``.

    Args:
        problems: One a bad row.
    """
    reasons = Counter(f"skipped/{problem.reason}" for problem in problems)
    return {"skipped": len(problems), **reasons}

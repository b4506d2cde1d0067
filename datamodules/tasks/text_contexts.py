"""Texts from a file: one a line of a plain text, or one a row of any other format.

Nothing is known of what they say: only how much of the wording comes back can be measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.prompt_rows import (
    BadRowError,
    Fields,
    PromptFile,
    Role,
    count_skipped,
    tolerate,
    unique_uid,
)
from datamodules.row_options import RowOptions
from datamodules.sources import Problem, Row, raise_problems, stable_hash
from datamodules.tasks.compression import CompressionTask, Context, ContextSet, Split

ROLES = {"text": Role(("text", "content", "context", "passage", "document"))}
PLAIN = (".txt", ".text")


class TextContexts(RowOptions, CompressionTask):
    """Texts without slots, split by a hash of the text; ``predict`` is the whole main file.

    The space around a text is dropped. An empty line of a plain text is a bad row like any other:
    named by ``file:line``, or with ``on_bad_row=skip`` counted (``counts``).

    Args:
        **options: Of ``RowOptions``: ``path`` and the rest; the one role is ``text``. The format
            ``txt``, and ``auto`` for endings ``.txt`` and ``.text``, reads one text a line.

    Raises:
        ValueError: A value is not allowed; all such values are named at once.

    Example:
        >>> task = TextContexts(path="texts.txt", test_fraction=0.1)
    """

    name = "text_file"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.file = TextRows(
            roles=ROLES,
            make_record=make_context,
            key_of=lambda context: context.text,
            **options,
        )

    @property
    def counts(self) -> Counter[str]:
        """What became of the rows: ``PromptFile.counts``."""
        return self.file.counts

    def contexts(self, split: Split) -> Sequence[Context]:
        """Texts of a split, in file order.

        Args:
            split: ``train``, ``val``, ``test``, or ``predict`` for the whole main file.

        Raises:
            ValueError: The file cannot be read, or no row is usable.
        """
        return self.file.records(split)

    def evaluations(self, split: Split) -> list[ContextSet]:
        """One set ``text`` of all texts of the split; none where it has no texts.

        Args:
            split: As in ``contexts``.
        """
        found = self.contexts(split)
        return [ContextSet("text", found)] if found else []

    def read(self, context: Context, text: str) -> Mapping[str, str | None]:
        """Nothing: these texts have no slots."""
        return {}


def make_context(fields: Fields) -> Context:
    """The context of a row.

    Args:
        fields: The row.

    Raises:
        BadRowError: The text is missing, empty or no text.
    """
    return Context(fields.uid, fields.text("text").strip(), where=fields.where)


class TextRows(PromptFile[Context]):
    """Rows of any format of ``scan_rows``, or of a plain text, one a line.

    Args:
        **options: Of ``PromptFile``.
    """

    def _read(
        self, source: str, path: str, part: str | None, seen: set[str]
    ) -> list[tuple[Context, str]]:
        is_plain = self.format == "auto" and Path(path).suffix.lower() in PLAIN
        if self.format != "txt" and not is_plain:
            return super()._read(source, path, part, seen)
        if part is not None:
            raise ValueError(f"data.split={part}: {path} is one plain text without splits; drop it")
        rows, problems = scan_texts(path)
        read, out = len(rows) + len(problems), []
        for row in rows:
            uid = unique_uid(f"{stable_hash(row.values['text']):016x}", seen)
            try:
                record = self.make_record(Fields(row, {"text": "text"}, uid))
            except BadRowError as error:
                problems.append(error.problem(row))
                seen.discard(uid)
            else:
                out.append((record, record.text))
        if not out:
            raise_problems(path, problems, "there is no usable line")
        if self.on_bad_row == "error":
            tolerate(path, problems, read, self.max_bad_share, stacklevel=7)
        counts = {"rows": read, "records": len(out), **count_skipped(problems)}
        self.counts.update({f"{source}/{name}": value for name, value in counts.items()})
        return out


def scan_texts(path: str | Path) -> tuple[list[Row], list[Problem]]:
    """Lines of a plain text in UTF-8; the end of the last line opens no new one.

    Args:
        path: The file.

    Returns:
        Lines as rows with the one value ``text``, and a problem for each empty or unreadable one.

    Raises:
        ValueError: The file cannot be read, or holds nothing.
    """
    if not Path(path).is_file():
        raise ValueError(f"data.path={str(path)!r}: there is no such file")
    try:
        data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    rows, problems = [], []
    for number, raw in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        where = f"{path}:{number}"
        if not raw.strip():
            problems.append(Problem("empty_line", f"{where}: the line is empty; text is needed"))
            continue
        try:
            rows.append(Row({"text": raw.decode("utf-8").removesuffix("\r")}, where))
        except UnicodeDecodeError:
            problems.append(Problem("bad_utf8", f"{where}: invalid UTF-8; save it as UTF-8"))
    if not data.strip():
        raise ValueError(f"{path}: the file is empty; data.path needs at least one text")
    return rows, problems

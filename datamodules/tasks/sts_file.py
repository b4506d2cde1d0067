"""Pairs of sentences with a similarity score, from the files of the STS benchmark or from tables.

The benchmark's files are tab separated and have no header line: genre, file, year, id, score and
two sentences, then sometimes columns of origin. Quotes in them are part of the text. Such a file is
known by its first lines, whatever its ending (the benchmark's own is ``.csv``).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
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
from datamodules.sources import SUFFIXES, Problem, Row, raise_problems, stable_hash
from datamodules.tasks.base import Split
from datamodules.tasks.embedding import EmbeddingTask, EvalSet, PairRow, PairSet, StsSet
from datamodules.tasks.pair_file import set_name

ROLES = {
    "sentence1": Role(("sentence1", "sentence_1", "text1", "sentence_A")),
    "sentence2": Role(("sentence2", "sentence_2", "text2", "sentence_B")),
    "score": Role(("score", "similarity_score", "similarity", "label"), is_label=True),
    "genre": Role(("genre", "category"), is_required=False),
}
BENCHMARK = ("genre", "file", "year", "id", "score", "sentence1", "sentence2")
MIN_ROWS = 3  # of a set that is measured; the correlation of two rows is 1 or -1
SNIFFED_BYTES, SNIFFED_LINES = 65536, 10


@dataclass(frozen=True)
class StsRecord:
    """One scored pair.

    Args:
        uid: Stable identity.
        first: A sentence.
        second: Another.
        score: How similar they are; None where unknown (prediction).
        genre: What kind of text it is; "" where the file does not say.
        where: ``file:line``.
    """

    uid: str
    first: str
    second: str
    score: float | None
    genre: str
    where: str

    @property
    def key(self) -> str:
        """The sentences without their order: what decides the split."""
        return "\x1f".join(sorted((self.first, self.second)))


class StsFile(RowOptions, EmbeddingTask):
    """Scored pairs from a file: similar ones to train on, all of them to measure rank correlation.

    Splits go by a hash of the two sentences in either order; one sentence may be in several splits
    with different partners. Files with a header line have columns ``sentence1``, ``sentence2`` and
    ``score``, perhaps ``genre``. ``predict`` is the whole main file in its order, with or without
    scores.

    Args:
        positive_from: Pairs of this score or more are trained on [our choice: 4 of 5 is "equal in
            what matters" on the benchmark's scale].
        max_score: Largest score that is no mistake; the smallest is 0.
        instruction: Said before the sentences where the template has ``{instruction}``.
        literal_quotes: Whether quotes are part of the text in tab separated files with a header
            line, as in GLUE's; those without a header line are always read so.
        **options: Of ``RowOptions``: ``path`` and the rest.

    Raises:
        ValueError: A value is not allowed; all such values are named at once.
    """

    name = "sts_file"

    def __init__(
        self,
        *,
        positive_from: float = 4.0,
        max_score: float = 5.0,
        instruction: str = "",
        literal_quotes: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.positive_from, self.max_score = positive_from, max_score
        self.instruction = instruction
        problems = []
        if not 0 < max_score < math.inf:
            problems.append(f"data.task.max_score={max_score}: a finite number above 0 is needed")
        elif not 0 <= positive_from <= max_score:
            problems.append(
                f"data.task.positive_from={positive_from}: a score from 0 to "
                f"data.task.max_score={max_score} is needed"
            )
        try:
            self.file = StsRows(
                roles=ROLES,
                make_record=self.make_record,
                key_of=lambda record: record.key,
                literal_quotes=literal_quotes,
                **options,
            )
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def counts(self) -> Counter[str]:
        """What became of the rows: ``PromptFile.counts``."""
        return self.file.counts

    def make_record(self, fields: Fields) -> StsRecord:
        """The record of a row.

        Args:
            fields: The row.

        Returns:
            Sentences without the space around them, and their score.

        Raises:
            BadRowError: A sentence is missing or empty, or the score is no number in range.
        """
        first, second = fields.text("sentence1").strip(), fields.text("sentence2").strip()
        genre = str(fields.value("genre")).strip() if fields.has("genre") else ""
        return StsRecord(fields.uid, first, second, self._score(fields), genre, fields.where)

    def _score(self, fields: Fields) -> float | None:
        is_known = fields.has("score") and str(fields.value("score")).strip()
        if not is_known and not fields.is_scored:
            return None
        value = fields.value("score")
        try:
            score = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        if not 0 <= score <= self.max_score:
            message = f"is {value!r}; a number from 0 to {self.max_score} (data.task.max_score)"
            raise fields.bad("score", "bad_score", f"{message} is needed")
        return score

    def pairs(self, split: Split) -> list[PairSet]:
        """Similar pairs, one set of kind ``sts`` a genre, in the order in which they appear.

        Args:
            split: ``train``, ``val``, ``test``; or ``predict`` for all pairs of the main file,
                whatever their score.

        Returns:
            The sets: ``sts_<genre>``, or ``sts`` where there are no genres.

        Raises:
            ValueError: The file cannot be read, or no row to train on is similar enough.
        """
        records = self.file.records(split)
        similar = [
            record
            for record in records
            if split == "predict" or (record.score or 0.0) >= self.positive_from
        ]
        if split == "train" and records and not similar:
            raise ValueError(
                f"{self.path}: none of {len(records)} pairs to train on has a score of "
                f"data.task.positive_from={self.positive_from} or more"
            )
        return [
            PairSet(
                name,
                [PairRow(r.uid, r.first, r.second, where=r.where) for r in found],
                kind="sts",
                instruction=self.instruction,
            )
            for name, found in _by_genre(similar).items()
        ]

    def evaluations(self, split: Split) -> list[EvalSet]:
        """All scored pairs, and where there are several genres also those of each genre.

        Args:
            split: As in ``pairs``.

        Returns:
            ``sts``, then ``sts_<genre>`` for genres that can be measured; a warning names others.
            None where the configuration leaves the split no rows. For ``predict`` only ``sts``,
            with NaN for unknown scores.

        Raises:
            ValueError: The file cannot be read, the split has fewer than 3 rows, or all its scores
                are equal.
        """
        records = self.file.records(split)
        if not records and not self._is_wanted(split):
            return []
        if split == "predict":
            return [self._sts("sts", records)]
        if problem := _cannot_measure(records):
            more = "" if split == "train" else f", data.task.{split}_fraction or _path"
            raise ValueError(
                f"{self.path}: the split {split} has {problem}, so there is no rank correlation; "
                f"give it other rows (data.path{more})"
            )
        sets: list[EvalSet] = [self._sts("sts", records)]
        genres = _by_genre(records)
        for name, found in genres.items() if len(genres) > 1 else ():
            if problem := _cannot_measure(found):
                warnings.warn(
                    f"{self.path}, {split}: no set {name}: it has {problem}", stacklevel=2
                )
            else:
                sets.append(self._sts(name, found))
        return sets

    def _is_wanted(self, split: Split) -> bool:
        shares = {"val": self.val_fraction, "test": self.test_fraction}
        return split in self.sources or shares.get(split, 1 - sum(shares.values())) > 0

    def _sts(self, name: str, records: Sequence[StsRecord]) -> StsSet:
        scores = [math.nan if record.score is None else record.score for record in records]
        first, second = [r.first for r in records], [r.second for r in records]
        return StsSet(name, first, second, scores, instruction=self.instruction)


class StsRows(PromptFile[StsRecord]):
    """Rows of any format of ``scan_rows``, or of tab separated files with literal quotes.

    Args:
        literal_quotes: Read tab separated files with a header line so, too.
        **options: Of ``PromptFile``.
    """

    def __init__(self, *, literal_quotes: bool, **options: Any) -> None:
        super().__init__(**options)
        self.literal_quotes = literal_quotes

    def _read(
        self, source: str, path: str, part: str | None, seen: set[str]
    ) -> list[tuple[StsRecord, str]]:
        is_benchmark = part is None and self._is_benchmark(path)
        is_table = self.format == "tsv" or (self.format, path[-4:].lower()) == ("auto", ".tsv")
        if is_benchmark or (is_table and self.literal_quotes and Path(path).is_file()):
            return self._read_literal(source, path, is_benchmark, seen)
        try:
            return super()._read(source, path, part, seen)
        except ValueError as error:
            if is_table and "quote" in str(error):
                hint = "where quotes are part of the text set data.task.literal_quotes=true"
                raise ValueError(f"{error}\n{hint}") from error
            raise

    def _read_literal(
        self, source: str, path: str, is_benchmark: bool, seen: set[str]
    ) -> list[tuple[StsRecord, str]]:
        """As ``PromptFile._read``, on lines."""
        rows, problems = scan_lines(path, BENCHMARK if is_benchmark else None)
        read, is_scored = len(rows) + len(problems), source != "predict"
        columns = self._find_columns(list(rows[0].values), path, is_scored) if rows else {}
        out: list[tuple[StsRecord, str]] = []
        for row in rows:
            # The benchmark's ids begin anew in every file of a genre.
            own = [row.values[name] for name in BENCHMARK[:4]] if is_benchmark else None
            values = [row.values[column] for column in columns.values()]
            uid = unique_uid("/".join(own) if own else f"{stable_hash(*values):016x}", seen)
            try:
                record = self.make_record(Fields(row, columns, uid, is_scored))
            except BadRowError as error:
                problems.append(error.problem(row))
                seen.discard(uid)
            else:
                out.append((record, record.key))
        if not out:
            raise_problems(path, problems, "there is no usable row")
        if self.on_bad_row == "error":
            tolerate(path, problems, read, self.max_bad_share, stacklevel=7)
        counts = {"rows": read, "records": len(out), **count_skipped(problems)}
        self.counts.update({f"{source}/{name}": value for name, value in counts.items()})
        return out

    def _is_benchmark(self, path: str) -> bool:
        """Whether the first lines look like the benchmark's: no column name, a score in place 5."""
        suffix = Path(path).suffix.lower()
        is_text = SUFFIXES.get(suffix, "csv") in ("csv", "tsv")
        if not Path(path).is_file() or self.format not in ("auto", "tsv") or not is_text:
            return False
        with open(path, "rb") as file:
            head = file.read(SNIFFED_BYTES).decode("utf-8-sig", "replace")
        lines = [line.split("\t") for line in head.splitlines() if line.strip()][:SNIFFED_LINES]
        names = {name for role in self.roles.values() for name in role.names}
        names |= {column for column in self.columns.values() if column is not None}
        if not lines or names & set(lines[0]):
            return False
        return any(len(cells) >= len(BENCHMARK) and _is_number(cells[4]) for cells in lines)


def scan_lines(
    path: str | Path, names: Sequence[str] | None = None
) -> tuple[list[Row], list[Problem]]:
    """Rows of a tab separated file whose quotes are part of the text.

    Args:
        path: The file.
        names: Of the first columns, further ones are not read; None takes the first line, and then
            every line has as many cells.

    Returns:
        Usable rows, and a problem for each other line.

    Raises:
        ValueError: The file cannot be read, or holds no row.
    """
    try:
        data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    rows, problems = [], []
    is_open = names is not None
    for number, raw in enumerate(data.split(b"\n"), start=1):
        where = f"{path}:{number}"
        if not raw.strip():
            continue
        try:
            cells = raw.decode("utf-8").removesuffix("\r").split("\t")
        except UnicodeDecodeError:
            problems.append(Problem("bad_utf8", f"{where}: invalid UTF-8; save it as UTF-8"))
            continue
        if names is None:
            names = cells
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{where}: the header names column {twice[0]!r} twice")
        elif len(cells) < len(names) or (len(cells) > len(names) and not is_open):
            message = f"{where}: {len(cells)} cells between tabs where {len(names)} are needed"
            problems.append(Problem("bad_cells", f"{message} ({', '.join(names)})"))
        else:
            rows.append(Row(dict(zip(names, cells, strict=False)), where))
    if not rows and not problems:
        raise ValueError(f"{path}: the file is empty: it holds no row of data")
    return rows, problems


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _by_genre(records: Sequence[StsRecord]) -> dict[str, list[StsRecord]]:
    """Records by the name of their set; without any genre there is one set ``sts``."""
    if not any(record.genre for record in records):
        return {"sts": list(records)} if records else {}
    found: dict[str, list[StsRecord]] = {}
    for record in records:
        found.setdefault(f"sts_{set_name(record.genre)}", []).append(record)
    return found


def _cannot_measure(records: Sequence[StsRecord]) -> str:
    """Why there is no rank correlation; "" where there is one."""
    if len(records) < MIN_ROWS:
        return f"{len(records)} rows, {MIN_ROWS} are needed"
    if len({record.score for record in records}) == 1:
        return f"{len(records)} equal scores of {records[0].score}"
    return ""

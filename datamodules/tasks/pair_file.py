"""Contrastive pairs from a file: a query, what answers it and, where known, what does not.

Rows are those of sentence-transformers (``anchor, positive, negative``), FlagEmbedding (``query``
with lists ``pos`` and ``neg``) and of question answering (``question, answer``).
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datamodules.prompt_rows import Fields, PromptFile, Role
from datamodules.row_options import RowOptions
from datamodules.sources import clean, nearest
from datamodules.tasks.base import Split
from datamodules.tasks.embedding import EmbeddingTask, EvalSet, PairRow, PairSet, RetrievalSet

Kind = Literal["retrieval", "sts", "classification", "clustering"]
KINDS: tuple[Kind, ...] = ("retrieval", "sts", "classification", "clustering")
QUERIES = ("query", "anchor", "question", "sentence1")
POSITIVES = ("positive", "pos", "passage", "answer", "sentence2")
NEGATIVES = ("negatives", "neg", "hard_negatives", "negative")
DATASETS = ("dataset", "task", "source")
MAX_DATASETS = 200  # more of them are rather a column that means something else


def set_name(text: str) -> str:
    """A text as name of a data set, in metrics and on the command line.

    Args:
        text: What stands in the file.

    Returns:
        Its letters, digits and underscores; all else becomes one underscore.

    Example:
        >>> set_name("main-captions")
        'main_captions'
    """
    return re.sub(r"\W+", "_", text).strip("_") or "other"


@dataclass(frozen=True)
class PairRecord:
    """One row of a file.

    Args:
        uid: Stable identity.
        query: What asks.
        positives: What answers, one at least.
        negatives: What does not; none of ``positives``.
        dataset: Name of its data set.
        where: ``file:line``.
        dropped: Negatives that were also positives of the row.
    """

    uid: str
    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    dataset: str
    where: str
    dropped: int = 0


class PairFile(RowOptions, EmbeddingTask):
    """Pairs from a file, one data set or several, split by a hash of the query.

    A row with several positives gives several pairs, one a positive. All positives of a query that
    a split knows are no negatives there, in whichever row they stand [our choice]. The space around
    texts is dropped. ``predict`` is the whole main file in its order.

    ``counts`` are those of ``PromptFile`` and, once asked for, ``<split>/dropped_negatives`` (they
    were positives) and ``<split>/no_negative`` (rows that had no other and need one).

    Args:
        in_batch: Whether other rows of a batch are negatives. False needs a negative in every row.
        kind: Type of task: ``retrieval``, ``sts``, ``classification`` or ``clustering``.
        by_dataset: Whether each value of the column ``dataset`` is a data set of its own.
        dataset: Name of the one data set of a file that names none, or of the retrieval set over
            all rows of a file that names several.
        instruction: Said before the queries where the template has ``{instruction}``.
        **options: Of ``RowOptions``: ``path`` and the rest. A positive among its row's own
            negatives makes a bad row with ``on_bad_row=error``; with ``skip`` the negative goes,
            is counted, and a warning says so.

    Raises:
        ValueError: A value is not allowed; all such values are named at once.
    """

    name = "pair_file"

    def __init__(
        self,
        *,
        in_batch: bool = True,
        kind: Kind = "retrieval",
        dataset: str = "pairs",
        instruction: str = "",
        by_dataset: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.in_batch, self.kind, self.instruction = in_batch, kind, instruction
        self.dataset = set_name(dataset)
        problems = []
        if kind not in KINDS:
            allowed = f"allowed are {', '.join(KINDS)}{nearest(kind, KINDS)}"
            problems.append(f"data.task.kind={kind!r}: {allowed}")
        if not dataset.strip():
            problems.append(f"data.task.dataset={dataset!r}: a name is needed")
        roles = {
            "query": Role(QUERIES),
            "positive": Role(POSITIVES),
            "negatives": Role(NEGATIVES, is_required=not in_batch),
        }
        if by_dataset:
            roles["dataset"] = Role(DATASETS, is_required=False)
        try:
            self.file: PromptFile[PairRecord] = PromptFile(
                roles=roles,
                make_record=self.make_record,
                key_of=lambda record: record.query,
                **options,
            )
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        self._pairs: dict[Split, list[PairSet]] = {}

    @property
    def counts(self) -> Counter[str]:
        """What became of the rows."""
        return self.file.counts

    def make_record(self, fields: Fields) -> PairRecord:
        """The record of a row.

        Args:
            fields: The row.

        Returns:
            Query, positives and negatives, each text once.

        Raises:
            BadRowError: A text is missing, empty or no text; a positive is among the negatives; or
                there is no negative where one is needed.
        """
        query = fields.text("query").strip()
        positives = _texts(fields, "positive")
        if not positives:
            raise fields.bad("positive", "no_positive", "holds no text; one at least is needed")
        found = _texts(fields, "negatives") if fields.has("negatives") else ()
        negatives = tuple(text for text in found if text not in positives)
        if len(negatives) < len(found) and self.on_bad_row == "error":
            both = next(text for text in found if text in positives)
            raise fields.bad(
                "negatives",
                "positive_among_negatives",
                f"holds a positive of its own row ({both[:40]!r}); data.task.on_bad_row=skip "
                "leaves such a negative out",
            )
        if not negatives and not self.in_batch:
            raise fields.bad(
                "negatives", "no_negative", "holds no negative; data.task.in_batch=false needs one"
            )
        dataset = self.dataset
        if "dataset" in fields.columns:
            is_named = fields.has("dataset") and str(fields.value("dataset")).strip()
            dataset = set_name(fields.text("dataset", numbers=True) if is_named else "")
        return PairRecord(
            fields.uid,
            query,
            positives,
            negatives,
            dataset,
            fields.where,
            len(found) - len(negatives),
        )

    def pairs(self, split: Split) -> list[PairSet]:
        """One set a data set, in the order in which they appear.

        Args:
            split: ``train``, ``val``, ``test``, or ``predict`` for the whole main file.

        Returns:
            The sets; none where the split has no rows.

        Raises:
            ValueError: The file cannot be read, or no row is usable.
        """
        if split not in self._pairs:
            self._pairs[split] = self._make_pairs(split)
        return self._pairs[split]

    def _make_pairs(self, split: Split) -> list[PairSet]:
        records = self._records(split)
        known = _answers(records)
        rows: dict[str, list[PairRow]] = {}
        dropped, bare = sum(record.dropped for record in records), 0
        for record in records:
            # What another row of the same query calls an answer is no negative here.
            left = tuple(text for text in record.negatives if text not in known[record.query])
            dropped += len(record.negatives) - len(left)
            if not left and not self.in_batch:
                bare += 1
                continue
            for number, positive in enumerate(record.positives, start=1):
                uid = record.uid if number == 1 else f"{record.uid}/{number}"
                row = PairRow(uid, record.query, positive, left, record.where)
                rows.setdefault(record.dataset, []).append(row)
        self.counts.update({f"{split}/dropped_negatives": dropped, f"{split}/no_negative": bare})
        if dropped:
            message = f"{dropped} negatives left out: they are positives of their own queries"
            message += f"; {bare} rows had no other negative and are left out" * bool(bare)
            warnings.warn(f"{self.path}, {split}: {message}", stacklevel=3)
        return [
            PairSet(name, found, self.in_batch, self.kind, self.instruction)
            for name, found in rows.items()
        ]

    def _records(self, split: Split) -> list[PairRecord]:
        records = self.file.records(split)
        names = list(dict.fromkeys(record.dataset for record in records))
        if len(names) > MAX_DATASETS:
            raise ValueError(
                f"{self.path}: the column of the data set has {len(names)} values in {len(records)}"
                f" rows, such as {', '.join(names[:3])}; name another with "
                "data.task.columns.dataset=<column>, or set data.task.by_dataset=false"
            )
        return records

    def evaluations(self, split: Split) -> list[EvalSet]:
        """Queries against all positives and negatives of the split, each text once.

        Args:
            split: As in ``pairs``.

        Returns:
            A set over all rows; where the file has several data sets it is named as the option
            ``dataset``, and but for ``predict`` each of them follows under its own name, against
            its own texts. None for a split without rows.

        Raises:
            ValueError: The file cannot be read, no row is usable, or one of several data sets has
                the name of the whole.
        """
        records = self._records(split)
        if not records:
            return []
        parts: tuple[Split, ...] = ("predict",) if split == "predict" else ("train", "val", "test")
        everywhere = {record.dataset for part in parts for record in self.file.records(part)}
        if len(everywhere) == 1:
            return [self._retrieval(records[0].dataset, records)]
        if self.dataset in everywhere:
            raise ValueError(
                f"data.task.dataset={self.dataset!r} is the name of one of the data sets in "
                f"{self.path}: choose another for the retrieval set over all rows"
            )
        sets: list[EvalSet] = [self._retrieval(self.dataset, records)]
        names = list(dict.fromkeys(record.dataset for record in records))
        for name in names if split != "predict" else ():
            own = [record for record in records if record.dataset == name]
            sets.append(self._retrieval(name, own))
        return sets

    def _retrieval(self, name: str, records: Sequence[PairRecord]) -> RetrievalSet:
        texts = [text for r in records for text in (*r.positives, *r.negatives)]
        places = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        answers = _answers(records)
        relevant = [sorted(places[text] for text in found) for found in answers.values()]
        return RetrievalSet(
            name, list(answers), list(places), relevant, instruction=self.instruction
        )


def _answers(records: Sequence[PairRecord]) -> dict[str, set[str]]:
    """All positives of each query, queries in their order."""
    found: dict[str, set[str]] = {}
    for record in records:
        found.setdefault(record.query, set()).update(record.positives)
    return found


def _texts(fields: Fields, role: str) -> tuple[str, ...]:
    """A text or a list of texts, each once, without the space around them.

    A blank cell or null in the place of the whole is no text; inside a list it is an error.
    """
    value = fields.value(role)
    if isinstance(value, str):
        if role == "negatives" and not value.strip():
            return ()  # an empty cell of a table
        return (fields.text(role).strip(),)
    if not isinstance(value, list):
        kind = type(value).__name__
        raise fields.bad(role, "not_text", f"is a {kind}; a text or a list of texts is needed")
    for number, text in enumerate(value, start=1):
        if not isinstance(text, str):
            kind = type(text).__name__
            raise fields.bad(role, "not_text", f"holds a {kind} as number {number}; not a text")
        if not text.strip():
            raise fields.bad(role, "empty_text", f"holds an empty text as number {number}")
        if clean(text) != text:
            raise fields.bad(role, "bad_text", f"holds lone surrogates in text {number}")
    return tuple(dict.fromkeys(text.strip() for text in value))

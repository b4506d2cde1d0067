"""Pairs of an input of the retriever and a passage that helped, made of labelled turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datamodules.labelling.records import UtilityRow
from datamodules.tasks.base import Split
from datamodules.tasks.embedding import EmbeddingTask, EvalSet, PairRow, PairSet
from datamodules.tasks.search_set import SearchSet
from datamodules.tasks.searching import Question, SearchTask
from datamodules.utility_source import UtilityPairRow


class UtilityPairs(EmbeddingTask):
    """What a retriever for a search agent is trained and measured on.

    Training pairs exist once the datamodule has labelled (``take``). A split is measured by the
    agent itself, one ``SearchSet`` for each group of questions (``single``, ``multi``, ...).

    Args:
        search: Questions and corpus.
        warm_start_pairs: Pairs of lexically similar texts that a tiny encoder is fitted to first,
            in place of an off-the-shelf encoder; 0 for none.
        seed: Of these pairs.

    Raises:
        ValueError: A count below 0.
    """

    def __init__(self, *, search: SearchTask, warm_start_pairs: int = 0, seed: int = 0) -> None:
        if warm_start_pairs < 0:
            raise ValueError(f"data.task.warm_start_pairs={warm_start_pairs} must be 0 or more")
        self.search, self.num_pairs, self.seed = search, warm_start_pairs, seed
        self.name = search.name
        self._rows: list[PairRow] = []
        self._evaluator: Callable[[], Any] | None = None

    def vocabulary(self) -> list[str] | None:
        """That of the search task."""
        return self.search.vocabulary()

    def take(self, rows: Sequence[UtilityRow], text_of: Callable[[UtilityRow], str]) -> None:
        """Keep selected rows as training pairs.

        Args:
            rows: Of all labelled turns.
            text_of: The retriever's input of a row.
        """
        self._rows = [
            UtilityPairRow(
                uid=row.uid,
                query=text_of(row),
                positive=self._text(row.positive),
                negatives=tuple(map(self._text, row.negatives)),
                scores=row.scores,
                siblings=tuple(self._text(uid) for uid in row.siblings if uid != row.positive),
            )
            for row in rows
        ]

    def _text(self, uid: str) -> str:
        corpus = self.search.corpus
        return corpus[corpus.places[uid]].encoded_text

    def measured_by(self, evaluator: Callable[[], Any]) -> None:
        """Say who searches in evaluations.

        Args:
            evaluator: Gives a ``SearchAgent`` with ``form``, what its retriever reads, and
                ``fit``, which writes that.
        """
        self._evaluator = evaluator

    def pairs(self, split: Split) -> list[PairSet]:
        """The training pairs; other splits have none."""
        return [PairSet("utility", self._rows)] if split == "train" else []

    def evaluations(self, split: Split) -> list[EvalSet]:
        """The questions of a split, a set for each of their groups."""
        if self._evaluator is None:
            return []
        groups: dict[str, list[Question]] = {}
        for question in self.search.records(split):
            groups.setdefault(question.group, []).append(question)
        agent = self._evaluator()
        return [
            SearchSet(
                name=name,
                questions=groups[name],
                corpus=self.search.corpus,
                agent=agent,
                input=agent.form,
                fit=agent.fit,
                gold=self.search.gold,
            )
            for name in sorted(groups)
        ]

    def warm_start_pairs(self) -> list[PairSet]:
        """Lexically similar pairs, drawn apart from all questions."""
        draw = getattr(self.search, "similarity_pairs", None)
        if draw is None or not self.num_pairs:
            return []
        pairs = draw(self.seed, self.num_pairs)
        rows = [PairRow(f"similar/{i}", query, text) for i, (query, text) in enumerate(pairs)]
        return [PairSet("similar", rows)]

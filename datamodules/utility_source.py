"""Batches of pairs with a score for each passage: what a judge said of it for the row's query.

Only methods that train on the order of a group read the scores; all others see ordinary pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from datamodules.pair_source import UNKNOWN, PairBatch, PairSource, text_id
from datamodules.schedules import Batch
from datamodules.tasks.embedding import Item, PairRow, PairSet

if TYPE_CHECKING:
    from datamodules.pairs import PairDataModule


@dataclass(frozen=True)
class UtilityPairRow(PairRow):
    """A query, a passage that helped, passages that did not, and what a judge said of each.

    Args:
        scores: Local relevance 0 to 100 of the positive, then of the negatives; () for unknown,
            -1 for a single unknown one.
        siblings: Further positives of the same turn, as texts. They are nobody's negatives here,
            whether they have a row of their own or not.
    """

    scores: tuple[int, ...] = ()
    siblings: tuple[Item, ...] = ()


@dataclass
class UtilityBatch(PairBatch):
    """A micro-batch of pairs with scores.

    Args:
        scores: ``(B, G)`` int64, 0 to 100; -1 where it is unknown.
    """

    scores: Tensor

    def state(self) -> dict[str, Any]:
        """Plain containers: what a bad batch is saved as."""
        return super().state() | {"scores": self.scores.tolist()}


class UtilitySource(PairSource):
    """Batches of the plan as ``UtilityBatch``; plain rows among them have unknown scores.

    Args:
        data: Its datamodule.
        batches: In place of the plan's.

    Raises:
        ValueError: A row has another number of scores than passages, or a score out of range.
    """

    def __init__(self, data: PairDataModule, batches: Sequence[Batch] | None = None) -> None:
        super().__init__(data, batches)
        for each in self.sets:
            for row in each.rows:
                _check(row)

    def collate(
        self,
        rows: Sequence[tuple[PairSet, PairRow, Mapping[int, list[int]] | None]],
        num_counted: int,
    ) -> UtilityBatch:
        """Encode rows; scores are cut and filled up as their negatives are.

        Args:
            rows: As in ``PairSource``.
            num_counted: The first so many count.
        """
        made = super().collate(rows, num_counted)
        width = made.text_ids.shape[1]
        values = {field.name: getattr(made, field.name) for field in fields(made)}
        scores = [_scores(row, self.data.num_negatives, width) for _, row, _ in rows]
        batch = UtilityBatch(**values, scores=torch.tensor(scores))
        siblings = [[text_id(item) for item in getattr(row, "siblings", ())] for _, row, _ in rows]
        most = max(len(each) for each in siblings)
        if not most:
            return batch
        more = torch.tensor([each + [UNKNOWN] * (most - len(each)) for each in siblings])
        return replace(batch, known_positives=torch.cat([batch.known_positives, more], 1))

    def _row(self, number: int, place: int) -> PairRow:
        """A row, with what was mined in place of its own negatives: most of that has no score."""
        own, row = self.sets[number].rows[place], super()._row(number, place)
        if row is own or not isinstance(own, UtilityPairRow) or not own.scores:
            return row
        known = dict(zip(own.negatives, own.scores[1:], strict=True))
        scores = (own.scores[0], *(known.get(item, UNKNOWN) for item in row.negatives))
        return replace(row, scores=scores)  # type: ignore[call-arg]


def _scores(row: PairRow, num_negatives: int, width: int) -> list[int]:
    """Scores of the passages that a batch holds of a row."""
    given = list(getattr(row, "scores", ()))[: 1 + num_negatives]
    return given + [UNKNOWN] * (width - len(given))


def _check(row: PairRow) -> None:
    """Refuse scores that belong to other passages."""
    scores = getattr(row, "scores", ())
    where, size = row.where or row.uid, 1 + len(row.negatives)
    if scores and len(scores) != size:
        raise ValueError(f"{where}: scores has {len(scores)} entries for {size} passages")
    if odd := [score for score in scores if not UNKNOWN <= score <= 100]:
        raise ValueError(f"{where}: scores holds {odd[0]}, which must be from 0 to 100, or -1")

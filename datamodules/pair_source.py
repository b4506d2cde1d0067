"""Batches of pairs: rows of data sets as token ids, with what is known about them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from datamodules.loader import Source
from datamodules.schedules import Batch, locate, share
from datamodules.sources import stable_hash
from datamodules.tasks.embedding import Item, PairRow, PairSet
from datamodules.texts import Encoded, Role

if TYPE_CHECKING:
    from datamodules.pairs import PairDataModule

UNKNOWN = -1  # id of a text that fills up


@dataclass
class PairBatch:
    """A micro-batch of B rows with G = 1 + H passages each.

    Args:
        queries: B items.
        passages: B G items, row by row, the positive first.
        in_batch: ``(B,)`` bool, see ``PairInfo`` of the contrastive losses, also for the others.
        counted: ``(B,)`` bool.
        passage_mask: ``(B, G)`` bool.
        text_ids: ``(B, G)``.
        query_ids: ``(B,)``.
        known_positives: ``(B, K)``.
        domain: Name of the data set; ``mixed`` where there are several.
        uids: B identities of rows.
    """

    queries: list[Encoded]
    passages: list[Encoded]
    in_batch: Tensor
    counted: Tensor
    passage_mask: Tensor
    text_ids: Tensor
    query_ids: Tensor
    known_positives: Tensor
    domain: str
    uids: list[str]

    def to(self, device: Any, **_: Any) -> PairBatch:
        """The same with its tensors on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]

    @property
    def num_tokens(self) -> int:
        """Tokens of all items."""
        return sum(len(item.ids) for item in (*self.queries, *self.passages))

    def state(self) -> dict[str, Any]:
        """Plain containers: what a bad batch is saved as."""
        return {
            "domain": self.domain,
            "uids": self.uids,
            "queries": [list(item.ids) for item in self.queries],
            "passages": [list(item.ids) for item in self.passages],
        }


class PairSource(Source):
    """Batches of the plan, a pure function of (seed, epoch, index).

    Args:
        data: Its datamodule.
        batches: In place of the plan's.
    """

    def __init__(self, data: PairDataModule, batches: Sequence[Batch] | None = None) -> None:
        self.data, self.window = data, data.window
        self.sets = data.training_sets()
        self.batches = batches
        self._shares: dict[int, Sequence[Batch]] = {}
        has_rows = batches is None or len(batches) > 0
        self._positives = [known_positives(each.rows) for each in self.sets] if has_rows else []

    def __len__(self) -> int:
        return len(self._of(0))

    def _of(self, epoch: int) -> Sequence[Batch]:
        """This rank's share of a pass."""
        if epoch not in self._shares:
            batches = self.data.plan_of(epoch).batches if self.batches is None else self.batches
            self._shares[epoch] = share(batches, *self.data.ranks)
        return self._shares[epoch]

    def batch(self, epoch: int, index: int) -> PairBatch:
        """Encode one batch."""
        batch = self._of(epoch)[index]
        places = locate(batch, [len(each.rows) for each in self.sets])
        chosen = [(self.sets[i], self._row(i, row), self._positives[i]) for i, row in places]
        return self.collate(chosen, batch.num_counted)

    def _row(self, number: int, place: int) -> PairRow:
        """A row, with what was mined in place of its own negatives."""
        pairs = self.sets[number]
        row = pairs.rows[place]
        if pairs.name not in self.data.mined:
            return row
        items, _ = self.data.passages_of(pairs)
        chosen = self.data.mined[pairs.name][place]
        return replace(row, negatives=tuple(items[i] for i in chosen))

    def collate(
        self,
        rows: Sequence[tuple[PairSet, PairRow, Mapping[int, list[int]] | None]],
        num_counted: int,
    ) -> PairBatch:
        """Encode rows.

        Args:
            rows: Data set, row, and the known positives of the set's queries (None: its own).
            num_counted: The first so many count.
        """
        most = self.data.num_negatives
        width = 1 + min(most, max(len(row.negatives) for _, row, _ in rows)) if most else 1
        if self.data.ranks[1] > 1:
            width = 1 + most  # equal on every rank
        told = [self._instruction(pairs) for pairs, _, _ in rows]
        where = [row.where or row.uid for _, row, _ in rows]
        groups = [[row.positive, *row.negatives[:most]] for _, row, _ in rows]
        queries = self._encode([row.query for _, row, _ in rows], "query", told, where)
        flat = self._encode(
            [item for group in groups for item in group],
            "passage",
            [one for one, group in zip(told, groups, strict=True) for _ in group],
            [one for one, group in zip(where, groups, strict=True) for _ in group],
        )
        passages: list[Encoded] = []
        ids, mask, known, query_ids = [], [], [], []
        for (_, row, positives), group in zip(rows, groups, strict=True):
            own, flat = flat[: len(group)], flat[len(group) :]
            missing = width - len(group)
            passages += own + own[:1] * missing
            ids.append([text_id(item) for item in group] + [UNKNOWN] * missing)
            mask.append([True] * len(group) + [False] * missing)
            query_ids.append(text_id(row.query))
            known.append(ids[-1][:1] if positives is None else positives[query_ids[-1]])
        most_known = max(len(each) for each in known)
        names = {pairs.name for pairs, _, _ in rows}
        return PairBatch(
            queries=queries,
            passages=passages,
            in_batch=torch.tensor([pairs.in_batch for pairs, _, _ in rows]),
            counted=torch.arange(len(rows)) < num_counted,
            passage_mask=torch.tensor(mask),
            text_ids=torch.tensor(ids),
            query_ids=torch.tensor(query_ids),
            known_positives=torch.tensor(
                [each + [UNKNOWN] * (most_known - len(each)) for each in known]
            ),
            domain=names.pop() if len(names) == 1 else "mixed",
            uids=[row.uid for _, row, _ in rows],
        )

    def _instruction(self, pairs: PairSet) -> str:
        return self.data.encoding.instructions.get(pairs.name, pairs.instruction)

    def _encode(
        self, items: Sequence[Item], role: Role, told: Sequence[str], where: Sequence[str]
    ) -> list[Encoded]:
        """Items with an instruction each, in as few calls of the tokenizer as there are."""
        found: list[Encoded | None] = [None] * len(items)
        for instruction in dict.fromkeys(told):
            places = [place for place, one in enumerate(told) if one == instruction]
            chosen, known = [items[i] for i in places], [where[i] for i in places]
            made = self.data.encoding.encode(chosen, role, instruction, known)
            for place, one in zip(places, made, strict=True):
                found[place] = one
        return [one for one in found if one is not None]


def text_id(item: Item) -> int:
    """Number of an item, equal for equal items; not negative.

    Args:
        item: A text or an image with a text.
    """
    key = item if isinstance(item, str) else f"{item.key}\n{item.text}"
    return stable_hash("item", key) % 2**62


def known_positives(rows: Sequence[PairRow]) -> dict[int, list[int]]:
    """All known positives of each query of a data set, by text ids.

    Args:
        rows: Of the data set.
    """
    found: dict[int, dict[int, None]] = defaultdict(dict)
    for row in rows:
        found[text_id(row.query)][text_id(row.positive)] = None
    return {query: list(positives) for query, positives in found.items()}

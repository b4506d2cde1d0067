"""Contrastive pairs as a data stream: data sets -> schedule -> batches of token ids.

Evaluation hands out whole sets (``RetrievalSet``, ``StsSet``), one a batch: a metric of a set needs
all its vectors at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from transformers import AutoTokenizer

from datamodules.loader import Loader, RowSource, Source, check_window
from datamodules.pair_schedule import Plan, Schedule
from datamodules.schedules import Batch, locate, share
from datamodules.sources import nearest, stable_hash
from datamodules.tasks.embedding import EmbeddingTask, EvalSet, Item, PairRow, PairSet
from datamodules.texts import Encoded, Role, TextEncoding

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


class PairDataModule(LightningDataModule):
    """Owns the data sets, their schedule and their encoding.

    Args:
        task: Pairs and evaluation sets.
        encoding: How texts become token ids.
        schedule: In which order; None for shuffled batches of one data set each, one pass.
        datasets: Names of the data sets to train on; None for all of the task.
        batch_size: Rows a micro-batch over all ranks.
        num_negatives: Hard negatives a row, of those that it has; rows with fewer are filled up
            with passages that do not count.
        micro_batches: Micro-batches an optimizer step (gradient accumulation). The loss couples the
            rows of a micro-batch only: for larger batches in little memory see
            ``model.chunk_size``.
        eval_batch_size: Items a forward pass of an evaluation.
        path: File of the pairs where the task reads one; for messages only.
        seed: Of schedule and bags.

    Raises:
        ValueError: Counts out of range.
    """

    def __init__(
        self,
        *,
        task: EmbeddingTask,
        encoding: TextEncoding,
        schedule: Schedule | None = None,
        datasets: Sequence[str] | None = None,
        batch_size: int = 32,
        num_negatives: int = 0,
        micro_batches: int = 1,
        eval_batch_size: int = 64,
        path: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        low = {"batch_size": (batch_size, 2), "num_negatives": (num_negatives, 0)}
        low |= {"micro_batches": (micro_batches, 1), "eval_batch_size": (eval_batch_size, 1)}
        problems = [
            f"data.{name}={value} must be at least {least}"
            + (": a lone row has no in-batch negatives" if name == "batch_size" else "")
            for name, (value, least) in low.items()
            if value < least
        ]
        if problems:
            raise ValueError("; ".join(problems))
        self.task, self.encoding = task, encoding
        self.schedule = schedule or Schedule()
        self.datasets = None if datasets is None else list(datasets)
        self.batch_size, self.num_negatives = batch_size, num_negatives
        self.window, self.eval_batch_size = micro_batches, eval_batch_size
        self.path, self.seed = path, seed
        #: Whether a tokenizer may bring code of its own; ``train.py`` sets it for the whole run.
        self.trust_remote_code = False
        self._sets: list[PairSet] | None = None
        self._plans: dict[int, Plan] = {}

    def prepare(
        self,
        backbone: str,
        cache_dir: str | Path,
        task_settings: Any = None,
        for_training: bool = True,
    ) -> None:
        """Bind the tokenizer of a backbone. Called once before the Trainer.

        Args:
            backbone: Folder or hub name.
            cache_dir: Where prepared folders live; nothing is prepared here.
            task_settings: Plain values that identify the task.
            for_training: Whether training follows.
        """
        trust = self.trust_remote_code
        self.bind(AutoTokenizer.from_pretrained(backbone, trust_remote_code=trust))

    def bind(self, tokenizer: Any) -> None:
        """Give task and encoding their tokenizer.

        Raises:
            ValueError: It cannot encode the task.
        """
        self.task.bind(self.encoding.bind(tokenizer))

    @property
    def ranks(self) -> tuple[int, int]:
        """Rank and number of ranks of the attached trainer (0, 1 without one)."""
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    # ------------------------------------------------------------------ training

    def training_sets(self) -> list[PairSet]:
        """The data sets that are trained on.

        Raises:
            ValueError: An unknown or empty data set, or labelled rows without negatives.
        """
        if self._sets is None:
            found = {each.name: each for each in self.task.pairs("train")}
            chosen = list(found) if self.datasets is None else self.datasets
            if unknown := [name for name in chosen if name not in found]:
                raise ValueError(
                    f"data.datasets names the unknown data set {unknown[0]!r}"
                    f"{nearest(unknown[0], found)}; there are {', '.join(found) or 'none'}"
                )
            sets = [found[name] for name in chosen]
            if empty := [each.name for each in sets if not each.rows]:
                raise ValueError(f"the data set {empty[0]!r} has no training rows")
            if not sets:
                raise ValueError("there is no data set to train on")
            for each in sets:
                self._check_labelled(each)
            self._sets = sets
        return self._sets

    def _check_labelled(self, pairs: PairSet) -> None:
        if pairs.in_batch:
            return
        alone = [row for row in pairs.rows if not row.negatives]
        if alone or not self.num_negatives:
            row = (alone or list(pairs.rows))[0]
            raise ValueError(
                f"{row.where or row.uid}: data set {pairs.name!r} has no in-batch negatives "
                f"(in_batch=false), so its rows need negatives of their own and "
                f"data.num_negatives at least 1"
            )

    @property
    def plan(self) -> Plan:
        """The batches of the run."""
        _, world = self.ranks
        if world not in self._plans:
            if self.batch_size % world:
                raise ValueError(
                    f"data.batch_size={self.batch_size} cannot be shared evenly by {world} "
                    f"processes: use a multiple"
                )
            sizes = {each.name: len(each.rows) for each in self.training_sets()}
            self._plans[world] = self.schedule.plan(
                sizes, batch_size=self.batch_size, seed=self.seed, window=self.window
            )
        return self._plans[world]

    @property
    def stage_steps(self) -> list[int]:
        """Optimizer steps of each stage: of each bag, or of the run."""
        return [batches // self.window for batches in self.plan.stages]

    def train_dataloader(self) -> Loader:
        """The sized, stateful loader of micro-batches."""
        loader = Loader(PairSource(self))
        check_window(self.trainer, loader)
        return loader

    # ------------------------------------------------------------------ evaluation

    def _evaluations(self, split: Any) -> Loader | list[Any]:
        sets: list[EvalSet] = self.task.evaluations(split)
        if not sets:
            return []
        # one set a batch on every rank: they share its items
        return Loader(RowSource(sets, batch_size=1), restarts=True)

    def val_dataloader(self) -> Loader | list[Any]:
        """Evaluation sets of the validation split, one a batch of ``Rows``."""
        return self._evaluations("val")

    def test_dataloader(self) -> Loader | list[Any]:
        """Evaluation sets of the test split, one a batch of ``Rows``."""
        return self._evaluations("test")

    def predict_dataloader(self) -> Loader | list[Any]:
        """Evaluation sets to embed, one a batch of ``Rows``."""
        return self._evaluations("predict")


class PairSource(Source):
    """Batches of the plan, a pure function of (seed, epoch, index).

    Args:
        data: Its datamodule.
        batches: In place of the plan's.
    """

    def __init__(self, data: PairDataModule, batches: Sequence[Batch] | None = None) -> None:
        self.data, self.window = data, data.window
        self.sets = data.training_sets()
        rank, world = data.ranks
        self.batches = share(data.plan.batches if batches is None else batches, rank, world)
        self._positives = (
            [_known_positives(each.rows) for each in self.sets] if self.batches else []
        )

    def __len__(self) -> int:
        return len(self.batches)

    def batch(self, epoch: int, index: int) -> PairBatch:
        """Encode one batch."""
        batch = self.batches[index]
        places = locate(batch, [len(each.rows) for each in self.sets])
        chosen = [(self.sets[i], self.sets[i].rows[row], self._positives[i]) for i, row in places]
        return self.collate(chosen, batch.num_counted)

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


def _known_positives(rows: Sequence[PairRow]) -> dict[int, list[int]]:
    """All known positives of each query of a data set, by text ids."""
    found: dict[int, dict[int, None]] = defaultdict(dict)
    for row in rows:
        found[text_id(row.query)][text_id(row.positive)] = None
    return {query: list(positives) for query, positives in found.items()}

"""Contrastive pairs as a data stream: data sets -> schedule -> batches of token ids.

Evaluation hands out whole sets (``RetrievalSet``, ``StsSet``), one a batch: a metric of a set needs
all its vectors at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from transformers import AutoTokenizer

from datamodules.loader import Loader, RowSource, check_window
from datamodules.pair_schedule import Plan, Schedule
from datamodules.pair_source import PairBatch as PairBatch
from datamodules.pair_source import PairSource as PairSource
from datamodules.pair_source import known_positives
from datamodules.pair_source import text_id as text_id
from datamodules.sources import nearest, stable_hash
from datamodules.tasks.embedding import EmbeddingTask, EvalSet, Item, PairSet
from datamodules.texts import TextEncoding


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
        #: Data set -> for each row places of mined negatives, see ``passages_of``.
        self.mined: Mapping[str, Sequence[Sequence[int]]] = {}
        self._sets: list[PairSet] | None = None
        self._passages: dict[str, tuple[list[Item], list[list[int]]]] = {}
        self._plans: dict[tuple[int, int], Plan] = {}

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

    def passages_of(self, pairs: PairSet) -> tuple[list[Item], list[list[int]]]:
        """All different passages of a data set, and for each row the places of its positives.

        Args:
            pairs: One of ``training_sets``.

        Returns:
            Passages, and places: the row's own positive first, then others of the same query.
        """
        if pairs.name not in self._passages:
            places: dict[int, int] = {}
            items: list[Item] = []
            for row in pairs.rows:
                for item in (row.positive, *row.negatives):
                    if places.setdefault(text_id(item), len(items)) == len(items):
                        items.append(item)
            positives = known_positives(pairs.rows)
            known = []
            for row in pairs.rows:
                own = places[text_id(row.positive)]
                others = [places[one] for one in positives[text_id(row.query)]]
                itself = places.get(text_id(row.query))
                told = [own, *others, *([] if itself is None else [itself])]
                known.append(list(dict.fromkeys(told)))
            self._passages[pairs.name] = items, known
        return self._passages[pairs.name]

    @property
    def plan(self) -> Plan:
        """The batches of the run, or of its first pass where ``trainer.max_epochs`` is above 1."""
        return self.plan_of(0)

    def plan_of(self, epoch: int) -> Plan:
        """The batches of a pass of the trainer, as many as in every other.

        Args:
            epoch: Of the trainer.
        """
        _, world = self.ranks
        if (world, epoch) not in self._plans:
            if self.batch_size % world:
                raise ValueError(
                    f"data.batch_size={self.batch_size} cannot be shared evenly by {world} "
                    f"processes: use a multiple"
                )
            sizes = {each.name: len(each.rows) for each in self.training_sets()}
            seed = stable_hash(self.seed, "epoch", epoch) % 2**31 if epoch else self.seed
            self._plans[world, epoch] = self.schedule.plan(
                sizes, batch_size=self.batch_size, seed=seed, window=self.window
            )
        return self._plans[world, epoch]

    @property
    def stage_steps(self) -> list[int]:
        """Optimizer steps of each stage: of each bag, or of the run."""
        return [batches // self.window for batches in self.plan.stages]

    @property
    def bag_steps(self) -> list[int]:
        """Optimizer steps of each model that is trained in turn (``data.schedule.bags``)."""
        return self.stage_steps

    def train_source(self) -> PairSource:
        """What makes the batches."""
        return PairSource(self)

    def train_dataloader(self) -> Loader:
        """The sized, stateful loader of micro-batches."""
        loader = Loader(self.train_source())
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

"""Contexts as a data stream: texts to compress -> batches of token ids.

Evaluation hands out whole sets (``ContextSet``), one a batch: twins and questions of a set belong
together, and the module decides what it decodes.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from transformers import AutoTokenizer

from datamodules.context_encoding import CompressionBatch as CompressionBatch
from datamodules.context_encoding import ContextEncoding, LongPolicy, MaskKind
from datamodules.loader import Loader, RowSource, Source, check_window
from datamodules.schedules import permutation
from datamodules.tasks.compression import CompressionTask, Context, ContextSet, Split


class ContextDataModule(LightningDataModule):
    """Owns the contexts, their order and their encoding.

    An epoch is one pass over the training texts, those that fill no window left out. Which texts a
    batch holds and what is hidden of them depend on ``seed`` alone, not on a model or a tokenizer,
    so that a sweep of sizes sees the same data [card, sections 3 and 10].

    Args:
        task: Texts and evaluation sets.
        batch_size: Texts a micro-batch over all ranks.
        micro_batches: Micro-batches an optimizer step (gradient accumulation).
        eval_batch_size: Texts a forward pass of an evaluation.
        max_tokens: Longest text in tokens of either tokenizer; None for no bound.
        on_too_long: ``error``, or ``cut``, counted (``counts``).
        source_mask: Probability that a token of the task's ``hidden_words`` is hidden from the
            compressor in training [card, section 9: 0.5]; evaluation hides nothing.
        mask_kind: What stands in its place: ``mask`` or ``random``, see ``ContextEncoding``.
        decoder: Folder or hub name of the decoder, for its tokenizer; None for the folder
            ``decoder`` in the compressor's, or else the compressor's tokenizer.
        path: File of the texts where the task reads one; for messages only.
        seed: Of the order and of what is hidden.

    Raises:
        ValueError: A value is not allowed; all such values are named at once.
    """

    def __init__(
        self,
        *,
        task: CompressionTask,
        batch_size: int = 64,
        micro_batches: int = 1,
        eval_batch_size: int = 64,
        max_tokens: int | None = None,
        on_too_long: LongPolicy = "error",
        source_mask: float = 0.0,
        mask_kind: MaskKind = "mask",
        decoder: str | None = None,
        path: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        counts = {"batch_size": batch_size, "micro_batches": micro_batches}
        counts |= {"eval_batch_size": eval_batch_size, "max_tokens": max_tokens or 1}
        problems = [
            f"data.{name}={value} must be at least 1" for name, value in counts.items() if value < 1
        ]
        if max_tokens == 0:
            problems.append("data.max_tokens=0 must be at least 1, or null for no bound")
        if on_too_long not in ("error", "cut"):
            problems.append(f"data.on_too_long={on_too_long!r} must be one of error, cut")
        if not 0 <= source_mask <= 1:
            problems.append(f"data.source_mask={source_mask} must be in [0, 1]")
        if mask_kind not in ("mask", "random"):
            problems.append(f"data.mask_kind={mask_kind!r} must be one of mask, random")
        if problems:
            raise ValueError("; ".join(problems))
        self.task, self.path, self.seed = task, path, seed
        self.batch_size, self.window = batch_size, micro_batches
        self.eval_batch_size = eval_batch_size
        self.encoding = ContextEncoding(
            max_tokens=max_tokens,
            on_too_long=on_too_long,
            source_mask=source_mask,
            mask_kind=mask_kind,
        )
        #: Whether a tokenizer may bring code of its own; ``train.py`` sets it for the whole run.
        self.trust_remote_code = False
        #: ``<split>/cut``: texts that were too long; a training text counts whenever it is read.
        self.counts: Counter[str] = Counter()
        self._checked = False
        self._sets: dict[Split, list[ContextSet]] = {}

    def prepare(
        self,
        backbone: str,
        cache_dir: str | Path,
        task_settings: Any = None,
        for_training: bool = True,
    ) -> None:
        """Bind the tokenizers of compressor and decoder. Called once before the Trainer.

        Args:
            backbone: Folder or hub name of the compressor.
            cache_dir: Where prepared folders live; nothing is prepared here.
            task_settings: Plain values that identify the task.
            for_training: Whether training follows.
        """
        load, trust = AutoTokenizer.from_pretrained, self.trust_remote_code
        beside = Path(backbone, "decoder")
        decoder = self.decoder or (str(beside) if beside.is_dir() else None)
        source = load(backbone, trust_remote_code=trust)
        self.bind(source, load(decoder, trust_remote_code=trust) if decoder else None)

    def bind(self, tokenizer: Any, decoder_tokenizer: Any = None) -> None:
        """Give task and encoding their tokenizers, and forget what others have measured.

        Args:
            tokenizer: Of the compressor; the task keeps it.
            decoder_tokenizer: Of the decoder; None for the same one.

        Raises:
            ValueError: One of them cannot encode the task, or lacks what is needed.
        """
        target = tokenizer if decoder_tokenizer is None else decoder_tokenizer
        self.task.bind(target)
        self.task.bind(tokenizer)
        self.encoding.bind(tokenizer, target, self.task.hidden_words())
        self._checked, self._sets = False, {}
        self.counts.clear()

    @property
    def ranks(self) -> tuple[int, int]:
        """Rank and number of ranks of the attached trainer (0, 1 without one)."""
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    # ------------------------------------------------------------------ training

    def training_contexts(self) -> Sequence[Context]:
        """The texts that are trained on; a list is checked as a whole before the first batch.

        Raises:
            ValueError: There is none, or one of a list cannot be encoded.
        """
        found = self.task.contexts("train")
        if not found:
            raise ValueError(f"{self.path or self.task.name}: there is no training text")
        if isinstance(found, list | tuple) and not self._checked:
            self._warn_of_cuts("train", found, self.encoding.fit(found))
            self._checked = True
        return found

    def train_dataloader(self) -> Loader:
        """The sized, stateful loader of micro-batches."""
        loader = Loader(ContextTrainingSource(self))
        check_window(self.trainer, loader)
        return loader

    # ------------------------------------------------------------------ evaluation

    def evaluation_batch(self, contexts: Sequence[Context]) -> CompressionBatch:
        """Contexts of an evaluation set as tensors, nothing hidden.

        Args:
            contexts: Of one of the loaders' sets: those fit.
        """
        return self.encoding.batch(contexts)

    def evaluation_sets(self, split: Split) -> list[ContextSet]:
        """The sets of a split, long texts cut or refused.

        Args:
            split: Of the task.

        Raises:
            ValueError: A text cannot be encoded.
        """
        if split not in self._sets:
            sets = []
            for one in self.task.evaluations(split):
                fitting = self.encoding.fit(one.contexts)
                self.counts[f"{split}/cut"] += _num_cut(one.contexts, fitting)
                self._warn_of_cuts(f"{split}, {one.name}", one.contexts, fitting)
                sets.append(replace(one, contexts=fitting))
            self._sets[split] = sets
        return self._sets[split]

    def _warn_of_cuts(self, what: str, before: Sequence[Context], after: Sequence[Context]) -> None:
        if count := _num_cut(before, after):
            warnings.warn(
                f"{self.path or self.task.name}, {what}: {count} of {len(before)} texts are cut at "
                f"data.max_tokens={self.encoding.max_tokens}",
                stacklevel=4,
            )

    def _evaluations(self, split: Split) -> Loader | list[Any]:
        # one set a batch on every rank: they share its items
        sets = self.evaluation_sets(split)
        return Loader(RowSource(sets, batch_size=1), restarts=True) if sets else []

    def val_dataloader(self) -> Loader | list[Any]:
        """Evaluation sets of the validation split, one a batch of ``Rows``."""
        return self._evaluations("val")

    def test_dataloader(self) -> Loader | list[Any]:
        """Evaluation sets of the test split, one a batch of ``Rows``."""
        return self._evaluations("test")

    def predict_dataloader(self) -> Loader | list[Any]:
        """Evaluation sets to compress, one a batch of ``Rows``."""
        return self._evaluations("predict")


class ContextTrainingSource(Source):
    """Batches of shuffled training texts, a pure function of (seed, epoch, index).

    Ranks take the rows of a batch in turn, and what is hidden of a row goes by its place in the
    epoch, so that neither depends on the number of ranks.

    Args:
        data: Its datamodule.

    Raises:
        ValueError: The ranks cannot share a batch evenly, or the texts fill no window.
    """

    def __init__(self, data: ContextDataModule) -> None:
        self.data, self.window = data, data.window
        self.contexts = data.training_contexts()
        self.rank, self.world_size = data.ranks
        if data.batch_size % self.world_size:
            raise ValueError(
                f"data.batch_size={data.batch_size} cannot be shared evenly by {self.world_size} "
                f"processes: use a multiple"
            )
        self._length = len(self.contexts) // data.batch_size // self.window * self.window
        if not self._length:
            raise ValueError(
                f"{len(self.contexts)} training texts do not fill one step of "
                f"data.micro_batches={self.window} batches of data.batch_size={data.batch_size}: "
                f"use a smaller one"
            )
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self._length

    def order(self, epoch: int) -> list[int]:
        """Numbers of the texts in the order of an epoch, the same for every model and rank.

        Args:
            epoch: Of the loader.
        """
        if self._order[0] != epoch:
            self._order = epoch, permutation(len(self.contexts), self.data.seed, "contexts", epoch)
        return self._order[1]

    def batch(self, epoch: int, index: int) -> CompressionBatch:
        """Encode this rank's rows of one batch."""
        data, order = self.data, self.order(epoch)
        first = index * data.batch_size
        places = range(first + self.rank, first + data.batch_size, self.world_size)
        drawn = [self.contexts[order[place]] for place in places]
        keys = [f"source_mask/{data.seed}/{epoch}/{place}" for place in places]
        before = data.encoding.num_cut
        batch = data.encoding.batch(drawn, keys)
        data.counts["train/cut"] += data.encoding.num_cut - before
        return batch


def _num_cut(before: Sequence[Context], after: Sequence[Context]) -> int:
    return sum(one is not other for one, other in zip(before, after, strict=True))

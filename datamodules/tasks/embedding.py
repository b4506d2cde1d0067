"""What an embedding task is: pairs to train on, sets to retrieve from, sets of scored pairs.

An item is what one vector stands for: a text, or an image with a text (``ImageText``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from datamodules.tasks.base import Bound, Split

if TYPE_CHECKING:
    from datamodules.tasks.search_set import SearchSet


@dataclass(frozen=True)
class ImageText:
    """An image, with a text or alone.

    Args:
        key: Equal for equal items, such as the file's path or the scene's number.
        image: File, PIL image or array ``(H, W, 3)`` uint8.
        text: Read after the image.
        where: ``file:line``, for messages; "" where nothing was read.
    """

    key: str
    image: Any = field(compare=False, repr=False)
    text: str = ""
    where: str = field(default="", compare=False)


Item: TypeAlias = "str | ImageText"


@dataclass(frozen=True)
class PairRow:
    """A query and its positive, with hard negatives where there are any.

    Args:
        uid: Stable identity.
        query: What asks.
        positive: What answers.
        negatives: What looks like an answer and is none.
        where: ``file:line``, for messages; "" where nothing was read.
    """

    uid: str
    query: Item
    positive: Item
    negatives: tuple[Item, ...] = ()
    where: str = ""


@dataclass(frozen=True)
class PairSet:
    """Pairs of one data set; batches may be homogeneous by data set.

    Args:
        name: Of the data set.
        rows: Its pairs.
        in_batch: Whether other rows of a batch are negatives. False for labelled data, where two
            rows of one label would be false negatives (BOOM, arXiv 2602.05787 [code]): such rows
            need negatives of their own.
        kind: Type of task: ``retrieval``, ``sts``, ``classification``, ``clustering``.
        instruction: Said before its queries where the template has ``{instruction}``.
    """

    name: str
    rows: Sequence[PairRow]
    in_batch: bool = True
    kind: str = "retrieval"
    instruction: str = ""


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, a corpus and what answers what.

    Args:
        name: In metrics: ``val/<name>/ndcg_at_10``.
        queries: Q items.
        corpus: C items.
        relevant: For each query the places of its answers in the corpus; none may be empty.
        group: Sets of one group are also averaged: ``val/<group>/ndcg_at_10``; "" for no group.
        instruction: As in ``PairSet``.
    """

    name: str
    queries: Sequence[Item]
    corpus: Sequence[Item]
    relevant: Sequence[Sequence[int]]
    group: str = ""
    instruction: str = ""


@dataclass(frozen=True)
class StsSet:
    """Pairs of texts with a similarity score each.

    Args:
        name: In metrics: ``val/<name>/spearman``.
        first: N items.
        second: N items.
        scores: N numbers, in any unit; only their order counts.
        group: As in ``RetrievalSet``.
        instruction: As in ``PairSet``; said before both.
    """

    name: str
    first: Sequence[Item]
    second: Sequence[Item]
    scores: Sequence[float]
    group: str = ""
    instruction: str = ""


@dataclass(frozen=True)
class Bridge:
    """Two blocks that a bridge token connects: the second is to be rebuilt from the first.

    Args:
        uid: Stable identity.
        source: Block A, read as it is.
        target: Block B, a text that is masked.
        where: ``file:line``, for messages.
    """

    uid: str
    source: Item
    target: str
    where: str = ""


@dataclass(frozen=True)
class BridgeSet:
    """Rows on which reconstruction is measured.

    Args:
        name: In metrics: ``val/<name>/loss``.
        rows: At least two, so that a bridge can be exchanged for another's.
        group: As in ``RetrievalSet``.
    """

    name: str
    rows: Sequence[Bridge]
    group: str = ""


EvalSet: TypeAlias = "RetrievalSet | StsSet | BridgeSet | SearchSet"


class EmbeddingTask(Bound):
    """Data sets of pairs and sets to evaluate on. Trainers know no task by name."""

    @abstractmethod
    def pairs(self, split: Split) -> list[PairSet]:
        """Data sets of a split, in a fixed order; ``train`` is what is trained on."""

    @abstractmethod
    def evaluations(self, split: Split) -> list[EvalSet]:
        """What a split is measured on, in a fixed order."""

    def warm_start_pairs(self) -> list[PairSet]:
        """Pairs that a tiny backbone is fitted to before anything else; [] for no warm start."""
        return []


class ImageTextTask(EmbeddingTask):
    """Images and texts that go together, also as material for reconstruction."""

    @abstractmethod
    def captions(self, split: Split) -> Sequence[ImageText]:
        """Images with their captions as one item each: both are masked and rebuilt."""

    @abstractmethod
    def bridges(self, split: Split) -> Sequence[Bridge]:
        """Blocks to be rebuilt from each other."""

"""The one loader class of every family: sized, stateful, rank-aware.

A loader asks its ``Source`` for micro-batch ``index`` of ``epoch``. It has a length, so Lightning
does not fetch ahead (rollouts come from the current policy) [measured]; it keeps its position and
its source's state, so a resumed run goes on with the next micro-batch [our choice]; sources know
their rank, so no sampler is swapped in from outside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


class Source(ABC):
    """Makes micro-batches. ``window`` of them share one optimizer step."""

    window: int = 1

    @abstractmethod
    def __len__(self) -> int:
        """Micro-batches an epoch, equal on every rank and a multiple of ``window``."""

    @abstractmethod
    def batch(self, epoch: int, index: int) -> Any:
        """Micro-batch ``index`` of ``epoch``; called in order, once each."""

    def state_dict(self) -> dict[str, Any]:
        """What besides the position is needed to go on (plain containers and tensors)."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        del state  # a source that keeps no state has nothing to take


class Loader:
    """Iterates over a source and remembers where it is.

    Args:
        source: Makes the micro-batches.
        restarts: Begin every iteration with the first batch, wherever the last one was left:
            evaluations that a limit cuts short see the same rows each time.

    Raises:
        ValueError: The source's length is no multiple of its window.
    """

    def __init__(self, source: Source, *, restarts: bool = False) -> None:
        if source.window < 1 or len(source) % source.window:
            raise ValueError(
                f"the loader has {len(source)} micro-batches an epoch, which is no multiple of its "
                f"window of {source.window}: Lightning would step on an incomplete window"
            )
        self.source = source
        self.restarts = restarts
        self.epoch = 0
        self.index = 0

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Any]:
        if self.restarts:
            self.index = 0
        elif self.index >= len(self):
            self.epoch, self.index = self.epoch + 1, 0
        # Lightning never runs a sized loader past its last item, so nothing stands behind yield:
        # the position is moved before the batch is handed out.
        while self.index < len(self):
            batch = self.source.batch(self.epoch, self.index)
            self.index += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Position of the next micro-batch and the source's own state."""
        return {"epoch": self.epoch, "index": self.index, "source": self.source.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            ValueError: The window has changed, and the position is inside one.
        """
        self.epoch, self.index = int(state["epoch"]), int(state["index"])
        if self.index % self.source.window:
            raise ValueError(
                f"the checkpoint stands at micro-batch {self.index} of its epoch, inside a window "
                f"of {self.source.window}: give data.micro_batches and data.shares as then, or a "
                f"divisor"
            )
        self.source.load_state_dict(state["source"])


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every rank, in the order of ranks; just ``[value]`` in one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_window(trainer: Any, loader: Loader) -> None:
    """Refuse Trainer flags that would cut an accumulation window.

    Raises:
        ValueError: ``accumulate_grad_batches`` is not the window, or ``limit_train_batches`` is no
            multiple of it.
    """
    window, length = loader.source.window, len(loader)
    if trainer.accumulate_grad_batches != window:
        raise ValueError(
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} must equal the "
            f"window of {window} micro-batches of this data (data.micro_batches or the sum of "
            f"data.shares); leave it out: it is set from the data"
        )
    limit = trainer.limit_train_batches
    if isinstance(limit, float):
        limit = int(length * limit)
    if min(limit, length) % window:
        raise ValueError(
            f"trainer.limit_train_batches={trainer.limit_train_batches} leaves {limit} of {length} "
            f"micro-batches, which is no multiple of the window of {window}: use "
            f"trainer.limit_train_batches={max(window, limit // window * window)}"
        )


@dataclass
class Rows:
    """A batch of rows of ordinary data.

    Args:
        items: The rows; the last batch of a rank is filled up by repeating rows.
        counted: False for a filling row: it takes part in collectives but not in metrics.
    """

    items: list[Any]
    counted: list[bool]

    def to(self, *args: Any, **kwargs: Any) -> Rows:
        """Rows are no tensors: they stay where they are."""
        return self


class RowSource(Source):
    """Batches of a fixed list of rows, a pure function of (seed, epoch, index).

    Args:
        rows: All rows, equal on every rank.
        batch_size: Rows a micro-batch on this rank.
        seed: Of the order; None keeps the order of the file (evaluation).
        window: Micro-batches an optimizer step.
        rank: Of this process.
        world_size: Number of processes.
        drop_last: Leave out the rows that do not fill a window on every rank (training);
            otherwise the last batches are filled up with repeated rows that do not count.

    Raises:
        ValueError: No rows, or too few for one window.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        *,
        batch_size: int,
        seed: int | None = None,
        window: int = 1,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.window, self.rank, self.world_size = window, rank, world_size
        share = batch_size * world_size
        whole = len(rows) // share // window * window
        self.length = whole if drop_last else -(-len(rows) // (share * window)) * window
        if not self.length:
            raise ValueError(
                f"{len(rows)} rows do not fill one window of {window} micro-batches of "
                f"{batch_size} rows on {world_size} processes: use a smaller data.batch_size"
            )

    def __len__(self) -> int:
        return self.length

    def order(self, epoch: int) -> list[int]:
        """Indexes of the rows in the order of an epoch, the same on every rank."""
        if self.seed is None:
            return list(range(len(self.rows)))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.rows), generator=generator).tolist()

    def batch(self, epoch: int, index: int) -> Rows:
        """Rows ``rank, rank + world_size, ...`` of the epoch's order, ``batch_size`` of them."""
        order = self.order(epoch)
        first = index * self.batch_size * self.world_size
        places = [first + self.rank + i * self.world_size for i in range(self.batch_size)]
        counted = [place < len(order) for place in places]
        return Rows([self.rows[order[place % len(order)]] for place in places], counted)

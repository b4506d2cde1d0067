"""Supervised batches of a task's demonstrations, fresh every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from datamodules.loader import Loader, Source
from datamodules.tasks.base import Demonstration, Task


@dataclass
class Supervised:
    """Tensors of supervised sequences, padded on the right.

    Args:
        input_ids: ``(N, L)`` prompt then completion.
        prompt_lengths: ``(N,)``.
        mask: ``(N, T)`` True on completion tokens that are learned: not on observations.
        domains: ``(N,)`` index into ``domain_names``.
        domain_names: Names of the domains.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    mask: Tensor
    domains: Tensor
    domain_names: list[str]


def collate(rows: list[Demonstration]) -> Supervised:
    """Pad demonstrations into tensors."""
    sizes = torch.tensor([len(row.completion_ids) for row in rows])
    width = max(len(row.prompt_ids) + len(row.completion_ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        tokens = row.prompt_ids + row.completion_ids
        ids[number, : len(tokens)] = torch.tensor(tokens)
    mask = torch.arange(int(sizes.max()))[None, :] < sizes[:, None]
    for number, row in enumerate(rows):
        if row.observed is not None:
            mask[number, : len(row.completion_ids)] = ~torch.tensor(row.observed)
    names = sorted({row.domain for row in rows})
    return Supervised(
        input_ids=ids,
        prompt_lengths=torch.tensor([len(row.prompt_ids) for row in rows]),
        mask=mask,
        domains=torch.tensor([names.index(row.domain) for row in rows]),
        domain_names=names,
    )


class DemonstrationSource(Source):
    """Batch ``index`` is ``task.demonstrations(seed, index, batch_size)``."""

    def __init__(self, task: Task, *, steps: int, batch_size: int, seed: int) -> None:
        self.task, self.steps, self.batch_size, self.seed = task, steps, batch_size, seed

    def __len__(self) -> int:
        return self.steps

    def batch(self, epoch: int, index: int) -> Supervised:
        """A fresh batch, the same on every call."""
        step = epoch * self.steps + index
        return collate(self.task.demonstrations(self.seed, step, self.batch_size))


class DemonstrationDataModule(LightningDataModule):
    """The training stream of the warm start.

    Args:
        task: Bound to its tokenizer; must have demonstrations.
        steps: Batches.
        batch_size: Sequences a batch.
        seed: Of the demonstrations.
    """

    def __init__(self, task: Task, *, steps: int, batch_size: int, seed: int) -> None:
        super().__init__()
        self.source = DemonstrationSource(task, steps=steps, batch_size=batch_size, seed=seed)

    def train_dataloader(self) -> Any:
        """Batches of ``Supervised``."""
        return Loader(self.source)

"""Predictions as JSON-lines, written once everything is there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer


class PredictionWriter(Callback):
    """Writes what ``predict_step`` returns (lists of records), one line each, in row order.

    Args:
        path: The file.
    """

    def __init__(self, *, path: str) -> None:
        self.path = Path(path)
        self._batches: list[list[dict[str, Any]]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier prediction."""
        self._batches = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep one batch of records."""
        self._batches.append(list(outputs))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the ranks' records (rows went round robin over ranks) and write them."""
        everything: list[Any] = [self._batches]
        if dist.is_available() and dist.is_initialized():
            everything = [None] * dist.get_world_size()
            dist.all_gather_object(everything, self._batches)
        if not trainer.is_global_zero:
            return
        records = []
        for batches in zip(*everything, strict=True):
            for place in range(max((len(batch) for batch in batches), default=0)):
                records += [batch[place] for batch in batches if place < len(batch)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(record) + "\n" for record in records))
        os.replace(unfinished, self.path)

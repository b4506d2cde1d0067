"""The trained policy as a Hugging Face folder at the end of training."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class HFExport(Callback):
    """Calls the module's ``export(folder, tokenizer)`` when training ends.

    Args:
        folder: Where to.
    """

    def __init__(self, *, folder: str) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export on every rank (sharded weights are gathered); rank 0 writes."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        module: Any = pl_module
        module.export(self.folder, data.task.tokenizer)

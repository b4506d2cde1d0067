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
        """Export on every rank (sharded weights are gathered); rank 0 writes.

        Raises:
            OSError: The disk is full, for example.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        module: Any = pl_module
        try:
            module.export(self.folder, data.task.tokenizer)
        except Exception as error:  # safetensors has an error of its own
            if not isinstance(error, OSError) and "os error" not in str(error):
                raise
            raise OSError(
                f"cannot write {self.folder} ({error}); the last checkpoint is intact: free space "
                f"and go on with resume=auto"
            ) from error

"""Checkpoints on optimizer-step boundaries, written whole or not at all."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint


class StepCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` and, where a metric is watched, ``best.ckpt``.

    Lightning's own callback may save in the middle of an accumulation window when it saves by
    time; this one saves only after an optimizer step, writes to a temporary name and renames it,
    so that a kill or a full disk leaves the previous checkpoint usable.

    Args:
        folder: Where to.
        every_seconds: Save after the first step that ends this much later than the last save;
            None for not by time.
        every_n_steps: Save after every n-th step; None for not by steps.
        monitor: Logged tag to choose ``best.ckpt`` by, after a validation; None for none.
        mode: ``max`` or ``min`` of the monitored tag.
    """

    def __init__(
        self,
        *,
        folder: str,
        every_seconds: float | None = 60.0,
        every_n_steps: int | None = None,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
    ) -> None:
        super().__init__()
        if mode not in ("max", "min"):
            raise ValueError(f"callbacks.checkpoint.mode={mode!r} must be 'max' or 'min'")
        self.folder = Path(folder)
        self.every_seconds, self.every_n_steps = every_seconds, every_n_steps
        self.monitor, self.mode = monitor, mode
        self.best: float | None = None
        self._saved_step = -1
        self._is_due = False
        self._saved_time = time.monotonic()

    @property
    def last_path(self) -> Path:
        """The newest checkpoint."""
        return self.folder / "last.ckpt"

    @property
    def best_path(self) -> Path:
        """The checkpoint of the best validation."""
        return self.folder / "best.ckpt"

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the best value of the resumed run."""
        self.best = state_dict["best"]

    def save(self, trainer: Trainer, path: Path) -> None:
        """Write one checkpoint; every rank must call it."""
        log_window = getattr(trainer.lightning_module, "log_window", None)
        if log_window is not None:
            log_window()
        for logger in trainer.loggers:
            logger.save()  # flush: what was logged up to the checkpoint survives a kill
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        try:
            trainer.save_checkpoint(unfinished, weights_only=False)
            if trainer.is_global_zero:
                with open(unfinished, "rb") as handle:
                    os.fsync(handle.fileno())
                os.replace(unfinished, path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise OSError(
                f"cannot write {path} ({error.strerror or error}); the previous checkpoint is "
                f"intact: free space and go on with resume=auto"
            ) from error
        trainer.strategy.barrier("checkpoint")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run need not save the step it was loaded from."""
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after an optimizer step if it is time; if it is validated, after the validation.

        A run that is resumed between a step and its validation would leave the validation out. The
        last step is saved by ``on_train_end``, once the export is there too.
        """
        step = trainer.global_step
        if step == self._saved_step or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        is_due = self.every_n_steps is not None and step % self.every_n_steps == 0
        if self.every_seconds is not None:
            is_due = is_due or time.monotonic() - self._saved_time >= self.every_seconds
        if trainer.strategy.broadcast(is_due):
            self._is_due = True
            loop: Any = trainer.fit_loop.epoch_loop
            is_validated = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
            if not is_validated and step != trainer.max_steps:
                self._save_due(trainer)

    def _save_due(self, trainer: Trainer) -> None:
        self._is_due, self._saved_step = False, trainer.global_step
        self.save(trainer, self.last_path)
        self._saved_time = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best, then save if it is time."""
        self._keep_best(trainer)
        if self._is_due and trainer.global_step != trainer.max_steps:
            self._save_due(trainer)

    def _keep_best(self, trainer: Trainer) -> None:
        if self.monitor is None or trainer.sanity_checking:
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise ValueError(
                f"callbacks.checkpoint.monitor={self.monitor!r} was not logged; logged: {known}"
            )
        sign = 1.0 if self.mode == "max" else -1.0
        if self.best is None or sign * float(value) > sign * self.best:
            self.best = float(value)
            self.save(trainer, self.best_path)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final weights."""
        # Lightning would resume inside the epoch that is over and step on a cut window
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if progress.current.completed >= trainer.num_training_batches:
            progress.reset_on_run()
        self.save(trainer, self.last_path)

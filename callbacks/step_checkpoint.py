"""Checkpoints on optimizer-step boundaries, written whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint


class PlainFile(TorchCheckpointIO):
    """Writes a checkpoint straight to its path and onto the disk.

    Lightning's own pickles it into memory first, and then passes through the system's folder of
    temporary files, which may be small. A disk that is full is kept as ``problem`` and not raised:
    the ranks still have a barrier before them.
    """

    def __init__(self) -> None:
        self.problem = ""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write one file; what is at ``path`` counts only where ``problem`` is empty then."""
        self.problem = ""
        handle: Any = None
        try:
            with _Remembering(path) as handle:
                torch.save(checkpoint, handle)
                os.fsync(handle.fileno())
        except OSError as error:
            self.problem = _reason(error)
        except RuntimeError:  # torch's writer says no more than that it failed
            if handle is None or handle.error is None:
                raise
            self.problem = _reason(handle.error)


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


class _Remembering:
    """A file that remembers the error of its last write."""

    def __init__(self, path: Any) -> None:
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115
        self.error: OSError | None = None

    def __enter__(self) -> _Remembering:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):  # a raw write may stop half-way, at the limit of a file
                done += self.file.write(view[done:])
        except OSError as error:
            self.error = error
            raise
        return done

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()


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
        self._then: Callable[[Path], Any] | None = None
        self._file = PlainFile()
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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have checkpoints written by ``PlainFile``, unless a plugin was given."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = self._file

    def ask(self, then: Callable[[Path], Any]) -> None:
        """Have this step saved (after its validation), whenever the last save was.

        Every rank must ask, in ``on_train_batch_end`` or ``on_validation_end``.

        Args:
            then: Called with the checkpoint once it is written.
        """
        self._then = then

    def save(self, trainer: Trainer, path: Path) -> None:
        """Write one checkpoint; every rank must call it.

        Raises:
            OSError: It could not be written; raised on every rank.
        """
        log_window = getattr(trainer.lightning_module, "log_window", None)
        if log_window is not None:
            log_window()
        unfinished = path.with_suffix(".unfinished")
        problem = self._try(lambda: self._flush(trainer))
        # every rank takes part, whatever happened to this one
        problem = self._try(lambda: trainer.save_checkpoint(unfinished, False)) or problem
        problem = problem or self._file.problem
        if trainer.is_global_zero and not problem:
            problem = self._try(lambda: os.replace(unfinished, path))
        problem = trainer.strategy.broadcast(problem)  # the others had nothing to write
        if problem:
            unfinished.unlink(missing_ok=True)
            raise OSError(
                f"cannot write {path} ({problem}); the previous checkpoint is intact: free space "
                f"and go on with resume=auto"
            )

    def _flush(self, trainer: Trainer) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for logger in trainer.loggers:
            logger.save()  # what was logged up to the checkpoint survives a kill

    @staticmethod
    def _try(action: Callable[[], Any]) -> str:
        try:
            action()
        except OSError as error:
            return _reason(error)
        return ""

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
        is_due = self._then is not None
        if self.every_n_steps is not None:
            is_due = is_due or step % self.every_n_steps == 0
        if self.every_seconds is not None:
            is_due = is_due or time.monotonic() - self._saved_time >= self.every_seconds
        if trainer.strategy.broadcast(is_due):
            self._is_due = True
            loop: Any = trainer.fit_loop.epoch_loop
            is_validated = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
            if not is_validated and not _is_last_step(trainer):
                self._save_due(trainer)

    def _save_due(self, trainer: Trainer) -> None:
        self._is_due, self._saved_step = False, trainer.global_step
        self.save(trainer, self.last_path)
        self._saved_time = time.monotonic()
        self._go_on()

    def _go_on(self) -> None:
        then, self._then = self._then, None
        if then is not None:
            then(self.last_path)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best, then save if it is time."""
        self._keep_best(trainer)
        is_due = self._is_due or self._then is not None
        if is_due and not _is_last_step(trainer):
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
        self._go_on()


def _is_last_step(trainer: Trainer) -> bool:
    """Whether the run ends with this step: by ``max_steps``, or with the last batch."""
    if trainer.global_step == trainer.max_steps:
        return True
    is_last_epoch = trainer.max_epochs is not None and 0 < trainer.max_epochs <= (
        trainer.current_epoch + 1
    )
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return is_last_epoch and ready >= trainer.num_training_batches

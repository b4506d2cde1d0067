"""One progress bar over the whole run: steps, time left, and the few numbers worth watching."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column


class RunProgressBar(ProgressBar):
    """A rich bar counted in optimizer steps; plain lines where the output is no terminal.

    Args:
        label: Left of the bar.
        line_seconds: Seconds between lines where there is no terminal.
    """

    def __init__(self, *, label: str = "train", line_seconds: float = 20.0) -> None:
        super().__init__()
        self.label, self.line_seconds = label, line_seconds
        self._progress: Progress | None = None
        self._task: Any = None
        self._last_line = time.monotonic()
        self._enabled = True

    def disable(self) -> None:
        """Called on ranks other than 0."""
        self._enabled = False

    def enable(self) -> None:
        """Called on rank 0."""
        self._enabled = True

    def _open(self, label: str, total: int | None) -> None:
        self._close()
        if not self._enabled or not sys.stderr.isatty():
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=3)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
            TextColumn("{task.fields[numbers]}"),
            console=Console(stderr=True),
            transient=label != self.label,
        )
        self._progress.start()
        self._task = self._progress.add_task(label, total=total, numbers="")

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _update(self, label: str, done: int, total: int | None, numbers: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done, numbers=numbers)
        elif self._enabled and not sys.stderr.isatty():
            now = time.monotonic()
            if now - self._last_line >= self.line_seconds or done == total:
                self._last_line = now
                print(f"{label} {done}/{total or '?'}  {numbers}", file=sys.stderr, flush=True)

    def _numbers(self, trainer: Trainer, module: LightningModule) -> str:
        metrics = self.get_metrics(trainer, module)
        return "  ".join(
            f"{name} {_short(value)}" for name, value in metrics.items() if name != "v_num"
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the step a resumed run goes on from."""
        total = _total(trainer)
        self._open(self.label, total)
        self._update(self.label, trainer.global_step, total, "")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        total = _total(trainer)
        self._update(self.label, trainer.global_step, total, self._numbers(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar over test batches."""
        self._open("test", int(sum(trainer.num_test_batches)))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the bar."""
        self._update("test", batch_idx + 1, int(sum(trainer.num_test_batches)), "")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the terminal as it was."""
        self._close()


def _total(trainer: Trainer) -> int | None:
    """Optimizer steps of the run, where they are known."""
    steps = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) else None


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

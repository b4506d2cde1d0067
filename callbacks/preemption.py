"""A scheduler's signal ends the run after an optimizer step, saved, with a code that says "again".

The handler only sets a flag. At the next step boundary all ranks agree (one number is summed over
them), the checkpoint is written as always, and the process ends with ``exit_code``; the same
command with ``resume=auto`` goes on, bit for bit. A test, a prediction or a validation of its own
ends between two batches. A second SIGTERM ends at once: the last checkpoint is whole. While there
is nothing to finish (warm start, preparation of data) the first signal ends at once too: what is
prepared appears by a rename, so the next run prepares it anew.

Lightning's own handlers are left out: they stop inside an accumulation window, wait for other ranks
inside a signal handler, and requeue SLURM jobs by themselves.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

#: EX_TEMPFAIL of sysexits.h: a temporary failure, try again.
EXIT_CODE = 75
SIGNALS = ("SIGTERM", "SIGUSR1")


class Preempted(SystemExit):
    """The run was asked to end and can go on later; ``code`` is the exit status.

    Args:
        code: Of the process.
        message: One line that says what was saved and how to go on.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code)
        self.message = message


@dataclass
class _Watch:
    """Signals are the process's own, so this is too."""

    exit_code: int = EXIT_CODE
    is_on: bool = False
    asked: str = ""  # name of the first signal
    num_terms: int = 0
    num_trainers: int = 0  # running ones: they end at a boundary


_watch = _Watch()


def is_launched_child() -> bool:
    """Whether Lightning's own launcher started this process (not torchrun, not srun)."""
    outside = "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_PROCID" in os.environ
    return os.environ.get("LOCAL_RANK", "0") != "0" and not outside


@contextmanager
def watch(signals: Sequence[str] = SIGNALS, exit_code: int = EXIT_CODE, **_: Any) -> Iterator[None]:
    """Inside the block a signal ends the run in good order; afterwards handlers are as before.

    Blocks may be nested: the outermost counts. Outside the main thread this does nothing.

    Args:
        signals: Names of the signals.
        exit_code: Of a process that a signal ended.

    Raises:
        ValueError: A name is no signal that can be handled, or a code of no failure.
    """
    numbers = _numbers(signals)
    if not isinstance(exit_code, int) or not 1 <= exit_code <= 125:
        raise ValueError(f"callbacks.preemption.exit_code={exit_code!r} must be from 1 to 125")
    if _watch.is_on or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    _watch.__dict__.update(_Watch(exit_code=exit_code, is_on=True).__dict__)
    try:
        for number in numbers:
            signal.signal(number, _handle)
        yield
    finally:
        _watch.is_on = False
        for number, handler in before.items():
            signal.signal(number, handler)


def _numbers(names: Sequence[str]) -> list[signal.Signals]:
    known = set(signal.Signals.__members__) - {"SIGKILL", "SIGSTOP"}
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ValueError(
            f"callbacks.preemption.signals: {wrong[0]!r} cannot be handled; give names such as "
            f"[SIGTERM, SIGUSR1]"
        )
    return [signal.Signals[name] for name in names]


def _handle(number: int, _: Any) -> None:
    name = signal.Signals(number).name
    if name == "SIGTERM":
        _watch.num_terms += 1
        if _watch.num_terms > 1:
            _say("second SIGTERM: ended at once; resume=auto goes on from the last checkpoint")
            os._exit(_watch.exit_code)
    if _watch.asked:
        return
    _watch.asked = name
    if _watch.num_trainers or is_launched_child() or (dist.is_initialized() and _num_ranks() > 1):
        _say(f"{name}: the run ends after this optimizer step ({name} again: at once)")
        return
    raise Preempted(
        _watch.exit_code,
        f"{name}: ended before training; go on with the same command and resume=auto "
        f"(exit code {_watch.exit_code})",
    )


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _say(line: str) -> None:
    # print() may not be entered again from a signal handler
    os.write(2, f"{line}\n".encode())


class Preemption(Callback):
    """Ends a run at a step boundary when a scheduler asks for it.

    Args:
        signals: Names of the signals that ask: SIGTERM, and SIGUSR1 as schedulers send it ahead of
            a time limit (``sbatch --signal=SIGUSR1@120``).
        exit_code: Of the process then; schedulers requeue on it.

    Raises:
        ValueError: See ``watch``.
    """

    def __init__(self, *, signals: Sequence[str] = SIGNALS, exit_code: int = EXIT_CODE) -> None:
        self.signals, self.exit_code = tuple(signals), exit_code
        self._own = ExitStack()
        self._is_running = self._is_leaving = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take over signal handling; end here if a signal came since the last stage."""
        self._close()
        self._own.enter_context(watch(self.signals, self.exit_code))
        connector: Any = trainer._signal_connector  # its handlers would come in front of ours
        connector.register_signal_handlers = _nothing
        self._is_running, self._is_leaving = True, False
        _watch.num_trainers += 1
        if self._is_asked(trainer):
            self._leave(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give signal handling back."""
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give signal handling back."""
        self._close()

    def _close(self) -> None:
        if self._is_running:
            self._is_running = False
            _watch.num_trainers -= 1
            self._own.close()

    def _is_asked(self, trainer: Trainer) -> bool:
        """Whether any rank was asked; every rank must call it."""
        return trainer.strategy.reduce_boolean_decision(bool(_watch.asked), all=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of a window: if a rank was asked, have this step saved and leave."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._leave_saved(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation between steps is finished first: it belongs to the step before."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._leave_saved(trainer)

    def _leave_saved(self, trainer: Trainer) -> None:
        if self._is_leaving or not self._is_asked(trainer):
            return
        self._is_leaving = True
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if hasattr(callback, "ask"):
                callback.ask(lambda path: self._leave(trainer, path))
                return
        self._leave(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Leave a validation that is the whole run."""
        if trainer.state.fn == "validate":
            self._leave_unsaved(trainer)

    def on_test_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Leave a test: the next run makes it anew."""
        self._leave_unsaved(trainer)

    def on_predict_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Leave a prediction: the next run makes it anew."""
        self._leave_unsaved(trainer)

    def _leave_unsaved(self, trainer: Trainer) -> None:
        if self._is_asked(trainer):
            self._leave(trainer)

    def _leave(self, trainer: Trainer, path: Path | None = None) -> NoReturn:
        what = f"saved {path}" if path else "with nothing to save"
        raise Preempted(
            _watch.exit_code if _watch.is_on else self.exit_code,
            f"{_watch.asked or 'a signal to another rank'}: ended after step "
            f"{trainer.global_step}, {what}; go on with the same command and resume=auto "
            f"(exit code {self.exit_code})",
        )


def _nothing() -> None:
    """In place of Lightning's registration of handlers."""

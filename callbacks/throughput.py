"""Tokens per second, where the seconds of a step went, and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Records ``perf/*`` once an optimizer step.

    ``perf/tokens_per_s`` counts completion tokens trained over the whole step, rollouts included
    (of pairs: all tokens);
    ``perf/<part>_s`` are the seconds of the datamodule's parts (sync, rollout, score, annotate),
    ``perf/train_s`` is the rest.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._tokens = 0
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start, self._tokens, self._step = time.perf_counter(), 0, trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record when a step is done."""
        own = getattr(batch, "num_tokens", None)
        mask = getattr(batch, "mask", None)
        self._tokens += own if own is not None else 0 if mask is None else int(mask.sum())
        if trainer.global_step == self._step:
            return
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        self._step = trainer.global_step
        values = {"perf/step_s": seconds, "mem/peak_gib": peak_gib()}
        if self._tokens:
            values["perf/tokens_per_s"] = self._tokens * trainer.world_size / max(seconds, 1e-9)
        data: Any = getattr(trainer, "datamodule", None)
        parts = dict(getattr(data, "seconds", None) or {})
        if parts:
            data.seconds = {}
        values |= {f"perf/{name}_s": spent for name, spent in parts.items()}
        values["perf/train_s"] = max(0.0, seconds - sum(parts.values()))
        self._tokens = 0
        record: Any = getattr(pl_module, "record", None)
        if record is not None:
            record({name: (value, 1.0) for name, value in values.items()})


def peak_gib() -> float:
    """Peak memory of this process so far: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

"""What is evaluated: batches of rows in, sums and counts by arm out, logged once over all ranks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from datamodules.loader import Rows, gather_objects
from lightning_modules.base import BaseModule
from lightning_modules.functional.sums import Metrics, masked_sum_count, means, merge


class EvaluatedModule(BaseModule):
    """A module whose validations and tests are the hook ``evaluate``.

    Args:
        **kwargs: Of ``BaseModule``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._evaluation: dict[str, Metrics] = {}

    @abstractmethod
    def evaluate(self, batch: Rows, split: str) -> Mapping[str, Metrics]:
        """Arm (\"\" for none) -> name -> (sum, count) of a batch of records.

        Args:
            batch: Records; some may not count.
            split: ``val`` or ``test``.
        """

    def validation_step(self, batch: Rows, batch_idx: int) -> None:
        """Evaluate one batch of records."""
        self.add_evaluation(self.evaluate(batch, "val"))

    def test_step(self, batch: Rows, batch_idx: int) -> None:
        """Evaluate one batch of records."""
        self.add_evaluation(self.evaluate(batch, "test"))

    def add_evaluation(self, metrics: Mapping[str, Metrics]) -> None:
        """Add metrics of a batch: arm (\"\" for none) -> name -> (sum, count)."""
        for arm, values in metrics.items():
            self._evaluation[arm] = merge(self._evaluation.get(arm, {}), values)

    def finish_evaluation(self, split: str) -> dict[str, float]:
        """Close an evaluation over all ranks: ``split[/arm]/name`` -> mean."""
        own = {
            f"{split}/{arm}/{name}" if arm else f"{split}/{name}": (float(total), float(count))
            for arm, values in self._evaluation.items()
            for name, (total, count) in values.items()
        }
        self._evaluation = {}
        merged: Metrics = {}
        for other in gather_objects(own):
            merged = merge(merged, other)
        return means(merged)

    def on_validation_epoch_end(self) -> None:
        """Log the validation at the current step."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the test at the current step."""
        self._log_evaluation("test")

    def _log_evaluation(self, split: str) -> dict[str, float]:
        values = self.finish_evaluation(split)
        self.results |= values
        if not self.trainer.sanity_checking:
            for logger in self.trainer.loggers:
                logger.log_metrics(values, step=self.trainer.global_step)
        self.log_dict(values, logger=False)
        engine = getattr(getattr(self.trainer, "datamodule", None), "engine", None)
        if engine is not None:
            engine.rest()
        return values


def by_domain(parts: Mapping[str, Tensor], counted: Tensor, domains: Sequence[str]) -> Metrics:
    """Sums and counts of parts ``(N,)``: overall, and ``<part>/<domain>`` where there are several.

    Args:
        parts: Name -> value a row.
        counted: ``(N,)`` False for rows that fill up a batch.
        domains: Of each row.
    """
    found: Metrics = {name: masked_sum_count(value, counted) for name, value in parts.items()}
    names = sorted(set(domains))
    for domain in names if len(names) > 1 else []:
        mask = counted & torch.tensor([own == domain for own in domains])
        found |= {f"{name}/{domain}": masked_sum_count(v, mask) for name, v in parts.items()}
    return found

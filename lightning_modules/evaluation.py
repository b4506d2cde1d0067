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
        return named_domains(means(merged)) | self.composites(merged)

    def composites(self, merged: Metrics) -> dict[str, float]:
        """Values that are no plain means; none here.

        Args:
            merged: Tag -> (sum, count) of an evaluation, of all batches and ranks.
        """
        return {}

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


#: Between a part and its domain, until it is known whether there are several.
_OF = "@"


def by_domain(parts: Mapping[str, Tensor], counted: Tensor, domains: Sequence[str]) -> Metrics:
    """Sums and counts of parts ``(N,)``, overall and of each domain of this batch.

    Args:
        parts: Name -> value a row.
        counted: ``(N,)`` False for rows that fill up a batch.
        domains: Of each row.

    Returns:
        ``<part>`` and ``<part>@<domain>`` -> (sum, count); ``named_domains`` ends it.
    """
    found: Metrics = {name: masked_sum_count(value, counted) for name, value in parts.items()}
    for domain in sorted(set(domains)):
        mask = counted & torch.tensor([own == domain for own in domains])
        found |= {f"{name}{_OF}{domain}": masked_sum_count(v, mask) for name, v in parts.items()}
    return found


def named_domains(values: Mapping[str, float]) -> dict[str, float]:
    """``<part>@<domain>`` as ``<part>/<domain>``, left out where an evaluation has one domain only.

    Args:
        values: Tag -> mean, of all batches and ranks.

    Example:
        >>> named_domains({"test/reward": 0.5, "test/reward@a": 0.0, "test/reward@b": 1.0})
        {'test/reward': 0.5, 'test/reward/a': 0.0, 'test/reward/b': 1.0}
        >>> named_domains({"test/reward": 0.5, "test/reward@a": 0.5})
        {'test/reward': 0.5}
    """
    domains = {tag.split(_OF)[1] for tag in values if _OF in tag}
    return {
        tag.replace(_OF, "/"): value
        for tag, value in values.items()
        if _OF not in tag or len(domains) > 1
    }
